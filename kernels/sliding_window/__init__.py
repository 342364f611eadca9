"""Causal attention over the last `window` keys (Mistral, arXiv 2310.06825, sec. 2), for whole rows and against a cache."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import expect_dims, expect_shape
from kernels.dispatch import pick

__all__ = ["attention", "cached_attention"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, segment_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Query i sees the keys i-window < j <= i of its own segment: `window` keys, itself included. Softmax in float32 (float64).

    Args:
        q: (B, H, T, K). k, v: (B, G, T, K), H a multiple of G; key head j serves query heads j*H/G .. (j+1)*H/G - 1.
        window: None for all earlier keys.
        segment_ids: (B, T) integer, non-decreasing in a row: attention stays inside a packed document.
        scale: of the scores; None is 1/sqrt(K).

    Returns: (B, H, T, K) in q's dtype. Raises: ValueError for shapes or a window that do not fit.
    """
    op = "attention"
    _check_heads(op, q, k, v)
    batch, _, length, _ = q.shape
    if k.shape[2] != length:
        raise ValueError(f"{op}: k has {k.shape[2]} positions and q {length}; expected as many (use cached_attention for a cache)")
    _check_window(op, window)
    expect_shape(op, "segment_ids", segment_ids, batch, length, letters="(B, T)")
    return pick("sliding_window", q.device).attention(q, k, v, window, segment_ids, scale)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention against cache slots in any order: a query at position i sees the slots whose position j has i-window < j <= i.

    Args:
        q: (B, H, T, K). k, v: (B, G, S, K), H a multiple of G.
        key_positions: (B, S) int64, -1 for an empty slot. query_positions: (B, T) int64.
        window, scale: as in `attention`.

    Returns: (B, H, T, K) in q's dtype; zeros for a query that sees no slot.
    """
    op = "cached_attention"
    _check_heads(op, q, k, v)
    _check_window(op, window)
    expect_shape(op, "key_positions", key_positions, k.shape[0], k.shape[2], letters="(B, S)")
    expect_shape(op, "query_positions", query_positions, q.shape[0], q.shape[2], letters="(B, T)")
    return pick("sliding_window", q.device).cached_attention(q, k, v, key_positions, query_positions, window, scale)


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    expect_dims(op, "q", q, 4, "(B, H, T, K)")
    expect_dims(op, "k", k, 4, "(B, G, S, K)")
    expect_shape(op, "v", v, *k.shape, letters="k's shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q {tuple(q.shape)} and k {tuple(k.shape)} differ in B or K, or k's heads do not divide q's")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; expected one dtype")


def _check_window(op: str, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}; expected at least 1, or None")
