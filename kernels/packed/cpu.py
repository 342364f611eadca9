"""The layers by C kernels (packed.c), compiled at first use; what is not float32, or has heads of other sizes, runs in
`eager`, and all on a processor without AVX-512.

A step of decoding reads all weights for a few rows, so these must come without a pause: weights lie in the order in which they are read,
and a layer is one call. One core of a Zen 5, the 17 products of 4 layers of width 256 and a head of 2,048, for 1, 20 and 256 rows, oneDNN /
this: 357 / 149, 751 / 547, 7043 / 6631 microseconds.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import expect_shape
from kernels.compile_c import load_library
from kernels.packed import eager
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.selective_scan.cpu import MAX_STATES
from kernels.swiglu import swiglu

Norm = tuple[Tensor, float]
_LOG2E = math.log2(math.e)


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _numbers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class _Weight(ctypes.Structure):
    """`Packed` of product.h."""

    _fields_ = [*_pointers("panels", "bias"), *_numbers("outputs", "inputs")]


class _Linear(ctypes.Structure):
    """`Linear` of packed.c."""

    _fields_ = [("weight", _Weight), *_pointers("x", "out"), *_numbers("rows", "x_row"), ("threads", ctypes.c_int32)]


class _Mlp(ctypes.Structure):
    """`Mlp` of packed.c."""

    _fields_ = [
        *(("gate_up", _Weight), ("down", _Weight)),
        *_pointers("norm", "x", "residual", "work", "out"),
        *_numbers("rows", "x_row", "residual_row"),
        *(("eps", ctypes.c_float), ("threads", ctypes.c_int32)),
    ]


class _Attention(ctypes.Structure):
    """`Attention` of packed.c."""

    _fields_ = [
        *(("qkv", _Weight), ("o", _Weight)),
        *_pointers("norm", "x", "cos", "sin", "keys", "values", "position", "work", "out"),
        *_numbers("x_row", "row", "head", "slot", "position_row", "table_row"),
        *_numbers("batch", "length", "heads", "groups", "size", "half", "slots", "window"),
        *((name, ctypes.c_float) for name in ("scale_log2", "eps")),
        *((name, ctypes.c_int32) for name in ("fresh", "threads")),
    ]


class _Mamba(ctypes.Structure):
    """`Mamba` of packed.c."""

    _fields_ = [
        *((name, _Weight) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *_pointers("conv_weight", "conv_bias", "A2", "D", "bias", "norm", "x", "history", "state", "work", "result"),
        *_numbers("x_row", "batch", "length", "taps", "states"),
        *(("eps", ctypes.c_float), ("threads", ctypes.c_int32)),
    ]


_library = load_library(Path(__file__).with_name("packed.c"))
for _function, _problem in (
    (_library.packed_linear, _Linear),
    (_library.packed_mlp, _Mlp),
    (_library.packed_attention, _Attention),
    (_library.packed_mamba, _Mamba),
):
    _function.argtypes = [ctypes.POINTER(_problem)]
_MAX_TAPS: int = _library.packed_max_taps()
_PANEL: int = _library.packed_panel()  # outputs that lie together
_SUITS = bool(_library.packed_suits())


class Packed(NamedTuple):
    """A weight in panels (see product.h), and as the kernel reads it. outputs, inputs: N, K."""

    panels: Tensor
    bias: Tensor | None
    raw: _Weight
    outputs: int
    inputs: int


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed | eager.Packed:
    """See `kernels.packed.pack`."""
    if weight.dtype != torch.float32 or not _SUITS:
        return eager.pack(weight, bias)
    outputs, inputs = weight.shape
    count = math.ceil(outputs / _PANEL)
    room = torch.zeros(count * inputs * _PANEL + 16)
    panels = room[-room.data_ptr() // 4 % 16 :][: count * inputs * _PANEL].view(count, inputs, _PANEL)  # at a multiple of 64 bytes
    panels.copy_(F.pad(weight.detach(), (0, 0, 0, count * _PANEL - outputs)).view(count, _PANEL, inputs).transpose(1, 2))
    bias = None if bias is None else bias.detach().float().clone()
    return Packed(panels, bias, _Weight(panels.data_ptr(), None if bias is None else bias.data_ptr(), outputs, inputs), outputs, inputs)


def _rows(x: Tensor, columns: int) -> Tensor:
    """x (..., K) as (M, K) with adjacent columns, a view where that is possible."""
    if x.dtype != torch.float32:
        raise ValueError(f"packed: x is {x.dtype}; the weights were packed as torch.float32")
    if x.shape[-1] != columns:
        raise ValueError(f"packed: x has {x.shape[-1]} columns; the weight has {columns}")
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def linear(x: Tensor, weight: Packed | eager.Packed) -> Tensor:
    """See `kernels.packed.linear`."""
    if not isinstance(weight, Packed):
        return eager.linear(x, weight)
    flat = _rows(x, weight.inputs)
    out = torch.empty(*x.shape[:-1], weight.outputs)
    _library.packed_linear(_Linear(weight.raw, flat.data_ptr(), out.data_ptr(), flat.shape[0], flat.stride(0), torch.get_num_threads()))
    return out


def mlp(x: Tensor, gate_up: Packed | eager.Packed, down: Packed | eager.Packed) -> Tensor:
    """See `kernels.packed.mlp`."""
    if not isinstance(gate_up, Packed) or not isinstance(down, Packed):
        return linear(swiglu(*linear(x, gate_up).chunk(2, dim=-1)), down)
    return _mlp(x, None, None, 0.0, gate_up, down)


def mlp_block(branch: Tensor, stream: Tensor, norm: Norm, gate_up: Packed | eager.Packed, down: Packed | eager.Packed) -> Tensor:
    """See `kernels.packed.mlp_block`."""
    if not isinstance(gate_up, Packed) or not isinstance(down, Packed):
        normed, total = add_rms_norm(branch, stream, *norm)
        return total + mlp(normed, gate_up, down)
    return _mlp(branch, stream, *norm, gate_up, down)


def _mlp(x: Tensor, residual: Tensor | None, norm: Tensor | None, eps: float, gate_up: Packed, down: Packed) -> Tensor:
    flat, other = _rows(x, gate_up.inputs), None if residual is None else _rows(residual, down.outputs)
    rows = flat.shape[0]
    norm = None if norm is None else norm.float().contiguous()
    out, work = torch.empty(x.shape), torch.empty(rows, gate_up.outputs + down.outputs)
    problem = _Mlp(
        gate_up.raw, down.raw, None if norm is None else norm.data_ptr(), flat.data_ptr(), None if other is None else other.data_ptr(),
        work.data_ptr(), out.data_ptr(), rows, flat.stride(0), 0 if other is None else other.stride(0), eps, torch.get_num_threads(),
    )  # fmt: skip
    _library.packed_mlp(problem)
    return out


def attention(
    x: Tensor, norm: Norm | None, qkv: Packed | eager.Packed, o: Packed | eager.Packed, rope: tuple[Tensor, Tensor] | None, keys: Tensor,
    values: Tensor, positions: Tensor, heads: int, window: int | None = None, fresh: bool = False,
) -> Tensor:  # fmt: skip
    """See `kernels.packed.attention`. The C path takes float32 caches of one layout, and heads of a multiple of 16 numbers."""
    batch, length, _ = x.shape
    _, groups, slots, size = keys.shape
    strides = keys.stride()
    suits = (
        keys.dtype == values.dtype == torch.float32 and size % 16 == 0 and size <= 256 and strides[3] == 1 and values.stride() == strides
    )
    if not isinstance(qkv, Packed) or not isinstance(o, Packed) or not suits:
        x = x if norm is None else rms_norm(x, *norm)
        return linear(eager.mix(linear(x, qkv), rope, keys, values, positions, heads, window, fresh), o)
    flat, (cos, sin) = _rows(x, qkv.inputs), (None, None) if rope is None else (table.contiguous() for table in rope)
    out, work = torch.empty(x.shape), torch.empty(batch * length, qkv.outputs + o.inputs + qkv.inputs)
    weight = None if norm is None else norm[0].float().contiguous()
    turns = (0, 0) if cos is None else (0 if cos.shape[0] == 1 else cos.stride(0), cos.shape[2])
    problem = _Attention(
        qkv.raw, o.raw, None if weight is None else weight.data_ptr(), flat.data_ptr(), None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(), keys.data_ptr(), values.data_ptr(), positions.data_ptr(), work.data_ptr(), out.data_ptr(),
        flat.stride(0), *strides[:3], positions.stride(0), turns[0], batch, length, heads, groups, size, turns[1], slots, window or 0,
        _LOG2E / math.sqrt(size), 0.0 if norm is None else norm[1], fresh, torch.get_num_threads(),
    )  # fmt: skip
    if _library.packed_attention(problem):
        raise MemoryError(f"packed attention: no memory for the scores of {slots} slots")
    return out


class Mamba(NamedTuple):
    """The weights as they are, contiguous float32, and A log2(e) (N, C)."""

    weights: eager.Mamba
    A2: Tensor


def pack_mamba(
    in_proj: Any, conv_weight: Tensor, conv_bias: Tensor, x_proj: Any, dt_proj: Any, dt_bias: Tensor, A: Tensor, D: Tensor, out_proj: Any
) -> Mamba | eager.Mamba:
    """See `kernels.packed.pack_mamba`."""
    weights = eager.pack_mamba(in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj)
    plain = all(part.dtype == torch.float32 if isinstance(part, Tensor) else isinstance(part, Packed) for part in weights)
    if not plain or conv_weight.shape[1] > _MAX_TAPS or A.shape[1] > MAX_STATES:
        return weights
    (channels, states), width, rank = A.shape, in_proj.inputs, dt_proj.inputs
    expected = {"in_proj": (2 * channels, width), "x_proj": (rank + 2 * states, channels), "dt_proj": (channels, rank)}
    for name, shape in (expected | {"out_proj": (width, channels)}).items():
        if (found := (getattr(weights, name).outputs, getattr(weights, name).inputs)) != shape:
            raise ValueError(f"pack_mamba: {name} is of {found}; expected {shape}")
    return Mamba(weights, (weights.A * _LOG2E).t().contiguous())


def mamba(x: Tensor, norm: Norm | None, mixer: Mamba | eager.Mamba, taps: Tensor, state: Tensor) -> Tensor:
    """See `kernels.packed.mamba`. The C path takes float32 states that are contiguous."""
    if isinstance(mixer, eager.Mamba):
        return eager.mamba(x, norm, mixer, taps, state, linear)
    w = mixer.weights
    if any(part.dtype != torch.float32 or not part.is_contiguous() for part in (taps, state)):
        return eager.mamba(x, norm, w, taps, state, linear)
    (batch, length, _), flat = x.shape, _rows(x, w.in_proj.inputs)
    (channels, states), past = w.A.shape, w.conv_weight.shape[1] - 1
    expect_shape("mamba", "state", state, batch, channels, states, letters="(B, C, N)")
    expect_shape("mamba", "taps", taps, batch, past, channels, letters="(B, W-1, C)")
    out, work = torch.empty(x.shape), torch.empty(batch * length, 2 * w.in_proj.outputs + w.x_proj.outputs + w.in_proj.inputs)
    weight = None if norm is None else norm[0].float().contiguous()
    problem = _Mamba(
        w.in_proj.raw, w.x_proj.raw, w.dt_proj.raw, w.out_proj.raw, w.conv_weight.data_ptr(), w.conv_bias.data_ptr(), mixer.A2.data_ptr(),
        w.D.data_ptr(), w.dt_bias.data_ptr(), None if weight is None else weight.data_ptr(), flat.data_ptr(), taps.data_ptr(),
        state.data_ptr(), work.data_ptr(), out.data_ptr(), flat.stride(0), batch, length, taps.shape[1] + 1, state.shape[2],
        0.0 if norm is None else norm[1], torch.get_num_threads(),
    )  # fmt: skip
    _library.packed_mamba(problem)
    return out
