"""Specification of the Newton-Schulz orthogonalisation: one matrix at a time, in the dtype that it is given (float64 capable)."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(
    x: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float, dtype: torch.dtype | None = None, form: str = "auto"
) -> Tensor:
    """Orthogonalise each matrix of x (..., m, n): X <- aX + (b XX' + c (XX')^2) X, `steps` times, from X / max(|X|_F, eps).

    dtype: of the arithmetic; None keeps that of x. form is a matter of cost, and not looked at. Written on the m side whatever the shape:
    (XX')X == X(X'X), so the orientation changes cost and rounding only. Same shape and dtype out.
    """
    a, b, c = coefficients
    out = []
    for matrix in x.to(dtype or x.dtype).reshape(-1, *x.shape[-2:]):
        y = matrix / torch.linalg.norm(matrix).clamp(min=eps)  # (m, n)
        for _ in range(steps):
            gram = y @ y.T  # (m, m)
            y = a * y + (b * gram + c * gram @ gram) @ y
        out.append(y)
    return torch.stack(out).reshape(x.shape).to(x.dtype) if out else x.clone()


def gram_factor(gram: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """The factor of each gram (..., s, s), by what it does to an eigenvalue t = v^2: v becomes (a + bt + ct^2) v, so t gets its square."""
    a, b, c = coefficients
    out = []
    for matrix in gram.reshape(-1, *gram.shape[-2:]):
        values, vectors = torch.linalg.eigh(matrix)
        factor = torch.ones_like(values)
        for _ in range(steps):
            polynomial = a + b * values + c * values**2
            factor, values = factor * polynomial, values * polynomial**2
        out.append(vectors * factor @ vectors.T)
    return torch.stack(out).reshape(gram.shape) if out else gram.clone()
