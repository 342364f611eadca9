"""Causal convolution as Triton kernels over tiles of (time, channels), W shifted loads each. Compiled for sm_80, sm_90; never run on a GPU.

The backward computes the pre-activation again instead of keeping it. The gradients of taps and bias are written once per program and summed
afterwards, in one order: no atomics, the same bits every time. float64 inputs run in eager.py: they serve as a check.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.causal_conv1d import eager
from kernels.launch import dense_channels, on_device_of

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def _append(items, item):
    return items + (item,)  # noqa: RUF005  (the compiler knows no unpacking here)


@triton.jit
def _positions(x, h0, t, d, in_d, length, dim, x_t, W: tl.constexpr):
    """(BT, BD) fp32: the inputs at positions t, from the state where t < 0, and zero outside."""
    inside = in_d[None, :] & (t[:, None] < length)
    value = tl.load(x + t[:, None].to(tl.int64) * x_t + d[None, :], mask=inside & (t[:, None] >= 0), other=0.0).to(tl.float32)
    if h0 is not None:
        before = inside & (t[:, None] < 0) & (t[:, None] > -W)
        value += tl.load(h0 + (t[:, None] + W - 1) * dim + d[None, :], mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _starts(start, t, length):
    """(BT,) int: whether a document starts at t."""
    return tl.load(start + t, mask=(t >= 0) & (t < length), other=0).to(tl.int32)


@triton.jit
def _write_state(x, h0, start, state, d, in_d, length, dim, x_t, W: tl.constexpr):
    """The last W - 1 inputs, zero where they belong to an earlier document than the last position."""
    last = length - 1 + tl.zeros((1,), tl.int32)
    crossed = tl.zeros((1,), tl.int32)
    for back in tl.static_range(W - 1):
        value = _positions(x, h0, last - back, d, in_d, length, dim, x_t, W)  # (1, BD)
        if start is not None:
            value = tl.where(crossed[:, None] > 0, 0.0, value)
            crossed += _starts(start, last - back, length)
        tl.store(state + (W - 2 - back) * dim + d[None, :], value, mask=in_d[None, :])


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    x, weight, bias, h0, start, y, state, length, dim, tiles, spans, x_b, x_t,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One tile of y; the program of a sequence's first tile writes its state too. x_b, x_t: strides over sequences and positions."""
    batch = (tl.program_id(0) // (tiles * spans)).to(tl.int64)
    span = tl.program_id(0) // tiles % spans
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    t = span * BT + tl.arange(0, BT)
    in_d = d < dim
    x += batch * x_b
    y += batch * length * dim
    state += batch * (W - 1) * dim
    if h0 is not None:
        h0 += batch * (W - 1) * dim
    if start is not None:
        start += batch * length
    pre = tl.zeros((BT, BD), tl.float32)
    if bias is not None:
        pre += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    crossed = tl.zeros((BT,), tl.int32)  # a document starts after t - back, up to t
    for back in tl.static_range(W):
        value = _positions(x, h0, t - back, d, in_d, length, dim, x_t, W)
        if start is not None:  # selected, not multiplied: infinity and NaN go too
            value = tl.where(crossed[:, None] > 0, 0.0, value)
            crossed += _starts(start, t - back, length)
        pre += value * tl.load(weight + d * W + (W - 1 - back), mask=in_d, other=0.0).to(tl.float32)[None, :]
    if SILU:
        pre *= _sigmoid(pre)
    tl.store(y + t[:, None].to(tl.int64) * dim + d[None, :], pre, mask=in_d[None, :] & (t[:, None] < length))
    if span == 0:
        _write_state(x, h0, start, state, d, in_d, length, dim, x_t, W)


@triton.jit
def _tap_gradients(dtaps, g, valid, values, starts, RESETS: tl.constexpr, W: tl.constexpr, BT: tl.constexpr):
    """dtaps, tap W-1-back at index back, with those of one tile added; positions before the first may hold anything."""
    crossed = tl.zeros((BT,), tl.int32)
    sums = ()
    for back in tl.static_range(W):
        value = values[W - 1 - back]
        if RESETS:
            value = tl.where(crossed[:, None] > 0, 0.0, value)
            crossed += starts[W - 1 - back]
        sums = _append(sums, dtaps[back] + tl.where(valid, g * value, 0.0))
    return sums


@triton.jit(do_not_specialize=["length"])
def _backward_kernel(
    x, weight, bias, h0, start, dy, dstate, dx, dh0, dweight, dbias, length, dim, tiles, spans, x_b, x_t, dy_b, dy_t,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ROUNDS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """ROUNDS tiles of dx, one after another in time; positions -W+1..-1 are those of the state.

    dweight: (B * spans, W, D). dbias: (B * spans, D).
    """
    batch = (tl.program_id(0) // (tiles * spans)).to(tl.int64)
    span = tl.program_id(0) // tiles % spans
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    in_d = d < dim
    x += batch * x_b
    dy += batch * dy_b
    dx += batch * length * dim
    dstate += batch * (W - 1) * dim
    if h0 is not None:
        h0 += batch * (W - 1) * dim
        dh0 += batch * (W - 1) * dim
    if start is not None:
        start += batch * length
    shift = tl.zeros((BD,), tl.float32)
    if bias is not None:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    taps, dtaps = (), ()
    for k in tl.static_range(W):
        taps = _append(taps, tl.load(weight + d * W + k, mask=in_d, other=0.0).to(tl.float32)[None, :])
        dtaps = _append(dtaps, tl.zeros((BT, BD), tl.float32))
    dshift = tl.zeros((BT, BD), tl.float32)
    for tile in range(ROUNDS):
        t = (span * ROUNDS + tile) * BT - (W - 1) + tl.arange(0, BT)
        values, starts = (), ()  # of positions t-W+1 .. t+W-1
        for offset in tl.static_range(2 * W - 1):
            values = _append(values, _positions(x, h0, t + (offset - W + 1), d, in_d, length, dim, x_t, W))
            if start is not None:
                starts = _append(starts, _starts(start, t + (offset - W + 1), length))
        out = tl.zeros((BT, BD), tl.float32)
        crossed = tl.zeros((BT,), tl.int32)  # a document starts after t, up to t + ahead
        kept = tl.zeros((BT,), tl.int32)  # the last position's state holds t
        for ahead in tl.static_range(W):
            s = t + ahead
            valid = in_d[None, :] & (s[:, None] >= 0) & (s[:, None] < length)
            g = tl.load(dy + s[:, None].to(tl.int64) * dy_t + d[None, :], mask=valid, other=0.0).to(tl.float32)
            if SILU:
                pre = tl.zeros((BT, BD), tl.float32) + shift[None, :]
                gone = tl.zeros((BT,), tl.int32)
                for back in tl.static_range(W):
                    value = values[W - 1 + ahead - back]  # type: ignore[var-annotated]
                    if start is not None:
                        value = tl.where(gone[:, None] > 0, 0.0, value)
                        gone += starts[W - 1 + ahead - back]
                    pre += value * taps[W - 1 - back]
                gate = _sigmoid(pre)
                g = tl.where(valid, g * gate * (1.0 + pre * (1.0 - gate)), 0.0)
            if start is not None and ahead > 0:
                crossed += starts[W - 1 + ahead]
            kept = tl.where((s == length - 1) & (crossed == 0), 1, kept)
            out += tl.where(crossed[:, None] > 0, 0.0, g) * taps[W - 1 - ahead]
            if ahead == 0:
                dshift += g
                dtaps = _tap_gradients(dtaps, g, valid, values, starts, start is not None, W, BT)
        if W > 1:
            row = t - (length - W + 1)
            in_state = in_d[None, :] & ((row >= 0) & (kept > 0))[:, None]
            out += tl.load(dstate + row[:, None] * dim + d[None, :], mask=in_state, other=0.0).to(tl.float32)
        inside = in_d[None, :] & (t[:, None] < length)
        tl.store(dx + t[:, None].to(tl.int64) * dim + d[None, :], out, mask=inside & (t[:, None] >= 0))
        if h0 is not None:
            tl.store(dh0 + (t[:, None] + W - 1) * dim + d[None, :], out, mask=inside & (t[:, None] < 0))
    part = batch * spans + span
    for k in tl.static_range(W):
        tl.store(dweight + (part * W + k) * dim + d, tl.sum(dtaps[W - 1 - k], axis=0), mask=in_d)
    if bias is not None:
        tl.store(dbias + part * dim + d, tl.sum(dshift, axis=0), mask=in_d)


# Tiles of a program, chosen by register use (8 elements a thread and tensor forward, 4 of the 15 tensors backward), not by measurement.
_FORWARD_TIME, _BACKWARD_TIME, _CHANNELS, _WARPS = 16, 8, 64, 4
_ROUNDS = 16  # tiles of the backward that share one partial sum of the taps' gradients: 128 positions


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _flags(start: Tensor | None) -> Tensor | None:
    return None if start is None else start.contiguous().view(torch.uint8)


def _at_most(size: int, needed: int) -> int:
    return min(size, triton.next_power_of_2(needed))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = dense_channels(x)
    batch, length, dim = x.shape
    width = weight.shape[1]
    time, channels = _at_most(_FORWARD_TIME, length), _at_most(_CHANNELS, dim)
    tiles, spans = triton.cdiv(dim, channels), triton.cdiv(length, time)
    y, state = (torch.empty((batch, rows, dim), dtype=x.dtype, device=x.device) for rows in (length, width - 1))
    with on_device_of(x):
        _forward_kernel[(batch * tiles * spans,)](
            x, weight.contiguous(), _dense(bias), _dense(history), _flags(start), y, state, length, dim, tiles, spans,
            x.stride(0), x.stride(1), W=width, BT=time, BD=channels, SILU=silu, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y, state


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, history, start)
        ctx.silu = silu
        return _forward(x, weight, bias, silu, history, start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, history, start = ctx.saved_tensors
        x, dy = dense_channels(x), dense_channels(dy)
        batch, length, dim = x.shape
        width = weight.shape[1]
        time, channels = _at_most(_BACKWARD_TIME, length), _at_most(_CHANNELS, dim)
        rounds = _at_most(_ROUNDS, triton.cdiv(length + width - 1, time))
        tiles, spans = triton.cdiv(dim, channels), triton.cdiv(length + width - 1, time * rounds)
        dx = x.new_empty(batch, length, dim)
        dhistory = None if history is None else history.new_empty(batch, width - 1, dim)
        dweight = torch.empty((batch * spans, width, dim), dtype=torch.float32, device=x.device)
        dbias = None if bias is None else dweight.new_empty(batch * spans, dim)
        with on_device_of(x):
            _backward_kernel[(batch * tiles * spans,)](
                x, weight.contiguous(), _dense(bias), _dense(history), _flags(start), dy, dstate.contiguous(), dx, dhistory, dweight, dbias,
                length, dim, tiles, spans, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
                W=width, BT=time, BD=channels, ROUNDS=rounds, SILU=ctx.silu, num_warps=_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        dweight = dweight.sum(0).t().to(weight.dtype)
        return dx, dweight, None if bias is None or dbias is None else dbias.sum(0).to(bias.dtype), None, dhistory, None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.causal_conv1d.causal_conv1d`."""
    if x.dtype == torch.float64:
        return eager.causal_conv1d(x, weight, bias, activation, initial_state, document_start)
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, activation == "silu", initial_state, document_start)
    return _CausalConv.apply(x, weight, bias, activation == "silu", initial_state, document_start)
