"""adapter.dtype: parameters of the adapter narrower or wider than the base, and what stays float32 all the same."""

from functools import partial

import pytest
import torch

from components.adapters.base import adapter_state, merge, task_ids, unmerge
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, dora, ids, lora, mtl_lora, relative
from tests.components.adapters.moe_helpers import moe

MAKERS = {
    "lora": lora,
    "dora": dora,
    "mtl_lora": mtl_lora,
    **{f"moe_{router}": partial(moe, router) for router in ("modality", "task", "token")},
}
NAMES = sorted(MAKERS)


def adapted(name, base=torch.float32, **changes):
    adapter, model = MAKERS[name](**changes), Toy().to(base)
    torch.manual_seed(3)
    adapter.apply(model)
    if task_ids(model).names:
        task_ids(model).set(1)
    return adapter, model


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_dtype_and_the_start_is_the_base(name, dtype, base):
    _, model = adapted(name, base, dtype=dtype)
    kinds = {key.rpartition(".")[2]: p.dtype for key, p in adapter_state(model).items()}
    lengths = kinds.pop("lora_magnitude_vector", torch.float32)
    assert set(kinds.values()) == {getattr(torch, dtype)} and lengths == torch.float32
    out = model(ids())
    assert torch.equal(out, Toy().to(base)(ids())) and out.dtype == base


@pytest.mark.parametrize("name", NAMES)
def test_null_is_float32_or_the_wider_base(name):
    for base, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert {p.dtype for p in adapter_state(adapted(name, base)[1]).values()} == {expected}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_computes_what_its_rounded_numbers_mean(name):
    """Beside the same numbers kept in float32, to the 8 bits of its products; gradients too, in its own dtype."""
    _, narrow = adapted(name, dtype="bfloat16")
    _, exact = adapted(name)
    awaken(narrow).eval()
    exact.load_state_dict(narrow.state_dict())
    exact.eval()
    base = Toy()(ids())
    found = []
    for model in (narrow, exact):
        out = model(ids())
        out.square().sum().backward()
        found.append((out - base, {key: p.grad for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}))
    (ours, gradients), (theirs, others) = found
    assert relative(ours, theirs) < 3e-2 and relative(ours, theirs) > 0 and gradients.keys() == others.keys()
    assert all(g.dtype == dict(narrow.named_parameters())[key].dtype for key, g in gradients.items())
    total = [torch.cat([g.float().flatten() for g in grads.values()]) for grads in (gradients, others)]
    assert relative(*total) < 3e-2


@pytest.mark.parametrize("name", [name for name in NAMES if name != "moe_token"])
def test_the_merged_weight_is_computed_in_float32(name):
    """The same as that of the float32 twin with the same numbers, bit for bit, and unmerged to the bit."""
    _, narrow = adapted(name, dtype="bfloat16")
    _, exact = adapted(name)
    exact.load_state_dict(awaken(narrow).state_dict())
    before = {key: value.clone() for key, value in narrow.state_dict().items()}
    for model in (narrow, exact):
        merge(model.eval(), 1 if task_ids(model).names else None)
    weight = "blocks.0.o_proj.base_layer.weight"
    assert torch.equal(narrow.state_dict()[weight], exact.state_dict()[weight]) and not torch.equal(
        before[weight], exact.state_dict()[weight]
    )
    unmerge(narrow)
    assert all(torch.equal(value, before[key]) for key, value in narrow.state_dict().items())


def test_dora_turns_the_base_s_part_in_float32():
    """With dropout the base's second pass reads the dropped input, which an adapter in bfloat16 must not round."""
    _, model = adapted("dora", dtype="bfloat16", dropout=0.5)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "magnitude" in key:
                p *= 2
    layer, x = model.blocks[0].o_proj.train(), torch.randn(4, 8)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = layer.dropout(x)
    assert relative(found, layer.base_layer(x) + layer.base_layer(dropped)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_keeps_the_dtype_s_numbers(name, tmp_path):
    adapter, model = adapted(name, dtype="bfloat16")
    adapter.save(awaken(model), tmp_path)
    again, other = adapted(name, dtype="bfloat16")
    again.load(other, tmp_path)
    assert all(torch.equal(p, adapter_state(model)[key]) for key, p in adapter_state(other).items())


def test_peft_reads_a_folder_in_bfloat16(tmp_path):
    peft = pytest.importorskip("peft")
    adapter, model = adapted("lora", dtype="bfloat16")
    adapter.save(awaken(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Toy(), tmp_path).eval()
    assert relative(theirs(ids()), model.eval()(ids())) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_another_dtype_is_refused(name):
    with pytest.raises(UserError) as caught:
        MAKERS[name](dtype="bf16")
    assert str(caught.value) == "adapter.dtype: 'bf16'; allowed are null, float32, bfloat16, float16, float64"
