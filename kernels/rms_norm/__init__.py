"""Root-mean-square normalisation (arXiv 1910.07467, eq. 4)."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import expect_dims, expect_shape
from kernels.dispatch import pick

__all__ = ["rms_norm"]


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
