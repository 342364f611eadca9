"""RMS normalisation by torch's own op, which keeps one statistic a row (a hand-written Function measured no faster)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See `kernels.rms_norm.add_rms_norm`."""
    total = residual + x
    return rms_norm(total, weight, eps), total
