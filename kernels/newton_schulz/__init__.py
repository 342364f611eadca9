"""Newton-Schulz orthogonalisation (Muon: K. Jordan 2024; coefficients of the quintic chosen for slope at zero)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import pick
from kernels.newton_schulz.eager import GRAM_DTYPES, GRAM_STEPS

__all__ = ["GRAM_STEPS", "gram_factor", "newton_schulz"]

FORMS = ("auto", "direct", "gram")


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    form: str = "auto",
) -> Tensor:
    """Replace the singular values of every matrix by values near 1 (about 0.7 to 1.2 after 5 steps), keeping its singular vectors.

    x: (..., m, n) floating; a stack is one batched call, and each matrix's result does not depend on its neighbours.
    dtype: arithmetic of the iteration; None takes bfloat16 where the hardware multiplies it natively, else float32 (float64 for float64 x).
    form: `direct` iterates on x; `gram` on the Gram matrix of its short side, in float32 or float64: the same function, cheaper where the
        long side is above 1.5 times the short one, and in float32 up to 3e-4 away from it (direct: 1e-6 to 6e-5). It needs products in
        full float32, not TF32. `auto` is the cheaper one of those that are accurate; direct in bfloat16.
    Returns the shape and dtype of x; a zero matrix stays zero. Not differentiable by design (optimizers call it under no_grad).
    Raises ValueError for fewer than two dimensions, a non-floating dtype, negative steps, an unknown form, or gram in bfloat16 or float16.

    >>> newton_schulz(torch.diag(torch.tensor([2.0, 0.5])), dtype=torch.float32).diagonal().round(decimals=2)
    tensor([0.7400, 0.7400])
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"newton_schulz: x is {x.dtype} of shape {tuple(x.shape)}; it needs floating matrices (..., m, n)")
    if steps < 0 or len(coefficients) != 3:
        raise ValueError(f"newton_schulz: steps={steps}, coefficients={tuple(coefficients)}; needs steps >= 0 and three coefficients")
    if form not in FORMS:
        raise ValueError(f"newton_schulz: form is {form!r}; allowed are {', '.join(FORMS)}")
    return pick("newton_schulz", x.device).newton_schulz(x, steps, coefficients, eps, dtype, form)


def gram_factor(gram: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)) -> Tensor:
    """The matrix P that Newton-Schulz multiplies X by, from a Gram matrix of X alone: where X is sharded, only the Gram matrix travels.

    gram: (..., s, s) float32 or float64, symmetric, of an X with |X|_F <= 1: for X X' the result is P X, for X' X it is X P. Either side
        will do; that of the longer one is singular, and rounding then shows as it does at low rank (1e-4 in float32, not 1e-6).
    steps: at most GRAM_STEPS; the rounding errors grow 12-fold a step. For more, apply P, take a new Gram matrix, and go on.
    Returns P: (..., s, s), symmetric up to rounding, in gram's dtype. Raises ValueError for other shapes, dtypes or steps.

    >>> x = torch.tensor([[0.8], [0.6]])
    >>> torch.allclose(x @ gram_factor(x.mT @ x), newton_schulz(x, dtype=torch.float32), atol=1e-5)
    True
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.dtype not in GRAM_DTYPES:
        raise ValueError(
            f"gram_factor: gram is {gram.dtype} of shape {tuple(gram.shape)}; it needs float32 or float64 matrices (..., s, s)"
        )
    if not 0 <= steps <= GRAM_STEPS or len(coefficients) != 3:
        raise ValueError(f"gram_factor: steps={steps}, coefficients={tuple(coefficients)}; needs 0..{GRAM_STEPS} steps, three coefficients")
    return pick("newton_schulz", gram.device).gram_factor(gram, steps, coefficients)
