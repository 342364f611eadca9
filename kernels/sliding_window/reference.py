"""Windowed attention by brute force over all pairs: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, segment_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `kernels.sliding_window.attention`."""
    length = q.shape[2]
    visible = torch.zeros(q.shape[0], length, length, dtype=torch.bool, device=q.device)
    for i in range(length):
        first = 0 if window is None else max(0, i - window + 1)
        visible[:, i, first : i + 1] = True
    if segment_ids is not None:
        visible &= segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
    return _attend(q, k, v, visible, scale)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `kernels.sliding_window.cached_attention`."""
    distance = query_positions.unsqueeze(2) - key_positions.unsqueeze(1)  # (B, T, S)
    visible = (distance >= 0) & (key_positions >= 0).unsqueeze(1)
    if window is not None:
        visible &= distance < window
    return _attend(q, k, v, visible, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeats = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        keys, values = (x.to(acc).repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = (q.to(acc) @ keys.mT * scale).masked_fill(~visible.unsqueeze(1), -torch.inf)  # (B, H, T, S)
        weights = scores.softmax(dim=3).nan_to_num(nan=0.0)  # a query that sees nothing
        return (weights @ values).to(q.dtype)
