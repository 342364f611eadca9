"""RMS normalisation written out: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = x.to(acc)
    return (value / (value.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.to(acc)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See `kernels.rms_norm.add_rms_norm`."""
    total = residual + x
    return rms_norm(total, weight, eps), total
