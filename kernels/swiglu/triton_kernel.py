"""SwiGLU in Triton: one kernel forward, one backward, which computes the silu again; gate and up alone are kept.

Never run on a GPU: compiled for sm_80 and sm_90, its results checked in Triton's interpreter on the CPU only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import on_device
from kernels.swiglu import eager

_ELEMENTS = 1024  # of a tile


@triton.jit
def _forward(gate, up, out, rows, size, stride_gate, stride_up, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (row < rows) & (column < size)
    wide = row.to(tl.int64)
    g = tl.load(gate + wide * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + wide * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + wide * size + column, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, dout, dgate, dup, rows, size, stride_gate, stride_up, stride_dout, ROWS: tl.constexpr, SIZE: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (row < rows) & (column < size)
    wide = row.to(tl.int64)
    g = tl.load(gate + wide * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + wide * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dout + wide * stride_dout + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + wide * size + column, (d * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + wide * size + column, (d * g * s).to(dup.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """x (..., F) as (M, F) with adjacent columns: a view of half of a fused matrix, a copy only where strides cannot say it."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    return x if x.stride(1) == 1 else x.contiguous()


def _grid(rows: int, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    columns = min(_ELEMENTS, triton.next_power_of_2(size))
    tile = min(_ELEMENTS // columns, triton.next_power_of_2(rows))
    return (triton.cdiv(rows, tile), triton.cdiv(size, columns)), {"ROWS": tile, "SIZE": columns}


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = gate.new_empty(gate.shape)
        if out.numel():
            g, u = _rows(gate), _rows(up)
            grid, tile = _grid(*g.shape)
            _forward[grid](g, u, out, *g.shape, g.stride(0), u.stride(0), **tile)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
        if dout.numel():
            g, u, d = _rows(gate), _rows(up), _rows(dout)
            grid, tile = _grid(*g.shape)
            _backward[grid](g, u, d, dgate, dup, *g.shape, g.stride(0), u.stride(0), d.stride(0), **tile)
        return dgate, dup


@on_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.swiglu.swiglu`. float64 runs in eager."""
    if gate.dtype == torch.float64:
        return eager.swiglu(gate, up)
    return _SwiGLU.apply(gate, up)
