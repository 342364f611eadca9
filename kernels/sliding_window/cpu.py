"""Windowed attention on the CPU, over blocks of queries whose softmax weights are kept for the backward.

torch's scaled_dot_product_attention gains nothing from bfloat16 matmul instructions here, nor from a window. On one AVX-512 core, forward
and backward, eager / this, milliseconds: B=8 H=6 G=2 T=256 K=32 window 128: 28 / 12 bf16, 21 / 16 fp32; without a window 28 / 13 bf16,
21 / 18 fp32; B=2 H=8 G=2 T=1024 K=64 window 512: 153 / 51 bf16, 204 / 96 fp32. Scores are float32 products of the inputs as given. The kept
weights and the scores' gradient are rounded to the inputs' dtype, which in bfloat16 makes the gradient of q 1.5 times less exact than that
of torch's own kernel: relative RMS errors of the gradients of q, k and v of unit normal inputs 3.9e-3, 4.0e-3 and 2.9e-3 against 2.6e-3,
5.0e-3 and 4.8e-3. Rows too long to keep their weights train in `eager`.

A few queries against a cache go through C (decode.c), where there is a compiler. One core of a Zen 5, fp32, eager / this, microseconds:
B=32 H=8 G=2 K=32, 190 slots 307 / 58, 300 slots 541 / 88.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compile_c import load_library
from kernels.sliding_window import eager

__all__ = ["attention", "cached_attention"]

_log = logging.getLogger(__name__)

_QUERIES = 64  # a block; 128 measured 1.2 times slower, 256 1.5 times
_MAX_KEPT_BYTES = 64 << 20  # softmax weights of one call: above this, eager's smaller memory matters more
_LOG2E = math.log2(math.e)
_SHORT = 128  # prompts up to here are read faster by torch's own: 8, 50, 100 tokens of 8 heads of 32 in 11, 54, 168 us, here 40, 98, 232
_MAX_QUERIES = 4  # of a row, for the C path: it does no matrix products, so chunks of a prompt go through eager


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that any of them sees) of every block."""
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        yield slice(first, last), slice(0 if window is None else max(0, first - window + 1), last)


def _kept_bytes(q: Tensor, window: int | None) -> int:
    """Bytes of the softmax weights that the backward needs."""
    pairs = sum((queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in _blocks(q.shape[2], window))
    return q.shape[0] * q.shape[1] * pairs * q.element_size()


def _weights(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax weights (B, G, H/G, t, s) in q's dtype. q: (B, G, H/G, t, K); k: (B, G, s, K); visible: (t, s) or (B, 1, t, s)."""
    batch, groups, heads, queries, _ = q.shape
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.bmm(q.to(acc).view(batch * groups, heads * queries, -1), k.to(acc).flatten(0, 1).mT)
    scores = scores.view(batch, groups * heads, queries, -1).mul_(scale * _LOG2E).masked_fill_(~visible, -torch.inf)
    scores = scores.sub_(scores.amax(dim=3, keepdim=True)).exp2_()  # exp2: see selective_scan
    return scores.div_(scores.sum(dim=3, keepdim=True)).to(q.dtype).view(batch, groups, heads, queries, -1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, segment_ids: Tensor | None, scale: float) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            batch, heads, length, _ = q.shape
            groups = k.shape[1]
            out = q.new_empty(q.shape)
            kept, keep = [], any(ctx.needs_input_grad)
            for queries, keys in _blocks(length, window):
                visible = eager._visible(queries.start, queries.stop, keys.start, window, segment_ids, q.device)
                block = q[:, :, queries].unflatten(1, (groups, heads // groups)).contiguous()  # (B, G, H/G, t, K)
                weights = _weights(block, k[:, :, keys], visible, scale)
                flat = weights.view(batch * groups, -1, weights.shape[4])  # (B G, H/G t, s)
                out[:, :, queries] = torch.bmm(flat, v[:, :, keys].flatten(0, 1)).view(batch, heads, -1, q.shape[3])
                if keep:
                    kept.append(flat)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            batch, groups, length, head_dim = k.shape
            acc = torch.float64 if q.dtype == torch.float64 else torch.float32
            dq = q.new_empty(q.shape)
            dk, dv = (torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (k, v))
            delta = (dout.to(acc) * out).sum(dim=3, keepdim=True)  # (B, H, T, 1): row sums of P * dP
            rows = lambda x: x.unflatten(1, (groups, -1)).reshape(batch * groups, -1, x.shape[3])  # noqa: E731  (B G, H/G t, .)
            for (queries, keys), weights in zip(_blocks(length, ctx.window), kept):
                do = rows(dout[:, :, queries])
                scores = torch.bmm(do, v[:, :, keys].flatten(0, 1).mT).to(acc)  # dP, then dS
                scores = scores.sub_(rows(delta[:, :, queries])).mul_(weights).mul_(ctx.scale).to(q.dtype)
                dq[:, :, queries] = torch.bmm(scores, k[:, :, keys].flatten(0, 1)).view(batch, -1, queries.stop - queries.start, head_dim)
                dk[:, :, keys] += torch.bmm(scores.mT, rows(q[:, :, queries])).view(batch, groups, -1, head_dim)
                dv[:, :, keys] += torch.bmm(weights.mT, do).view(batch, groups, -1, head_dim)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, segment_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `kernels.sliding_window.attention`."""
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    short = not trains and length <= _SHORT and q.dtype == torch.float32
    if short or (trains and _kept_bytes(q, window) > _MAX_KEPT_BYTES):
        return eager.attention(q, k, v, window, segment_ids, scale)
    if segment_ids is not None and eager._one_segment(segment_ids):
        segment_ids = None
    return _BlockedAttention.apply(q, k, v, window, segment_ids, 1 / math.sqrt(q.shape[3]) if scale is None else scale)


class _Cached(ctypes.Structure):
    """`Cached` of decode.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "q_step", "k_row", "k_head", "k_slot", "v_row", "v_head", "v_slot")),
        *((name, ctypes.c_void_p) for name in ("key_positions", "query_positions", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "length", "slots", "size", "window")),
        ("scale_log2", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Compiled at first use; None, said once, where that cannot be done."""
    try:
        library = load_library(Path(__file__).with_name("decode.c"))
    except ImportError as error:
        _log.warning("kernels.sliding_window: cached attention stays in eager, which is slower (%s)", error)
        return None
    library.cached_attention_forward.argtypes = [ctypes.POINTER(_Cached)]
    return library


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `kernels.sliding_window.cached_attention`.

    The C path (float32 without gradients, up to 4 queries a row, heads of a multiple of 16 numbers) reads only the slots that a query sees,
    and gives a row the same bits whatever the other rows and the number of slots are.
    """
    batch, heads, length, size = q.shape
    groups, slots = k.shape[1], k.shape[2]
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    suits = q.dtype == torch.float32 and length <= _MAX_QUERIES and not trains and size % 16 == 0 and 0 < size <= 256
    library = _library() if suits and q.stride(3) == k.stride(3) == v.stride(3) == 1 else None
    if library is None:
        return eager.cached_attention(q, k, v, key_positions, query_positions, window, scale)
    keys, queries = key_positions.to(torch.int64).contiguous(), query_positions.to(torch.int64).contiguous()
    out = torch.empty(batch, heads, length, size)
    problem = _Cached(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        keys.data_ptr(), queries.data_ptr(), out.data_ptr(), batch, heads, groups, length, slots, size, window or 0,
        (1 / math.sqrt(size) if scale is None else scale) * _LOG2E, torch.get_num_threads(),
    )  # fmt: skip
    if library.cached_attention_forward(problem):
        raise MemoryError(f"cached_attention: no memory for the scores of {slots} slots")
    return out
