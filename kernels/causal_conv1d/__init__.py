"""Depthwise causal convolution over time, the short convolution of Mamba-1 (arXiv 2312.00752, fig. 3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kernels.checks import expect_bool, expect_dims, expect_like, expect_shape
from kernels.dispatch import pick

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_k weight[:, k] x_{t-W+1+k}): the last tap multiplies the current position. Arithmetic is float32 (float64).

    Args:
        x: (B, L, D). weight: (D, W). bias: (D,).
        activation: "silu" or None.
        initial_state: (B, W-1, D) inputs before x, oldest first; zeros when None.
        document_start: (B, L) bool; taps never reach back over a True position.

    Returns: y (B, L, D) and the state to go on with, (B, W-1, D): the last W-1 inputs (before the convolution), zero where they belong
    to an earlier document than the last position. Both in x's dtype; both differentiable.
    Raises: ValueError for a shape, dtype or activation that does not fit.

    >>> import torch
    >>> y, state = causal_conv1d(torch.ones(1, 3, 1), torch.tensor([[1.0, 10.0]]))
    >>> y.flatten().tolist(), state.flatten().tolist()
    ([10.0, 11.0, 11.0], [1.0])
    """
    op = "causal_conv1d"
    expect_dims(op, "x", x, 3, "(B, L, D)")
    expect_dims(op, "weight", weight, 2, "(D, W)")
    batch, length, dim = x.shape
    width = weight.shape[1]
    expect_shape(op, "weight", weight, dim, width, letters="(D, W)")
    expect_shape(op, "bias", bias, dim, letters="(D,)")
    expect_shape(op, "initial_state", initial_state, batch, width - 1, dim, letters="(B, W-1, D)")
    expect_shape(op, "document_start", document_start, batch, length, letters="(B, L)")
    expect_bool(op, "document_start", document_start)
    expect_like(op, x, weight=weight, bias=bias, initial_state=initial_state)
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}; allowed are 'silu' and None")
    return pick(op, x.device).causal_conv1d(x, weight, bias, activation, initial_state, document_start)
