"""Cross-entropy of a linear head without the (M, V) logits in memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.checks import expect_dims, expect_shape
from kernels.dispatch import pick

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: Literal["sum", "none"] = "sum",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Negative log-likelihood of `labels` under softmax(hidden @ weight.T), a chunk of tokens at a time.

    The matmuls run in the autocast dtype when autocast is on, else in the inputs' common dtype; softmax and loss in float32 (float64); the
    weight's gradient is accumulated in float32. Rows with an ignored label cost nothing, and no valid row gives 0.

    Args:
        hidden: (M, D). weight: (V, D). labels: (M,) int64, `ignore_index` where a row does not count.
        reduction: "sum" gives a scalar, differentiable in hidden and weight; "none" the (M,) values without gradient, 0 where ignored.
        chunk_tokens: rows of logits at a time; None chooses about 2^20 logits.

    Raises: ValueError for shapes, dtypes or a reduction that do not fit, and for "none" where a gradient is asked for.

    >>> loss = linear_cross_entropy(torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([0, 3, -100]))
    >>> round(loss.item(), 4)  # 2 ln 4
    2.7726
    """
    op = "linear_cross_entropy"
    expect_dims(op, "weight", weight, 2, "(V, D)")
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: hidden has shape {tuple(hidden.shape)}; expected (M, D) = (M, {weight.shape[1]})")
    expect_shape(op, "labels", labels, hidden.shape[0], letters="(M,)")
    if labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels is {labels.dtype}; expected torch.int64")
    if reduction not in ("sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}; allowed are 'sum' and 'none'")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{op}: chunk_tokens is {chunk_tokens}; expected at least 1")
    if reduction == "none" and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise ValueError(f"{op}: reduction='none' has no gradient; call it under torch.no_grad() or use 'sum'")
    return pick("cross_entropy", hidden.device).linear_cross_entropy(hidden, weight, labels, ignore_index, reduction, chunk_tokens)
