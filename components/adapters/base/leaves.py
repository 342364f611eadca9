"""Modules that can be wrapped, and how their weights lie: the one place that knows nn.Linear from its relatives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Leaf(NamedTuple):
    """in_features, out_features: of the linear map. transposed: the weight is (in, out) instead of (out, in)."""

    in_features: int
    out_features: int
    transposed: bool


def leaf_of(module: nn.Module) -> Leaf | None:
    """What linear map a module is, None for one that cannot be wrapped.

    nn.Linear; Conv1D of transformers (GPT-2), whose weight is (in, out); nn.Embedding, linear in one-hot rows, with a weight (in, out) too;
    and anything with weight, in_features and out_features, as quantised layers are built. An embedding of another type (one that scales
    its rows), or with max_norm (which changes its weight), is none.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if is_embedding(module) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight.dim() == 2):
        return Leaf(weight.shape[0], weight.shape[1], transposed=True)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return Leaf(module.in_features, module.out_features, transposed=False)  # type: ignore[arg-type]
    return None


def is_embedding(module: nn.Module) -> bool:
    """Whether it is an nn.Embedding that can be wrapped."""
    return type(module) is nn.Embedding and module.max_norm is None
