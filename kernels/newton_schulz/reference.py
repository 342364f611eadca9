"""Specification of the Newton-Schulz orthogonalisation: one matrix at a time, in the dtype that it is given (float64 capable)."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz_reference(
    x: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315), eps: float = 1e-7
) -> Tensor:
    """Orthogonalise each matrix of x (..., m, n): X <- aX + (b XX' + c (XX')^2) X, `steps` times, from X / max(|X|_F, eps).

    Written on the m side whatever the shape: (XX')X == X(X'X), so the orientation changes cost and rounding only. Same shape and dtype out.
    """
    a, b, c = coefficients
    out = []
    for matrix in x.reshape(-1, *x.shape[-2:]):
        y = matrix / torch.linalg.norm(matrix).clamp(min=eps)  # (m, n)
        for _ in range(steps):
            gram = y @ y.T  # (m, m)
            y = a * y + (b * gram + c * gram @ gram) @ y
        out.append(y)
    return torch.stack(out).reshape(x.shape) if out else x.clone()
