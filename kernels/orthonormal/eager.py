"""Batched orthonormal bases in torch: Householder QR, or two rounds of Cholesky QR with a check.

Cholesky QR (Y = Q R with Y'Y = R'R) is matrix products and r x r factorisations, but loses the square of the condition number; a second
round (CholeskyQR2, Yamamoto et al. 2015) repairs what the first one left, up to a condition near 1 / sqrt(eps). A matrix that fails the
check is done again by QR, so that the method changes the time only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Added to the diagonal of the first Gram matrix, over its largest entry: near the rounding of that entry, so that a matrix at the limit
# has a factor at all, and the second round mends the loss.
JITTER = {torch.float32: 1e-7, torch.float64: 1e-16}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}  # of max |Q'Q - I|


def orthonormal(x: Tensor, method: str) -> Tensor:
    """See `kernels.orthonormal.orthonormal`. x: (..., n, r), r <= n, float32 or float64."""
    if method == "auto":  # on one CPU thread qr takes half the time or less: 8 x 768 x 64 3.6 ms against 7.0, 4 x 256 x 16 0.1 against 0.4
        method = "cholesky" if x.is_cuda else "qr"
    if x.numel() == 0 or method == "qr":
        return torch.linalg.qr(x)[0]
    if torch.compiler.is_compiling():  # which matrices fall back is known only when they are there
        return torch.compiler.disable(_checked)(x)
    return _checked(x)


def _checked(x: Tensor) -> Tensor:
    flat = x.reshape(-1, *x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False), full_float32(x.device):
        q, good = cholesky_qr2(flat)
        if not good.all():  # the one wait for the device
            bad = (~good).nonzero()[:, 0]
            q[bad] = torch.linalg.qr(flat[bad])[0]
    return q.reshape(x.shape)


def cholesky_qr2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q (batch, n, r) for x (batch, n, r), and (batch,) bool: whether it can be used. Where not, Q holds anything."""
    q = unit_columns(x)
    good = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for jitter in (JITTER[x.dtype], 0.0):
        gram = q.mT @ q  # (batch, r, r)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += jitter * diagonal.amax(-1, keepdim=True)
        lower, info = torch.linalg.cholesky_ex(gram)
        good &= info == 0
        q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)  # Q R = Y
    error = q.mT @ q - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return q, good & (error.abs().amax((-2, -1)) <= TOLERANCE[x.dtype])  # NaN is not below


def unit_columns(x: Tensor) -> Tensor:
    """x with columns of norm 1, or 0, and the same span: the jitter is then as small beside every column, and squares neither overflow nor
    vanish. A zero column stays; it fails the check."""
    tiny = torch.finfo(x.dtype).tiny
    # by the largest entry first, whose square may be beyond the dtype
    x = x / x.abs().amax(-2, keepdim=True).clamp_(min=tiny)
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_(min=tiny)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No TF32 (CUDA) or bfloat16 (CPU) inside float32 products, whatever the process allows: with 3 digits, Q would fail the check."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
