"""RMS normalisation in Triton, alone or behind a residual sum: one pass over memory forward, one backward.

Never run on a GPU: compiled for sm_80 and sm_90, its results checked in Triton's interpreter on the CPU only.

A program holds whole rows in registers; rows above some 32k elements would spill. Only 1/rms of each row is kept beside the input. The
weight's gradient is summed by a fixed number of programs into one row each, and those rows by torch: bitwise reproducible on one device.
float64 runs in eager.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import on_device
from kernels.rms_norm import eager

_ELEMENTS = 2048  # of a tile: several short rows share a program
_PROGRAMS = 4  # of the backward, a multiprocessor


@triton.jit
def _forward(
    x, residual, weight, out, total, rstd, rows, size, eps, stride_x, stride_residual,
    SUM: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)[None, :]
    inside = (row[:, None] < rows) & (column < size)
    wide = row[:, None].to(tl.int64)
    value = tl.load(x + wide * stride_x + column, mask=inside, other=0.0).to(tl.float32)  # (ROWS, SIZE)
    if SUM:
        value += tl.load(residual + wide * stride_residual + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + wide * size + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1) / size + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    w = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out + wide * size + column, (value * scale[:, None] * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, weight, rstd, dout, dtotal, dx, dresidual, dweight, rows, size, stride_x, stride_dout, stride_dtotal,
    SUM: tl.constexpr, TWO: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SUM: a gradient of the sum itself comes in. TWO: dx is asked for in two dtypes. WEIGHT: this program's part of dweight as well."""
    column = tl.arange(0, SIZE)[None, :]
    w = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    part = tl.zeros((ROWS, SIZE), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (column < size)
        wide = row[:, None].to(tl.int64)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normed = tl.load(x + wide * stride_x + column, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        g = tl.load(dout + wide * stride_dout + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            part += g * normed
        g = g * w
        g = (g - normed * (tl.sum(g * normed, 1) / size)[:, None]) * scale[:, None]
        if SUM:
            g += tl.load(dtotal + wide * stride_dtotal + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + wide * size + column, g.to(dx.dtype.element_ty), mask=inside)
        if TWO:
            tl.store(dresidual + wide * size + column, g.to(dresidual.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(dweight + tl.program_id(0).to(tl.int64) * size + column, tl.sum(part, 0)[None, :], mask=column < size)


def _launch(size: int) -> dict[str, int]:
    """Tile of whole rows, and launch options."""
    padded = triton.next_power_of_2(size)
    warps = 4 if padded <= 1024 else 8 if padded <= 4096 else 16
    return {"ROWS": max(1, min(16, _ELEMENTS // padded)), "SIZE": padded, "num_warps": warps}


def _rows(x: Tensor) -> Tensor:
    """x (..., D) as (M, D) with adjacent columns, a view where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _backward_programs(rows: int, tile_rows: int, device: torch.device) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(triton.cdiv(rows, tile_rows), _PROGRAMS * processors)


def _cast(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if x is None or dtype is None else x.to(dtype)


class _Norm(torch.autograd.Function):
    """(normed, new residual); without a residual the second is None and the first has x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        total = x if residual is None else x.new_empty(x.shape, dtype=dtype)
        out = x.new_empty(x.shape, dtype=dtype)
        flat = _rows(x)
        other = flat if residual is None else _rows(residual)
        rows, size = flat.shape
        rstd = x.new_empty(rows, dtype=torch.float32)
        options = _launch(size)
        if rows:
            _forward[(triton.cdiv(rows, options["ROWS"]),)](
                flat, other, weight, out, total, rstd, rows, size, eps, flat.stride(0), other.stride(0), SUM=residual is not None, **options
            )  # fmt: skip
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return out, None if residual is None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        if dout is None:
            return _cast(dtotal, x_dtype), _cast(dtotal, residual_dtype), None, None
        two = residual_dtype not in (None, x_dtype)
        dx = total.new_empty(total.shape, dtype=x_dtype)
        dresidual = total.new_empty(total.shape, dtype=residual_dtype) if two else dx
        flat, dout = _rows(total), _rows(dout)
        dsum = dout if dtotal is None else _rows(dtotal)
        rows, size = flat.shape
        options = _launch(size)
        programs = _backward_programs(rows, options["ROWS"], total.device)
        parts = rstd.new_empty(programs, size)
        if rows:
            _backward[(programs,)](
                flat, weight, rstd, dout, dsum, dx, dresidual, parts, rows, size, flat.stride(0), dout.stride(0), dsum.stride(0),
                SUM=dtotal is not None, TWO=two, WEIGHT=ctx.needs_input_grad[2], **options,
            )  # fmt: skip
        dweight = parts.sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, None if residual_dtype is None else dresidual, dweight, None


@on_device
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    if x.dtype == torch.float64:
        return eager.rms_norm(x, weight, eps)
    return _Norm.apply(x, None, weight, eps)[0]


@on_device
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See `kernels.rms_norm.add_rms_norm`."""
    if torch.float64 in (x.dtype, residual.dtype):
        return eager.add_rms_norm(x, residual, weight, eps)
    return _Norm.apply(x, residual, weight, eps)
