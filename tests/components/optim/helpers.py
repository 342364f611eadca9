"""A model small enough to reason about, with one parameter of each treatment, and the options of the shipped YAML files."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from components.contracts import NamedParameter
from components.optim.cosmos import Cosmos

CONF = Path(__file__).parents[3] / "conf" / "optimizer"


def options(name: str) -> dict:
    """The arguments that conf/optimizer/<name>.yaml gives."""
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    return {key: value for key, value in values.items() if not key.startswith("_")}


ADAMW, MUON, COSMOS, SOAP = options("adamw"), options("muon"), options("cosmos"), options("soap")


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


def gradients(m: int, n: int, steps: int, seed: int = 0, noise: float = 0.3, ratio: float = 0.8) -> list[Tensor]:
    """Of singular values about ratio^i, drifting over the steps, under noise of that size in every direction."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, min(m, n), generator=generator, dtype=torch.float64)
    right = torch.randn(min(m, n), n, generator=generator, dtype=torch.float64)
    size = ratio ** torch.arange(min(m, n), dtype=torch.float64)
    extras = [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(left * (1 + 0.1 * i) * size) @ right + noise * extra for i, extra in enumerate(extras)]


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


EXACT = {**COSMOS, "weight_decay": 0.0, "ns_dtype": "float64", "betas": [0.9, 0.95]}


def parameter(m: int, n: int, dtype=torch.float64, splits=()) -> NamedParameter:
    return NamedParameter("w", nn.Parameter(torch.zeros(m, n, dtype=dtype)), "o", tuple(splits))


def updates(grads: list[torch.Tensor], dtype=torch.float64, splits=(), **changes) -> list[torch.Tensor]:
    """What each step subtracts from the parameter, per unit of eta, in float64."""
    item = parameter(*grads[0].shape, dtype=dtype, splits=splits)
    optimizer = Cosmos([item], **{**EXACT, **changes})
    eta, found = optimizer.param_groups[0]["lr"], []
    for grad in grads:
        item.parameter.data.zero_()
        item.parameter.grad = grad.to(dtype)
        optimizer.step()
        found.append(-item.parameter.detach().double() / eta)
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def check_gradients_that_are_not_finite(make: Callable[..., torch.optim.Optimizer], bad: float) -> None:
    """Such a gradient touches neither its parameter nor its state, others are stepped; with nonfinite=raise nothing is.

    make: called with the parameters and changes of the options.
    """
    pair = [parameter(24, 16), NamedParameter("other", nn.Parameter(torch.zeros(24, 16, dtype=torch.float64)), "o")]
    for item, grad in zip(pair, gradients(24, 16, 2), strict=True):
        item.parameter.grad = grad.clone()
    optimizer = make(pair)
    optimizer.step()
    before, weights = copy.deepcopy(optimizer.state_dict()["state"]), [item.parameter.detach().clone() for item in pair]
    pair[0].parameter.grad[3, 2] = bad
    with pytest.warns(RuntimeWarning, match="gradient of w;"):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert torch.equal(pair[0].parameter, weights[0]) and not torch.equal(pair[1].parameter, weights[1])
    strict = make(pair, nonfinite="raise")
    with pytest.raises(FloatingPointError, match="gradient of w; nothing was changed"):
        strict.step()
    assert not strict.state_dict()["state"]


def common_mistakes(kind: str) -> list[tuple[dict, str]]:
    """(options, words of the error) that all optimizers of matrices refuse."""
    return [
        ({"lr": -1.0}, "optimizer.lr: -1.0"),
        ({"betas": [1.0, 0.95]}, r"optimizer.betas: \[1.0, 0.95\]"),
        ({"nonfinite": "ignore"}, "optimizer.nonfinite: ignore; allowed: skip, raise"),
        ({"overrides": {"w": {"kind": "other"}}}, f"this optimizer has {kind}, adamw"),
        ({"overrides": {"v": {"lr": 1.0}}}, "'v' matches no trainable parameter"),
    ]
