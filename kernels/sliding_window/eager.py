"""Windowed attention on torch's scaled_dot_product_attention.

One AVX-512 core, forward and backward, milliseconds (mask over the whole row / loop over query blocks of `window`):
B=8 H=4 T=256 K=48 window 128: 20 / 19 fp32, 23 / 28 bf16; B=2 H=8 T=1024 K=64 window 256: 197 / 98 fp32, 146 / 84 bf16;
B=1 H=8 G=2 T=2048 K=64 window 256: 389 / 110 fp32, 288 / 110 bf16. `enable_gqa` is never slower than repeating the keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_QUERIES = 256  # a block of queries where no window gives one


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _visible(
    first_query: int, last_query: int, first_key: int, window: int | None, segment_ids: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys first_key..last_query-1 the queries first_query..last_query-1 see: bool (queries, keys), or (B, 1, queries, keys)."""
    queries = torch.arange(first_query, last_query, device=device).unsqueeze(1)
    distance = queries - torch.arange(first_key, last_query, device=device)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if segment_ids is not None:
        own = segment_ids[:, first_query:last_query].unsqueeze(2)
        visible = visible & (own == segment_ids[:, first_key:last_query].unsqueeze(1))  # (B, queries, keys)
        visible = visible.unsqueeze(1)
    return visible


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, first: int, last: int, window: int | None, segment_ids: Tensor | None, scale: float | None
) -> Tensor:
    """The queries first..last-1 of the row: (B, H, last - first, K)."""
    oldest = 0 if window is None else max(0, first - window + 1)
    mask = _visible(first, last, oldest, window, segment_ids, q.device)
    return _attend(q[:, :, first:last], k[:, :, oldest:last], v[:, :, oldest:last], mask, scale)


def _one_segment(segment_ids: Tensor) -> bool:
    """Whether no row is divided; ids never decrease, so the ends tell. Not asked on an accelerator, where it would wait for the device."""
    return segment_ids.device.type == "cpu" and bool((segment_ids[:, 0] == segment_ids[:, -1]).all())


def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, segment_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `kernels.sliding_window.attention`.

    No mask of more than O(T * window) elements (a row, with segment_ids) is ever held, O(T * 256) without a window. There each block of
    queries sees up to T keys, so that the masks of all blocks would be as large as one over the row: they are made again in the backward.
    """
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    if segment_ids is not None and _one_segment(segment_ids):
        segment_ids = None
    if window is None and segment_ids is None:
        return _attend(q, k, v, None, scale, causal=True)
    size = _QUERIES if window is None else window
    if length <= 2 * size:
        return _attend_block(q, k, v, 0, length, window, segment_ids, scale)
    blocks = []
    for first in range(0, length, size):
        block = (q, k, v, first, min(first + size, length), window, segment_ids, scale)
        if window is None and torch.is_grad_enabled():
            blocks.append(checkpoint(_attend_block, *block, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_attend_block(*block))
    return torch.cat(blocks, dim=2)


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
    return _attend(q, k, v, visible.unsqueeze(1), scale)
