"""A model small enough to reason about, with one parameter of each treatment, and the options of the shipped YAML files."""

from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

CONF = Path(__file__).parents[3] / "conf" / "optimizer"


def options(name: str) -> dict:
    """The arguments that conf/optimizer/<name>.yaml gives."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if not key.startswith("_")}


ADAMW, MUON = options("adamw"), options("muon")


class TinyModel(nn.Module):
    """Width 8, vocabulary 10, tied head, fused q (8 rows), k and v (4 each), and a vector and a matrix that are no projections."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.mixer = nn.ModuleDict({"qkv_proj": nn.Linear(8, 16, bias=False), "o_proj": nn.Linear(8, 8, bias=False)})
        self.A_log = nn.Parameter(torch.empty(8, 3))
        self.norm = nn.LayerNorm(8, bias=False)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        for p in self.parameters():
            p.data.normal_(generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, T). Returns logits (B, T, 10)."""
        x = self.embed(ids)
        q, k, v = self.mixer["qkv_proj"](x).split([8, 4, 4], dim=-1)
        x = x + self.mixer["o_proj"](q.tanh() * torch.cat([k, v], dim=-1) * self.A_log.sum(1))
        return self.head(self.norm(x))

    def roles(self) -> dict[str, str]:
        return {
            "embed.weight": "embedding",
            "mixer.qkv_proj.weight": "qkv",
            "mixer.o_proj.weight": "o",
            "A_log": "ssm",
            "norm.weight": "norm",
        }

    def fused_splits(self) -> dict[str, list[int]]:
        return {"mixer.qkv_proj.weight": [8, 4, 4]}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[float]:
    """Some steps on fixed random tokens. Returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = torch.randint(10, (2, 6), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
