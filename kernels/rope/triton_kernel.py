"""Rotary embedding in Triton: one pass, any strides; the backward is the same kernel with the angles turned round.

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
from kernels.rope import eager

_ELEMENTS = 2048  # of a tile: half of the turning dimensions at some positions


@triton.jit
def _turn(
    x, cos, sin, out, heads, length,
    stride_xb, stride_xh, stride_xt, stride_xd, stride_ob, stride_oh, stride_ot, stride_od, stride_table,
    TIMES: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, REST: tl.constexpr, PADDED_REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """stride_table: from one batch row of the tables to the next, 0 where they share one. BACK: by the opposite angle."""
    time = (tl.program_id(1) * TIMES + tl.arange(0, TIMES))[:, None]
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    wide, dim = time.to(tl.int64), tl.arange(0, PADDED)[None, :]
    inside = (time < length) & (dim < HALF)
    table = batch * stride_table + wide * HALF + dim
    c = tl.load(cos + table, mask=inside, other=0.0).to(tl.float32)  # (TIMES, PADDED)
    s = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    x += batch * stride_xb + head * stride_xh
    out += batch * stride_ob + head * stride_oh
    source, target = x + wide * stride_xt + dim * stride_xd, out + wide * stride_ot + dim * stride_od
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF * stride_xd, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF * stride_od, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        dim = 2 * HALF + tl.arange(0, PADDED_REST)[None, :]
        inside = (time < length) & (dim < 2 * HALF + REST)
        passed = tl.load(x + wide * stride_xt + dim * stride_xd, mask=inside, other=0.0)
        tl.store(out + wide * stride_ot + dim * stride_od, passed, mask=inside)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    batch, heads, length, dims = x.shape
    half = cos.shape[2]
    if x.stride(1) < x.stride(2):  # heads lie next to each other, as a projection leaves them: so does the result
        out = x.new_empty(batch, length, heads, dims).transpose(1, 2)
    else:
        out = x.new_empty(batch, heads, length, dims)
    padded, rest = triton.next_power_of_2(half), dims - 2 * half
    times = max(1, min(triton.next_power_of_2(length), _ELEMENTS // padded))
    _turn[batch * heads, triton.cdiv(length, times)](
        x, cos, sin, out, heads, length, *x.stride(), *out.stride(), 0 if cos.shape[0] == 1 else length * half,
        TIMES=times, HALF=half, PADDED=padded, REST=rest, PADDED_REST=triton.next_power_of_2(max(1, rest)), BACK=back,
    )  # fmt: skip
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dout, cos, sin, back=True), None, None


@on_device
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `kernels.rope.apply_rope`. float64 runs in eager; float64 tables of other inputs are rounded to float32."""
    if x.dtype == torch.float64 or not cos.shape[2]:
        return eager.apply_rope(x, cos, sin)
    return _Rope.apply(x, cos, sin)
