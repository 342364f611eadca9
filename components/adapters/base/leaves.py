"""Modules that can be wrapped, and how their weights lie: the one place that knows nn.Linear from its relatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PROBES = 1024  # unit vectors at a time, so that no (in, in) matrix is made for a wide layer


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


def is_quantised(module: nn.Module) -> bool:
    """Whether its weight is kept in fewer bits than it computes with: integers, packed bits, float8, or a tensor type of such a library."""
    weight: Any = module.weight
    return not weight.is_floating_point() or weight.element_size() == 1 or type(weight).dequantize is not Tensor.dequantize


@torch.no_grad()
def applied_weight(module: Any) -> Tensor:
    """What a quantised module multiplies by, (out, in) in the dtype of its answers: read off its answers to unit vectors.

    So it holds for whatever way of packing, and needs no library: bitsandbytes, torchao, or another module with in_features and
    out_features. While it is asked the bias is left out, and it is in training, where no library takes a coarser kernel for inference.
    """
    weight, size, training = module.weight, module.in_features, module.training
    dtype = weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else torch.float32
    bias = getattr(module, "bias", None)
    answers = []
    try:
        module.train()
        if bias is not None:
            module.bias = None
        for start in range(0, size, _PROBES):
            probes = torch.zeros(min(_PROBES, size - start), size, device=weight.device, dtype=dtype)
            probes.diagonal(start).fill_(1)
            answers.append(module(probes))
    finally:
        module.train(training)
        if bias is not None:
            module.bias = bias
    return torch.cat(answers).T
