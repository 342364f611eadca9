"""The report's line on what is trained: by type of parameter and by role, against counts made by hand."""

import pytest
from torch import nn

from components.adapters.base import breakdown
from tests.components.adapters.helpers import Toy, dora, lora, mtl_lora
from tests.components.adapters.moe_helpers import moe

TWO = {"targets": ["o_proj", "down_proj"]}  # 8 to 8, and 16 to 8, in each of two blocks: inputs add up to 48, outputs to 32


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        (lora(r=3, **TWO), "240 parameters: lora_A 144, lora_B 96; o 96, down 144"),
        (
            lora(r=3, modules_to_save=["norm"], **TWO),
            "240 parameters: lora_A 144, lora_B 96; o 96, down 144; 32 of the model's own in full",
        ),
        (dora(r=3, **TWO), "272 parameters: lora_magnitude_vector 32, lora_A 144, lora_B 96; o 112, down 160"),
        # three B, three tasks: a Lambda of 9 and 3 weights each
        (
            mtl_lora(r=3, split_fused=False, **TWO),
            "576 parameters: lora_A 144, lora_B 288, lora_B_w 36, lora_lambdas 108; o 264, down 312",
        ),
        # two experts, three tasks with three numbers each
        (moe("task", **TWO), "380 parameters: lora_A 192, lora_B 128, lora_embedding 36, lora_gate 24; o 158, down 222"),
        (moe("token", **TWO), "544 parameters: lora_A 192, lora_B 256, lora_router 96; o 224, down 320"),
        (moe("modality", **TWO), "400 parameters: lora_A 240, lora_B 160; o 160, down 240"),  # experts of ranks 2 and 3
    ],
)
def test_types_and_roles(adapter, line):
    model = Toy()
    adapter.apply(model)
    assert breakdown(model) == f"adapter: {line}"


def test_a_model_without_roles_is_told_by_the_names_of_its_modules():
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 6)}), "b": nn.ModuleDict({"q": nn.Linear(4, 6), "k": nn.Linear(4, 4)})})
    lora(r=2, targets=["q", "k"]).apply(model)
    assert breakdown(model) == "adapter: 56 parameters: lora_A 24, lora_B 32; q 40, k 16"
