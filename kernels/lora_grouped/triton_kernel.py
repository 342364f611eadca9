"""Many LoRAs in one batch, in Triton: one kernel for the four products of rows, one for the gradients of the matrices.

A program has a tile of rows that share an adapter; rows are gathered from x and scattered into y as they are loaded and stored. Ranks are
padded to the largest. Sums are float32, each by one program in a fixed order, so equal calls give equal bits. float64 runs in eager. Never
run on a GPU: compiled for sm_80 and sm_90, its results checked in Triton's interpreter on the CPU only; tile sizes are unmeasured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from kernels.launch import on_device
from kernels.lora_grouped import Segments, eager

lora_mixed = eager.lora_mixed  # two dense products, which the libraries do well; nothing here is sorted, gathered or scattered
_INTERPRETED = knobs.runtime.interpret
_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ROWS = 64  # of a tile
_WARPS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}


@triton.jit
def _rows_kernel(
    x, w, y, out, order, scales, tiles, width, depth, x_row, x_k, w_g, w_n, w_k, y_row, y_n,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out[i] = scales_g * w_g x[i] (+ y[i]) for a tile of rows i of one adapter g. x: (., depth). w: (G, width, depth). out: (., width).

    GATHER, SCATTER: row m of x, of out and y, is at order[m] rather than at m. tiles: (., 3) of adapter, first row, end of its rows.
    """
    tile = tiles + tl.program_id(0) * 3
    adapter = tl.load(tile).to(tl.int64)
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    inside = row < tl.load(tile + 2)
    source, target = row.to(tl.int64), row.to(tl.int64)
    if GATHER:
        source = tl.load(order + row, mask=inside, other=0)
    if SCATTER:
        target = tl.load(order + row, mask=inside, other=0)
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, depth, DEPTH):
        k = (first + tl.arange(0, DEPTH)).to(tl.int64)
        left_mask, right_mask = inside[:, None] & (k < depth)[None, :], (k < depth)[:, None] & (column < width)[None, :]
        left = tl.load(x + source[:, None] * x_row + k[None, :] * x_k, mask=left_mask, other=0.0).to(DOT)
        right = tl.load(w + adapter * w_g + column[None, :] * w_n + k[:, None] * w_k, mask=right_mask, other=0.0).to(DOT)
        total = tl.dot(left, right, total, input_precision="ieee")
    if scales is not None:
        total *= tl.load(scales + adapter)
    mask = inside[:, None] & (column < width)[None, :]
    if y is not None:
        total += tl.load(y + target[:, None] * y_row + column[None, :] * y_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + target[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _outer_kernel(
    left, right, out, order, ends, height, width, left_row, left_n, right_row, right_n,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, STEP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of out_g = sum of left[i] right[i]' over the rows i of one adapter g. left: (., height). right: (., width)."""
    adapter = tl.program_id(0)
    start, end = tl.load(ends + adapter), tl.load(ends + adapter + 1)
    line = (tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    column = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(start, end, STEP):
        row = first + tl.arange(0, STEP)
        inside = row < end
        left_at, right_at = row.to(tl.int64), row.to(tl.int64)
        if GATHER_LEFT:
            left_at = tl.load(order + row, mask=inside, other=0)
        if GATHER_RIGHT:
            right_at = tl.load(order + row, mask=inside, other=0)
        left_mask, right_mask = (line < height)[:, None] & inside[None, :], inside[:, None] & (column < width)[None, :]
        a = tl.load(left + left_at[None, :] * left_row + line[:, None] * left_n, mask=left_mask, other=0.0).to(DOT)
        b = tl.load(right + right_at[:, None] * right_row + column[None, :] * right_n, mask=right_mask, other=0.0).to(DOT)
        total = tl.dot(a, b, total, input_precision="ieee")
    place = out + adapter.to(tl.int64) * height * width + line[:, None] * width + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(line < height)[:, None] & (column < width)[None, :])


@lru_cache(maxsize=8)
def _plan(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of segments of these sizes: tiles of rows, (., 3), and 0 with the ends of the segments, (G + 1,); int32. Layers share them."""
    ends = [0]
    tiles = []
    for g, size in enumerate(sizes):
        tiles += [(g, first, ends[-1] + size) for first in range(ends[-1], ends[-1] + size, _ROWS)]
        ends.append(ends[-1] + size)
    return tuple(torch.tensor(values, dtype=torch.int32).to(device) for values in (tiles, ends))  # type: ignore[return-value]


def _side(size: int, most: int = 64) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))


def _options(dtype: torch.dtype) -> dict[str, Any]:
    return {"DOT": tl.float32 if _INTERPRETED else _DOT_TYPES[dtype], "num_warps": _WARPS[dtype]}


def _rows(
    x: Tensor, w: Tensor, out: Tensor, order: Tensor | None, sizes: tuple[int, ...], scales: Tensor | None = None, y: Tensor | None = None,
    gather: bool = False, scatter: bool = False,
) -> Tensor:  # fmt: skip
    """Launch `_rows_kernel`; w: (G, N, K) with any strides. Returns `out`."""
    tiles, _ = _plan(sizes, x.device)
    width, depth = w.shape[1:]
    step = _side(width)
    _rows_kernel[(len(tiles), triton.cdiv(width, step))](
        x, w, y, out, order, scales, tiles, width, depth, *x.stride(), *w.stride(), *((0, 0) if y is None else y.stride()),
        GATHER=gather and order is not None, SCATTER=scatter and order is not None, ROWS=_ROWS, WIDTH=step, DEPTH=_side(depth, 32),
        **_options(x.dtype),
    )  # fmt: skip
    return out


def _outer(left: Tensor, right: Tensor, order: Tensor | None, sizes: tuple[int, ...], gather_left: bool) -> Tensor:
    """(G, left's width, right's width): sums of products over each segment; the other side than the gathered one is sorted already."""
    _, ends = _plan(sizes, left.device)
    height, width = left.shape[1], right.shape[1]
    out = left.new_empty(len(sizes), height, width)
    tall, wide = _side(height), _side(width)
    _outer_kernel[(len(sizes), triton.cdiv(height, tall), triton.cdiv(width, wide))](
        left, right, out, order, ends, height, width, *left.stride(), *right.stride(),
        GATHER_LEFT=gather_left and order is not None, GATHER_RIGHT=not gather_left and order is not None, STEP=32, HEIGHT=tall, WIDTH=wide,
        **_options(left.dtype),
    )  # fmt: skip
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, order: Tensor | None, sizes: tuple[int, ...]
    ) -> Tensor:  # fmt: skip
        """a: (G, R, in). b: (G, out, R). Every one of the G adapters has tokens."""
        z = _rows(x, a, x.new_empty(sum(sizes), a.shape[1]), order, sizes, scales, gather=True)  # (M, R)
        out = (
            torch.empty_like(y, memory_format=torch.contiguous_format) if order is None else y.clone(memory_format=torch.contiguous_format)
        )
        ctx.save_for_backward(x, a, b, z, scales, order)
        ctx.sizes = sizes
        return _rows(z, b, out, order, sizes, y=y, scatter=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, a, b, z, scales, order = ctx.saved_tensors
        _, need_x, need_a, need_b, *_ = ctx.needs_input_grad
        narrow = dy.to(x.dtype)
        db = _outer(narrow, z, order, ctx.sizes, gather_left=True) if need_b else None  # (G, out, R)
        dx = da = None
        if need_x or need_a:
            dz = _rows(narrow, b.mT, torch.empty_like(z), order, ctx.sizes, scales, gather=True)  # (M, R)
            da = _outer(dz, x, order, ctx.sizes, gather_left=False) if need_a else None  # (G, R, in)
            if need_x:
                empty = torch.empty_like if order is None else torch.zeros_like
                dx = _rows(dz, a.mT, empty(x, memory_format=torch.contiguous_format), order, ctx.sizes, scatter=True)
        return dy, dx, da, db, None, None, None


@on_device
def lora_grouped(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], rows: Segments
) -> Tensor:  # fmt: skip
    """See `kernels.lora_grouped.lora_grouped`."""
    used = [g for g, size in enumerate(rows.sizes) if size]
    if not used or x.dtype not in _DOT_TYPES or y.dtype == torch.float64:
        return eager.lora_grouped(y, x, a, b, scales, rows)
    rank = max(len(a[g]) for g in used)
    down = torch.stack([F.pad(a[g], (0, 0, 0, rank - len(a[g]))) for g in used])  # (G, R, in)
    up = torch.stack([F.pad(b[g], (0, rank - len(a[g]))) for g in used])  # (G, out, R)
    factors = torch.tensor([scales[g] for g in used], dtype=torch.float32).to(x.device)
    return _Grouped.apply(y, x, down, up, factors, rows.order, tuple(rows.sizes[g] for g in used))
