"""Root-mean-square normalisation (arXiv 1910.07467, eq. 4), alone and behind the sum of a pre-norm residual block."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import expect_dims, expect_shape
from kernels.dispatch import pick

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics and product in float32 (float64), result in x's dtype.

    Args: x (..., D). weight (D,). Raises: ValueError for shapes that do not fit.

    >>> import torch
    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
    tensor([0.8485, 1.1314])
    """
    expect_dims("rms_norm", "weight", weight, 1, "(D,)")
    expect_shape("rms_norm", "weight", weight, *x.shape[-1:], letters="(D,)")
    return pick("rms_norm", x.device).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """new_residual = residual + x, and rms_norm(new_residual, weight, eps), in one pass over memory where a fused kernel serves.

    Both results are differentiable and have the dtype that torch gives residual + x: float32 for a float32 stream and a bfloat16
    branch. They are the numbers of the two separate steps, since the sum is rounded to that dtype before it is normalised.

    Args: x, residual (..., D), one shape; x is the output of a branch. weight (D,).
    Returns: (normed, new_residual), (..., D). Raises: ValueError for shapes that do not fit.

    >>> import torch
    >>> add_rms_norm(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.ones(2), eps=0.0)
    (tensor([0.8485, 1.1314]), tensor([3., 4.]))
    """
    expect_dims("add_rms_norm", "weight", weight, 1, "(D,)")
    expect_shape("add_rms_norm", "weight", weight, *x.shape[-1:], letters="(D,)")
    expect_shape("add_rms_norm", "residual", residual, *x.shape, letters="x's shape")
    return pick("rms_norm", x.device).add_rms_norm(x, residual, weight, eps)
