"""Small mixtures of LoRAs for the tests of adapter=moe_lora."""

import torch
from torch import nn

from components.adapters.base import task_ids
from components.adapters.moe_lora import MoELoRA
from tests.components.adapters.helpers import Toy, awaken

VISION, SPEECH = {"r": 2, "alpha": 4, "dropout": 0.0}, {"r": 3, "alpha": 3, "dropout": 0.0}
RULES = {"text": None, "vision": "vision", "speech": "speech", "vision_speech": "vision"}
LEARNED = {
    "router": "token", "r": 4, "alpha": 6, "dropout": 0.0, "num_experts": 2, "embedding_dim": 3, "top_k": None, "aux": {},
    "experts": {}, "rules": {}, "train": None, "tasks": None, "targets": "role:qkv,o,gate_up,down", "exclude": None,
}  # fmt: skip
TASKS = ["sort", "add", "copy"]


def moe(router="token", **changes) -> MoELoRA:
    of_router = {"modality": {"experts": {"vision": VISION, "speech": SPEECH}, "rules": RULES}, "task": {"tasks": TASKS}, "token": {}}
    return MoELoRA(**{**LEARNED, "router": router, **of_router.get(router, {}), **changes})


def adapted(router="token", model=None, **changes):
    model = model or Toy()
    adapter = moe(router, **changes)
    adapter.apply(model)
    return adapter, model


def layer(router="token", dtype=torch.float64, inside=5, out=7, **changes):
    """One wrapped projection with awakened experts, and the model that it is alone in."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"w": nn.Linear(inside, out).to(dtype)})
    adapted(router, model, targets=["w"], **changes)
    awaken(model)
    return model["w"], model


def set_ids(model, *values):
    task_ids(model).set(torch.tensor(values))


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()
