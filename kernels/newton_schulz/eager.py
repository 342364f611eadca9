"""Batched Newton-Schulz in torch: one bmm chain for a whole stack of equal matrices."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


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


def newton_schulz(x: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """See `kernels.newton_schulz.newton_schulz`. x: (..., m, n) floating. Works on the side with fewer rows; norms in float32 or better."""
    a, b, c = coefficients
    if x.numel() == 0:
        return x.clone()
    m, n = x.shape[-2:]
    work = dtype or (torch.float64 if x.dtype == torch.float64 else fast_dtype(x.device.type))
    y = x.reshape(-1, m, n)
    y = y.mT if m > n else y  # (batch, s, l), s <= l
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp_(min=eps)
    y = (wide / norm).to(work)
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(steps):
            gram = torch.bmm(y, y.mT)  # (batch, s, s)
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            y = torch.baddbmm(y, polynomial, y, beta=a)
    y = y.mT if m > n else y
    return y.to(x.dtype).reshape(x.shape)
