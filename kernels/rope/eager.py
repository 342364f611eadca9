"""Rotary embedding on the two halves; the backward is the opposite rotation, so nothing but the tables is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    c, s = cos.to(acc).unsqueeze(1), sin.to(acc).unsqueeze(1)  # (B, 1, T, R/2)
    half = cos.shape[2]
    first, second = x[..., :half].to(acc), x[..., half : 2 * half].to(acc)  # (B, H, T, R/2)
    turned = [(first * c - second * s).to(x.dtype), (second * c + first * s).to(x.dtype)]
    if 2 * half < x.shape[3]:
        turned.append(x[..., 2 * half :])
    return torch.cat(turned, dim=3)  # (B, H, T, K)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `kernels.rope.apply_rope`."""
    return _Rope.apply(x, cos, sin)
