"""Newton-Schulz orthogonalisation (Muon: K. Jordan 2024; coefficients of the quintic chosen for slope at zero)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import pick

__all__ = ["newton_schulz"]


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Replace the singular values of every matrix by values near 1 (about 0.7 to 1.2 after 5 steps), keeping its singular vectors.

    x: (..., m, n) floating; a stack is one batched call, and each matrix's result does not depend on its neighbours.
    dtype: arithmetic of the iteration; None takes bfloat16 where the hardware multiplies it natively, else float32 (float64 for float64 x).
    Returns the shape and dtype of x; a zero matrix stays zero. Not differentiable by design (optimizers call it under no_grad).
    Raises ValueError for fewer than two dimensions, a non-floating dtype or negative steps.

    >>> newton_schulz(torch.diag(torch.tensor([2.0, 0.5])), dtype=torch.float32).diagonal().round(decimals=2)
    tensor([0.7400, 0.7400])
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"newton_schulz: x is {x.dtype} of shape {tuple(x.shape)}; it needs floating matrices (..., m, n)")
    if steps < 0 or len(coefficients) != 3:
        raise ValueError(f"newton_schulz: steps={steps}, coefficients={tuple(coefficients)}; needs steps >= 0 and three coefficients")
    return pick("newton_schulz", x.device).newton_schulz(x, steps, coefficients, eps, dtype)
