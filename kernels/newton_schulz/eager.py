"""Batched Newton-Schulz in torch: one bmm chain for a whole stack of equal matrices.

Two forms of one function. Direct: the iteration itself, on X (s, l). Gram: every iterate is a polynomial of XX' times X, so the iteration
runs on the s x s Gram matrix and on the factor P, and X is multiplied once. Products s x s are symmetric, see `Product`.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

GRAM_DTYPES = (torch.float32, torch.float64)
# A rounding error of the Gram matrix grows by a^2 = 11.9 an iteration where it is singular. Relative error against float64 in float32, the
# worst of 7 spectra (random, geometric over 1e3..1e6, rank 1 and 8): 5 steps 3e-4, 6 steps 3e-3, 8 steps 4e-1, 10 steps overflow.
GRAM_STEPS = 5


class Product(Protocol):
    """alpha * left @ right + beta * add for stacks (batch, s, k), (batch, k, s), (batch, s, s), where the result is symmetric."""

    def __call__(self, left: Tensor, right: Tensor, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor: ...


def full_product(left: Tensor, right: Tensor, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """The `Product` of torch, which computes both halves. Without `add` alpha is 1."""
    return torch.bmm(left, right) if add is None else torch.baddbmm(add, left, right, beta=beta, alpha=alpha)


@functools.cache
def fast_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where its matrix product is a hardware instruction, else float32.

    The iteration forgives rounding, and bf16 halves its time on a core with AVX512-BF16 (117 ms against 265 ms a step on 3.1M weights).
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device_type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def work_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The arithmetic of the iteration on x when the caller asked for `dtype`."""
    return dtype or (torch.float64 if x.dtype == torch.float64 else fast_dtype(x.device.type))


def newton_schulz(
    x: Tensor,
    steps: int,
    coefficients: tuple[float, float, float],
    eps: float,
    dtype: torch.dtype | None = None,
    form: str = "auto",
    product: Product = full_product,
) -> Tensor:
    """See `kernels.newton_schulz.newton_schulz`. x: (..., m, n) floating. Works on the side with fewer rows; norms in float32 or better."""
    work = work_dtype(x, dtype)
    if form == "gram" and work not in GRAM_DTYPES:
        raise ValueError(f"newton_schulz: form=gram in {work} loses orthogonality; pass dtype=torch.float32 or float64, or form=direct")
    if x.numel() == 0:
        return x.clone()
    m, n = x.shape[-2:]
    y = x.reshape(-1, m, n)
    y = y.mT if m > n else y  # (batch, s, l), s <= l
    if form == "auto":
        form = _faster_form(y, work, product)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp_(min=eps)
    y = torch.div(
        wide, norm, out=torch.empty(wide.shape, dtype=work, device=wide.device)
    )  # divided in float32, rounded once, without a copy between
    with torch.autocast(x.device.type, enabled=False):
        y = _gram(y, steps, coefficients, product) if form == "gram" else _direct(y, steps, coefficients, product)
    y = y.mT if m > n else y
    return y.to(x.dtype, memory_format=torch.contiguous_format).contiguous().reshape(x.shape)


def gram_factor(gram: Tensor, steps: int, coefficients: tuple[float, float, float], product: Product = full_product) -> Tensor:
    """See `kernels.newton_schulz.gram_factor`. gram: (..., s, s), symmetric."""
    with torch.autocast(gram.device.type, enabled=False):
        return _factor(gram.reshape(-1, *gram.shape[-2:]), steps, coefficients, product).reshape(gram.shape)


def _faster_form(y: Tensor, work: torch.dtype, product: Product) -> str:
    """The form that costs less for y (batch, s, l) among those that keep its accuracy.

    k steps cost k (4 s^2 l + 2 s^3) FLOP directly and 4 s^2 l + (8k - 6) s^3 over the Gram matrix: equal at l = 1.5 s for every k > 1. CPU
    time direct / Gram of 5 steps on one thread of an AVX512 core, float32, s x l: 256 x 256 0.77, 256 x 384 1.00, 256 x 768 1.50,
    768 x 768 0.79, 768 x 1536 1.21, 768 x 3072 1.84; float64 within 0.15 of these. Not measured on a GPU.
    """
    s, length = y.shape[-2:]
    if work not in GRAM_DTYPES or 2 * length <= 3 * s:
        return "direct"
    narrow = work == torch.float32 and product is full_product and not _full_float32(y.device)  # TF32 has the trouble of bfloat16
    return "direct" if narrow else "gram"


def _full_float32(device: torch.device) -> bool:
    """Whether torch multiplies float32 matrices in float32 there, as the process has set it."""
    if torch.compiler.is_compiling():  # this question alone is traced and guarded; any other breaks the graph
        return not torch._C._get_cublas_allow_tf32()  # set_float32_matmul_precision sets it on a machine without CUDA too
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("ieee", "none")


def _direct(y: Tensor, steps: int, coefficients: tuple[float, float, float], product: Product) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = product(y, y.mT)  # (batch, s, s)
        polynomial = product(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return y


def _gram(y: Tensor, steps: int, coefficients: tuple[float, float, float], product: Product) -> Tensor:
    while steps > 0:  # a new Gram matrix before the error of the old one has grown
        some = min(steps, GRAM_STEPS)
        y = torch.bmm(_factor(product(y, y.mT), some, coefficients, product), y)
        steps -= some
    return y


def _factor(gram: Tensor, steps: int, coefficients: tuple[float, float, float], product: Product) -> Tensor:
    """P (batch, s, s) with P X = the result of `steps` iterations on X, from XX'. All here are polynomials of one matrix: they commute."""
    a, b, c = coefficients
    factor = torch.zeros_like(gram)
    factor.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    for step in range(steps):
        polynomial = product(gram, gram, gram, beta=b, alpha=c)  # Q - aI; the identity stays apart, as its rounding would be the largest
        if step == 0:
            factor = polynomial.clone()
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            factor = product(polynomial, factor, factor, beta=a)
        if step < steps - 1:
            half = product(polynomial, gram, gram, beta=a)  # QG
            gram = product(polynomial, half, half, beta=a)  # QGQ, the next X times its transpose
    return factor
