"""Attention of a few queries against a cache in Triton: the slots are split over programs, whose softmaxes a second kernel joins.

Never run on a GPU: compiled for sm_80 and sm_90, its results checked in Triton's interpreter on the CPU only; sizes are unmeasured.

The query heads of a group and the queries of a step are the rows of one tile, so that a key is read once for all of them (torch's
flash kernel takes no mask). Empty slots are not read. It has no backward: eager has one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.launch import on_device
from kernels.sliding_window import eager

_INTERPRETED = knobs.runtime.interpret
_SPLIT_SLOTS = 256  # the least that a program is started for
_PROGRAMS = 2  # wanted, a multiprocessor
_ROWS = 64  # of a tile at most
_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _attend_slots(
    q, k, v, key_positions, query_positions, out, lse,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd,
    groups, repeats, times, slots, split_slots, window, scale_log2,
    DIMS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One split: its normalised values in out (splits, B, H, T, K) and the logarithm of its sum in lse (splits, B, H, T), base 2."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    batch, group = pair // groups, pair % groups
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # head of the group, then time
    inside = row < repeats * times
    head, time = group * repeats + row // times, row % times
    dims = tl.arange(0, PADDED)[None, :]
    pointers = q + batch * stride_qb + head[:, None] * stride_qh + time[:, None] * stride_qt + dims * stride_qd
    queries = tl.load(pointers, mask=inside[:, None] & (dims < DIMS), other=0.0).to(DOT)
    newest = tl.load(query_positions + batch * times + time, mask=inside, other=-1)
    k += batch * stride_kb + group * stride_kh
    v += batch * stride_vb + group * stride_vh
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    for first in range(split * split_slots, tl.minimum((split + 1) * split_slots, slots), KEYS):
        slot = first + tl.arange(0, KEYS)
        position = tl.load(key_positions + batch * slots + slot, mask=slot < slots, other=-1)
        held = (position >= 0)[:, None] & (dims < DIMS)
        wide = slot.to(tl.int64)[:, None]
        k_tile = tl.load(k + wide * stride_ks + dims * stride_kd, mask=held, other=0.0).to(DOT)  # (KEYS, PADDED)
        v_tile = tl.load(v + wide * stride_vs + dims * stride_vd, mask=held, other=0.0).to(DOT)
        distance = newest[:, None] - position[None, :]
        visible = (position >= 0)[None, :] & (distance >= 0) & (distance < window)
        scores = tl.dot(queries, tl.trans(k_tile), input_precision="ieee") * scale_log2
        scores = tl.where(visible, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a query that has seen no slot yet
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), v_tile, acc * decay[:, None], input_precision="ieee")
        top = new_top
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    target = (split * tl.num_programs(0) + pair) * repeats * times + row
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + target[:, None] * DIMS + dims, result, mask=inside[:, None] & (dims < DIMS))
    tl.store(lse + target, tl.where(nothing, -float("inf"), top + tl.log2(total)), mask=inside)


@triton.jit
def _combine(parts, lse, out, rows, splits, DIMS: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Join the splits of one row: their values weighted with their sums."""
    row = tl.program_id(0).to(tl.int64)
    split, dims = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    sums = tl.load(lse + split * rows + row, mask=split < splits, other=-float("inf"))
    top = tl.max(sums, 0)
    weights = tl.exp2(sums - tl.where(top == -float("inf"), 0.0, top))  # all zero where no slot was seen
    inside = (split < splits)[:, None] & (dims < DIMS)[None, :]
    values = tl.load(parts + (split[:, None] * rows + row) * DIMS + dims[None, :], mask=inside, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(weights[:, None] * values, 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * DIMS + dims, result.to(out.dtype.element_ty), mask=dims < DIMS)


def _splits(slots: int, programs: int, device: torch.device) -> int:
    """Into how many parts the slots are cut: enough to fill the device, none too small."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64
    return max(1, min(triton.cdiv(_PROGRAMS * processors, programs), slots // _SPLIT_SLOTS, 64))


@on_device
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `kernels.sliding_window.cached_attention`. Training, float64 and heads above 256 dimensions run in eager."""
    batch, heads, times, dims = q.shape
    groups, slots = k.shape[1:3]
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trains or q.dtype not in _DOT_TYPES or dims > 256:
        return eager.cached_attention(q, k, v, key_positions, query_positions, window, scale)
    repeats, padded = heads // groups, max(16, triton.next_power_of_2(dims))
    rows = min(_ROWS if padded <= 128 else 16, max(16, triton.next_power_of_2(repeats * times)))
    tiles = triton.cdiv(repeats * times, rows)
    keys = 16 if _INTERPRETED or (q.dtype == torch.float32 and padded > 64) else 64 if q.element_size() == 2 and padded <= 128 else 32
    split_slots = triton.cdiv(triton.cdiv(slots, _splits(slots, batch * groups * tiles, q.device)), keys) * keys  # whole tiles
    splits = triton.cdiv(slots, split_slots)
    out = q.new_empty(batch, heads, times, dims)
    parts = out if splits == 1 else q.new_empty(splits, *out.shape, dtype=torch.float32)
    lse = q.new_empty(splits, batch, heads, times, dtype=torch.float32)
    scale = 1 / math.sqrt(dims) if scale is None else scale
    window = 1 << 62 if window is None else window
    _attend_slots[batch * groups, tiles, splits](
        q, k, v, key_positions.contiguous(), query_positions.contiguous(), parts, lse, *q.stride(), *k.stride(), *v.stride(),
        groups, repeats, times, slots, split_slots, window, scale * math.log2(math.e),
        DIMS=dims, PADDED=padded, ROWS=rows, KEYS=keys, DOT=tl.float32 if _INTERPRETED else _DOT_TYPES[q.dtype],
    )  # fmt: skip
    if splits > 1:
        every = batch * heads * times
        _combine[(every,)](parts, lse, out, every, splits, DIMS=dims, PADDED=padded, SPLITS=triton.next_power_of_2(splits))
    return out
