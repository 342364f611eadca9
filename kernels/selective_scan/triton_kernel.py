"""Selective scan as Triton kernels: softplus, bias, skip and gate fused, state in registers. Compiled for sm_80, sm_90; never run on a GPU.

A program owns one sequence and a tile of BD channels and walks through time in groups of steps. What has no state index (step sizes, gates,
their derivatives) is computed for a group at once, (BD, STEPS); the recurrence takes one column of that after the other. Every few groups
the forward keeps the state; the backward goes from the last group to the first, replays each from the last state kept before it, and holds
the states of that one group in registers. Gradients that sum over channels (B, C) or sequences (A, D, the bias) are written once a program
and summed afterwards, in one order: no atomics, the same bits every time.

float64 inputs run in eager.py: they serve as a check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import dense_channels, on_device_of
from kernels.selective_scan import eager
from kernels.selective_scan._triton_backward import backward_kernel
from kernels.selective_scan._triton_forward import forward_kernel

# One warp a program, so that no reduction crosses warps, and 8 states a thread at N = 16. With 4 steps a group the compiler lays the
# (BD, 4) tiles and the (BD, 16) state out alike, and no transcendental is computed twice. Chosen by counting instructions of the sm_90
# binary (bfloat16, N = 16: 124 a step and warp forward, 320 backward, 73 for each step replayed), not by time: nothing ran on a GPU.
_STEPS = 4
_KEPT_GROUPS = 4  # the forward keeps the state of every 16th step for the backward: 4 bytes an element of u at N = 16
_TILE_ELEMENTS = 256  # partial sums of dB and dC: 8 bytes an element of u at N = 16
_BACKWARD_REGISTERS = 168  # so that three warps fit on a scheduler; a dozen values a group are spilled, none at 255
_MAX_STATES = 256


def _tile(states: int) -> tuple[int, int]:
    """N padded to a power of two, and channels a tile."""
    padded = triton.next_power_of_2(states)
    return padded, max(1, min(64, _TILE_ELEMENTS // padded))


def _inputs(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    h0: Tensor | None, start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The arguments as the kernels read them. B and C in float32, since every program of a sequence would convert them anew."""
    if u.shape[1] > 1:
        B, C = B.float(), C.float()
    D, bias, h0 = (None if x is None else x.contiguous() for x in (D, bias, h0))
    flags = None if start is None else start.contiguous().view(torch.uint8)
    return (
        dense_channels(u),
        dense_channels(dt),
        A.contiguous(),
        dense_channels(B),
        dense_channels(C),
        D,
        None if z is None else dense_channels(z),
        bias,
        h0,
        flags,
    )


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


def _forward(arguments: Sequence[Tensor | None], softplus: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, final state, and the kept states (B, ., D, N) or None."""
    u, dt, A, B, C, D, z, bias, h0, start = _inputs(*arguments)  # type: ignore[arg-type]
    batch, length, dim = u.shape
    states = A.shape[1]
    padded, channels = _tile(states)
    kept = _STEPS * _KEPT_GROUPS
    y = torch.empty((batch, length, dim), dtype=u.dtype, device=u.device)
    final = torch.empty((batch, dim, states), dtype=torch.float32, device=u.device)
    saved = final.new_empty(batch, triton.cdiv(length, kept), dim, states) if keep else None
    tiles = triton.cdiv(dim, channels)
    with on_device_of(u):
        forward_kernel[(batch * tiles,)](
            u, dt, A, B, C, D, z, bias, h0, start, y, final, saved, length, dim, tiles, *_strides(u, dt, B, C, z),
            N=states, NP=padded, BD=channels, STEPS=min(_STEPS, triton.next_power_of_2(length)), KEPT=kept, SOFTPLUS=softplus,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y, final, saved


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, softplus: bool, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        y, final, saved = _forward(arguments, softplus, keep=any(ctx.needs_input_grad))
        ctx.softplus = softplus
        ctx.save_for_backward(*arguments, saved)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, saved = ctx.saved_tensors
        u, dt, A, B, C, D, z, bias, h0, start = _inputs(*arguments)
        batch, length, dim = u.shape
        states = A.shape[1]
        padded, channels = _tile(states)
        tiles = triton.cdiv(dim, channels)
        dy, dfinal = dense_channels(dy), dfinal.contiguous()
        du, ddt, dz = (None if x is None else x.new_empty(batch, length, dim) for x in (u, dt, z))
        dA, dh0 = saved.new_empty(batch, dim, states), None if h0 is None else saved.new_empty(batch, dim, states)
        dB, dC = (saved.new_empty(tiles, batch, length, states) for _ in range(2))
        dD, dbias = (None if x is None else saved.new_empty(batch, dim) for x in (D, bias))
        with on_device_of(u):
            backward_kernel[(batch * tiles,)](
                u, dt, A, B, C, D, z, bias, start, saved, dy, dfinal, du, ddt, dA, dB, dC, dD, dz, dbias, dh0, length, dim, tiles,
                *_strides(u, dt, B, C, z, dy),
                N=states, NP=padded, BD=channels, STEPS=_STEPS, GROUPS=_KEPT_GROUPS, SOFTPLUS=ctx.softplus,
                num_warps=1, maxnreg=_BACKWARD_REGISTERS, enable_fp_fusion=True,
            )  # fmt: skip
        dA, dB, dC, dD, dbias = (None if parts is None else parts.sum(0) for parts in (dA, dB, dC, dD, dbias))
        found = (du, ddt, dA, dB, dC, dD, dz, dbias, dh0)
        return (None, *(None if g is None else g.to(x.dtype) for g, x in zip(found, arguments)), None)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.selective_scan.selective_scan`.

    Raises: ValueError for more than 256 states a channel.
    """
    if u.dtype == torch.float64:
        return eager.selective_scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, document_start)
    if A.shape[1] > _MAX_STATES:
        raise ValueError(f"selective_scan: A has N = {A.shape[1]} states; the Triton kernels take at most {_MAX_STATES}")
    if not torch.is_grad_enabled():
        return _forward((u, dt, A, B, C, D, z, dt_bias, initial_state, document_start), dt_softplus, keep=False)[:2]
    return _Scan.apply(dt_softplus, u, dt, A, B, C, D, z, dt_bias, initial_state, document_start)


def selective_state_update(state: Tensor, *inputs: Any) -> Tensor:
    """See `kernels.selective_scan.selective_state_update`."""
    arguments: Any = (*inputs, state)
    y, final = selective_scan(*arguments)
    state.copy_(final)
    return y
