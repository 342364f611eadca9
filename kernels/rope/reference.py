"""Rotary embedding as an explicit block-diagonal rotation matrix: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `kernels.rope.apply_rope`."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    half, head_dim = cos.shape[2], x.shape[3]
    rotation = torch.eye(head_dim, dtype=acc, device=x.device).repeat(*cos.shape[:2], 1, 1)  # (B, T, K, K)
    for i in range(half):
        rotation[:, :, i, i] = cos[:, :, i].to(acc)
        rotation[:, :, i + half, i + half] = cos[:, :, i].to(acc)
        rotation[:, :, i, i + half] = -sin[:, :, i].to(acc)
        rotation[:, :, i + half, i] = sin[:, :, i].to(acc)
    return (rotation.unsqueeze(1) @ x.to(acc).unsqueeze(4)).squeeze(4).to(x.dtype)
