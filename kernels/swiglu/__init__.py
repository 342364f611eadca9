"""SwiGLU's elementwise half (arXiv 2002.05202, eq. 6)."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import expect_shape
from kernels.dispatch import pick

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. gate, up: (..., F), one dtype. Raises: ValueError when their shapes differ.

    >>> import torch
    >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    expect_shape("swiglu", "up", up, *gate.shape, letters="gate's shape")
    return pick("swiglu", gate.device).swiglu(gate, up)
