"""A small network with every kind of module that target selection must tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.adapters.dora import DoRA
from components.adapters.lora import LoRA
from components.adapters.mtl_lora import MTLLoRA

DEFAULTS = {"r": 2, "alpha": 6, "dropout": 0.0, "targets": "role:qkv,o,gate_up,down", "exclude": None, "use_rslora": False}
DEFAULTS |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "train_bias": "none"}
MTL_DEFAULTS = {"n_up": 3, "tau": 0.5, "lambda_type": "full", "w_init": "uniform", "tasks": ["a", "b", "c"], "split_fused": True}


def lora(**changes) -> LoRA:
    return LoRA(**{**DEFAULTS, "match_parameters": None, **changes})


def dora(**changes) -> DoRA:
    return DoRA(**{**DEFAULTS, "match_parameters": None, **changes})


def mtl_lora(**changes) -> MTLLoRA:
    return MTLLoRA(**{**DEFAULTS, **MTL_DEFAULTS, **changes})


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


class Block(nn.Module):
    """A toy mixer and MLP with biases on some projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv_proj = nn.Linear(8, 24)
        self.o_proj = nn.Linear(8, 8, bias=False)
        self.gate_up_proj = nn.Linear(8, 32, bias=False)
        self.down_proj = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(self.norm(x)).chunk(3, dim=-1)
        x = x + self.o_proj(q.sigmoid() * k.tanh() + v)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return x + self.down_proj(gate.sigmoid() * up)


class Toy(nn.Module):
    """Embedding, two blocks, untied or tied head; roles as a model of the contract gives them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpointing = False

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, T). Returns (B, T, 11)."""
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)

    def roles(self) -> dict[str, str]:
        by_part = {"embed": "embedding", "head": "head", "norm": "norm", "qkv_proj": "qkv", "o_proj": "o"}
        by_part |= {"gate_up_proj": "gate_up", "down_proj": "down"}
        return {name: by_part[name.split(".")[-2]] for name, _ in self.named_parameters()}

    def fused_splits(self) -> dict[str, list[int]]:
        rows = {"qkv_proj": [8, 8, 8], "gate_up_proj": [16, 16]}
        return {f"blocks.{i}.{name}.weight": sizes for i in (0, 1) for name, sizes in rows.items()}


def awaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every B a value, and move what else starts as an identity, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3, generator=generator)
        elif "lora_lambdas" in name or "lora_magnitude" in name:
            p.data += 0.3 * torch.empty_like(p).normal_(generator=generator)
    return model


def ids() -> Tensor:
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
