"""Windowed attention in Triton (FlashAttention-2, arXiv 2307.08691, alg. 1 and 2): no weights in memory, no atomics, no repeated keys.

Never run on a GPU: compiled for sm_80 and sm_90, its results checked in Triton's interpreter on the CPU only; tile sizes are unmeasured.

Every query sees a run of keys, and every key is seen by a run of queries: window and packed documents only say where the runs begin and
end. So each tile has a first and a last neighbour, and of those between only the ones at the two edges need a mask. The gradients of keys
and values are summed over the query heads of a group inside one program, in a fixed order: they are bitwise reproducible. In a dot,
bfloat16 and float16 stay what they are and float32 is multiplied in full precision; sums are float32.

A half-precision call that no window or document cuts goes to torch's scaled_dot_product_attention, whose causal CUDA kernel is written for
exactly that and tuned by hand; by reasoning, not by measurement. float64 and heads above 256 dimensions run in eager.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from kernels.launch import on_device
from kernels.sliding_window import eager
from kernels.sliding_window.decode_kernel import cached_attention

__all__ = ["attention", "cached_attention"]

_INTERPRETED = knobs.runtime.interpret
_LOG2E = math.log2(math.e)
_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _tile(base, first, rows, stride_row, dims, stride_dim, DIMS: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr):
    """Rows first + `rows` (n,) of base as (n, PADDED), zero from dimension DIMS on; the first row's offset may exceed 32 bits."""
    pointers = base + tl.cast(first, tl.int64) * stride_row + rows[:, None] * stride_row + dims[None, :] * stride_dim
    if DIMS == PADDED:
        return tl.load(pointers).to(DOT)
    return tl.load(pointers, mask=dims[None, :] < DIMS, other=0.0).to(DOT)


@triton.jit
def _put(base, first, rows, stride_row, dims, stride_dim, values, length, DIMS: tl.constexpr):
    pointers = base + tl.cast(first, tl.int64) * stride_row + rows[:, None] * stride_row + dims[None, :] * stride_dim
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(first + rows[:, None] < length) & (dims[None, :] < DIMS))


@triton.jit
def _edges(first, full_from, full_to, BLOCK: tl.constexpr):
    """Begin of the tile of BLOCK that holds `first`; begin and end of the tiles inside full_from..full_to-1, which need no mask."""
    begin = first // BLOCK * BLOCK
    inner = tl.maximum((full_from + BLOCK - 1) // BLOCK * BLOCK, begin)
    return begin, inner, tl.maximum(full_to // BLOCK * BLOCK, inner)


@triton.jit
def _first_keys(starts, rows, window, SEGMENTED: tl.constexpr):
    """The oldest key that each of the queries `rows` sees."""
    first = tl.maximum(rows - window + 1, 0)
    if SEGMENTED:
        first = tl.maximum(first, tl.load(starts + rows))
    return first


@triton.jit
def _last_queries(ends, keys, window, length, SEGMENTED: tl.constexpr):
    """One more than the last query that sees each of `keys`."""
    last = tl.minimum(keys + window, length)
    if SEGMENTED:
        last = tl.minimum(last, tl.load(ends + keys))
    return last


@triton.jit
def _softmax_tiles(
    acc, total, top, q, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd, begin, end, length, scale_log2,
    DIMS: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of keys begin..end-1 to the online softmax of one tile of queries."""
    for first in range(begin, end, KEYS):
        keys = tl.arange(0, KEYS)
        if MASKED:
            keys = tl.minimum(keys, length - 1 - first)  # past the end: the last key again, which the mask below removes
        scores = tl.dot(q, tl.trans(_tile(k, first, keys, stride_kt, dims, stride_kd, DIMS, PADDED, DOT)), input_precision="ieee")
        scores = scores * scale_log2  # (queries, keys)
        if MASKED:
            at = first + tl.arange(0, KEYS)[None, :]
            scores = tl.where((at <= rows[:, None]) & (at >= oldest[:, None]), scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = new_top
        if MASKED:
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a query that has seen no key yet
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(DOT), _tile(v, first, keys, stride_vt, dims, stride_vd, DIMS, PADDED, DOT), acc, input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit
def _forward(
    q, k, v, out, lse, starts,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    heads, repeats, length, window, scale_log2,
    DIMS: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SEGMENTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // repeats * stride_kh
    v += batch * stride_vb + head // repeats * stride_vh
    starts += batch * length
    dims, local = tl.arange(0, PADDED), tl.arange(0, QUERIES)
    inside = tl.minimum(local, length - 1 - first)  # past the end: the last query again, which is not stored
    rows = first + inside
    last = tl.minimum(first + QUERIES, length)
    oldest = _first_keys(starts, rows, window, SEGMENTED)
    full_from = _first_keys(starts, last - 1, window, SEGMENTED)
    begin, inner, outer = _edges(_first_keys(starts, first, window, SEGMENTED), full_from, first + 1, KEYS)

    queries = _tile(q, first, inside, stride_qt, dims, stride_qd, DIMS, PADDED, DOT)
    acc = tl.zeros((QUERIES, PADDED), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    acc, total, top = _softmax_tiles(acc, total, top, queries, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd,
                                     begin, tl.minimum(inner, last), length, scale_log2, DIMS, PADDED, KEYS, DOT, True)  # fmt: skip
    acc, total, top = _softmax_tiles(acc, total, top, queries, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd,
                                     inner, outer, length, scale_log2, DIMS, PADDED, KEYS, DOT, False)  # fmt: skip
    acc, total, top = _softmax_tiles(acc, total, top, queries, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd,
                                     outer, last, length, scale_log2, DIMS, PADDED, KEYS, DOT, True)  # fmt: skip
    _put(out + batch * stride_ob + head * stride_oh, first, local, stride_ot, dims, stride_od, acc / total[:, None], length, DIMS)
    tl.store(lse + row * length + first + local, top + tl.log2(total), mask=first + local < length)


@triton.jit
def _dq_tiles(
    acc, q, dout, lse, delta, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd, begin, end, length, scale_log2,
    DIMS: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, KEYS):
        keys = tl.arange(0, KEYS)
        if MASKED:
            keys = tl.minimum(keys, length - 1 - first)
        k_tile = _tile(k, first, keys, stride_kt, dims, stride_kd, DIMS, PADDED, DOT)
        v_tile = _tile(v, first, keys, stride_vt, dims, stride_vd, DIMS, PADDED, DOT)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale_log2
        if MASKED:
            at = first + tl.arange(0, KEYS)[None, :]
            scores = tl.where((at <= rows[:, None]) & (at >= oldest[:, None]), scores, -float("inf"))
        weights = tl.exp2(scores - lse[:, None])
        dscores = weights * (tl.dot(dout, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
        acc = tl.dot(dscores.to(DOT), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _backward_queries(
    q, k, v, out, dout, lse, delta, dq, starts,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od, stride_gb, stride_gh, stride_gt, stride_gd, stride_db, stride_dh, stride_dt, stride_dd,
    heads, repeats, length, window, scale, scale_log2,
    DIMS: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SEGMENTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(out * dout), which the kernel of the keys reads afterwards."""
    first, row = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // repeats * stride_kh
    v += batch * stride_vb + head // repeats * stride_vh
    starts += batch * length
    dims, local = tl.arange(0, PADDED), tl.arange(0, QUERIES)
    inside = tl.minimum(local, length - 1 - first)
    rows = first + inside
    last = tl.minimum(first + QUERIES, length)
    oldest = _first_keys(starts, rows, window, SEGMENTED)
    full_from = _first_keys(starts, last - 1, window, SEGMENTED)
    begin, inner, outer = _edges(_first_keys(starts, first, window, SEGMENTED), full_from, first + 1, KEYS)

    g = _tile(dout + batch * stride_gb + head * stride_gh, first, inside, stride_gt, dims, stride_gd, DIMS, PADDED, DOT)
    o = _tile(out + batch * stride_ob + head * stride_oh, first, inside, stride_ot, dims, stride_od, DIMS, PADDED, DOT)
    products = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + row * length + first + local, products, mask=first + local < length)
    sums = tl.load(lse + row * length + rows)
    queries = _tile(q, first, inside, stride_qt, dims, stride_qd, DIMS, PADDED, DOT)
    acc = tl.zeros((QUERIES, PADDED), tl.float32)
    acc = _dq_tiles(acc, queries, g, sums, products, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd,
                    begin, tl.minimum(inner, last), length, scale_log2, DIMS, PADDED, KEYS, DOT, True)  # fmt: skip
    acc = _dq_tiles(acc, queries, g, sums, products, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd,
                    inner, outer, length, scale_log2, DIMS, PADDED, KEYS, DOT, False)  # fmt: skip
    acc = _dq_tiles(acc, queries, g, sums, products, k, v, rows, oldest, dims, stride_kt, stride_kd, stride_vt, stride_vd,
                    outer, last, length, scale_log2, DIMS, PADDED, KEYS, DOT, True)  # fmt: skip
    _put(dq + batch * stride_db + head * stride_dh, first, local, stride_dt, dims, stride_dd, acc * scale, length, DIMS)


@triton.jit
def _dkv_tiles(
    dk, dv, k, v, q, dout, lse, delta, keys, newest, dims, stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd,
    begin, end, repeats, length, scale_log2,
    DIMS: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries begin..end-1 of every head of the group contribute. One loop: a loop over tiles in one over heads spills."""
    tiles = tl.maximum(end - begin + QUERIES - 1, 0) // QUERIES
    for step in range(0, tiles * repeats):
        head, first = tl.cast(step // tiles, tl.int64), begin + step % tiles * QUERIES
        rows = tl.arange(0, QUERIES)
        if MASKED:
            rows = tl.minimum(rows, length - 1 - first)
        q_tile = _tile(q + head * stride_qh, first, rows, stride_qt, dims, stride_qd, DIMS, PADDED, DOT)
        g_tile = _tile(dout + head * stride_gh, first, rows, stride_gt, dims, stride_gd, DIMS, PADDED, DOT)
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee") * scale_log2  # (keys, queries)
        if MASKED:
            at = first + tl.arange(0, QUERIES)[None, :]
            scores = tl.where((at >= keys[:, None]) & (at < newest[:, None]), scores, -float("inf"))
        weights = tl.exp2(scores - tl.load(lse + head * length + first + rows)[None, :])
        dv = tl.dot(weights.to(DOT), g_tile, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(g_tile), input_precision="ieee")
        dscores = weights * (dweights - tl.load(delta + head * length + first + rows)[None, :])
        dk = tl.dot(dscores.to(DOT), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_keys(
    q, k, v, dout, lse, delta, dk, dv, ends,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_db, stride_dh, stride_dt, stride_dd,
    groups, repeats, length, window, scale, scale_log2,
    DIMS: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SEGMENTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dk and dv, which share their strides, of a tile of keys of one group."""
    first, row = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    batch, group = row // groups, row % groups
    k += batch * stride_kb + group * stride_kh
    v += batch * stride_vb + group * stride_vh
    q += batch * stride_qb + group * repeats * stride_qh
    dout += batch * stride_gb + group * repeats * stride_gh
    lse += row * repeats * length
    delta += row * repeats * length
    ends += batch * length
    dims, local = tl.arange(0, PADDED), tl.arange(0, KEYS)
    inside = tl.minimum(local, length - 1 - first)
    keys = first + inside
    newest = _last_queries(ends, keys, window, length, SEGMENTED)
    last_key = tl.minimum(first + KEYS, length) - 1
    last = _last_queries(ends, last_key, window, length, SEGMENTED)
    begin, inner, outer = _edges(first, last_key, _last_queries(ends, first, window, length, SEGMENTED), QUERIES)

    k_tile = _tile(k, first, inside, stride_kt, dims, stride_kd, DIMS, PADDED, DOT)
    v_tile = _tile(v, first, inside, stride_vt, dims, stride_vd, DIMS, PADDED, DOT)
    dk_tile = tl.zeros((KEYS, PADDED), tl.float32)
    dv_tile = tl.zeros((KEYS, PADDED), tl.float32)
    dk_tile, dv_tile = _dkv_tiles(dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, keys, newest, dims,
                                  stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, begin, tl.minimum(inner, last),
                                  repeats, length, scale_log2, DIMS, PADDED, QUERIES, DOT, True)  # fmt: skip
    dk_tile, dv_tile = _dkv_tiles(dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, keys, newest, dims,
                                  stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, inner, outer,
                                  repeats, length, scale_log2, DIMS, PADDED, QUERIES, DOT, False)  # fmt: skip
    dk_tile, dv_tile = _dkv_tiles(dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, keys, newest, dims,
                                  stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, outer, last,
                                  repeats, length, scale_log2, DIMS, PADDED, QUERIES, DOT, True)  # fmt: skip
    _put(dk + batch * stride_db + group * stride_dh, first, local, stride_dt, dims, stride_dd, dk_tile * scale, length, DIMS)
    _put(dv + batch * stride_db + group * stride_dh, first, local, stride_dt, dims, stride_dd, dv_tile, length, DIMS)


# Widest head: (queries, keys, warps, stages). Chosen so that the half-precision kernels spill no register on sm_80 and sm_90, and fit an
# A100's shared memory with much to spare; no time was measured.
_TILES = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "backward_queries": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 2)},
    "backward_keys": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
}


def _tiles(kernel: str, dtype: torch.dtype, padded: int) -> dict[str, int]:
    """Sizes of a tile and launch options."""
    if _INTERPRETED:
        return {"QUERIES": 16, "KEYS": 16}
    if dtype == torch.float32:  # no tensor cores: multiplied in full precision
        size = 32 if padded <= 64 else 16
        return {"QUERIES": size, "KEYS": size, "num_warps": 8, "num_stages": 1}
    widest = min(width for width in _TILES[kernel] if padded <= width)
    return dict(zip(("QUERIES", "KEYS", "num_warps", "num_stages"), _TILES[kernel][widest]))


def _empty_heads(like: Tensor) -> Tensor:
    """A new tensor of the shape of `like` (B, H, T, K), dense, in the order of its dimensions: heads next to each other or rows."""
    batch, heads, length, dims = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, dims).transpose(1, 2)
    return like.new_empty(batch, heads, length, dims)


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None, ends: Tensor | None, scale: float) -> Tensor:
        batch, heads, length, dims = q.shape
        padded = max(16, triton.next_power_of_2(dims))
        tiles = _tiles("forward", q.dtype, padded)
        out, lse = _empty_heads(q), q.new_empty(batch, heads, length, dtype=torch.float32)
        _forward[triton.cdiv(length, tiles["QUERIES"]), batch * heads](
            q, k, v, out, lse, lse if starts is None else starts, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            heads, heads // k.shape[1], length, window, scale * _LOG2E,
            DIMS=dims, PADDED=padded, SEGMENTED=starts is not None, DOT=_dot_type(q.dtype), **tiles,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, starts, ends)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts, ends = ctx.saved_tensors
        batch, heads, length, dims = q.shape
        groups = k.shape[1]
        padded = max(16, triton.next_power_of_2(dims))
        numbers = (heads // groups, length, ctx.window, ctx.scale, ctx.scale * _LOG2E)
        options = {"DIMS": dims, "PADDED": padded, "SEGMENTED": starts is not None, "DOT": _dot_type(q.dtype)}
        delta = torch.empty_like(lse)
        dq, dk, dv = _empty_heads(q), _empty_heads(k), _empty_heads(k)
        tiles = _tiles("backward_queries", q.dtype, padded)
        _backward_queries[triton.cdiv(length, tiles["QUERIES"]), batch * heads](
            q, k, v, out, dout, lse, delta, dq, lse if starts is None else starts,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *dout.stride(), *dq.stride(), heads, *numbers, **options, **tiles,
        )  # fmt: skip
        tiles = _tiles("backward_keys", q.dtype, padded)
        _backward_keys[triton.cdiv(length, tiles["KEYS"]), batch * groups](
            q, k, v, dout, lse, delta, dk, dv, lse if ends is None else ends,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dk.stride(), groups, *numbers, **options, **tiles,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float32 if _INTERPRETED else _DOT_TYPES[dtype]  # the interpreter's bfloat16 arithmetic is wrong


def _torch_serves(device_type: str, dtype: torch.dtype, length: int, window: int | None, segmented: bool) -> bool:
    """Whether torch's own causal kernel does the same with less: see the head of the file."""
    whole = not segmented and (window is None or window >= length)
    return whole and device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)


@on_device
def attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, segment_ids: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `kernels.sliding_window.attention`. Any strides are read in place; the result lies in memory as q does."""
    length = q.shape[2]
    if q.dtype not in _DOT_TYPES or q.shape[3] > 256:
        return eager.attention(q, k, v, window, segment_ids, scale)
    if _torch_serves(q.device.type, q.dtype, length, window, segment_ids is not None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    starts = ends = None
    if segment_ids is not None:  # where the document of every token begins and ends
        ids = segment_ids.contiguous()
        starts, ends = (torch.searchsorted(ids, ids, right=right, out_int32=True) for right in (False, True))
    window = length if window is None else min(window, length)
    return _WindowedAttention.apply(q, k, v, window, starts, ends, 1 / math.sqrt(q.shape[3]) if scale is None else scale)
