"""The layers written out, over weights as they are: the specification."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm.reference import rms_norm
from kernels.rope.reference import apply_rope
from kernels.sliding_window.reference import cached_attention
from kernels.swiglu.reference import swiglu


class Packed(NamedTuple):
    """weight (N, K), bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """See `kernels.packed.pack`."""
    return Packed(weight.detach().clone(), None if bias is None else bias.detach().clone())


def linear(x: Tensor, weight: Packed) -> Tensor:
    """See `kernels.packed.linear`."""
    out = x @ weight.weight.T
    return out if weight.bias is None else out + weight.bias


def mlp(x: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """See `kernels.packed.mlp`."""
    return linear(swiglu(*linear(x, gate_up).chunk(2, dim=-1)), down)


def mlp_block(branch: Tensor, stream: Tensor, norm: tuple[Tensor, float], gate_up: Packed, down: Packed) -> Tensor:
    """See `kernels.packed.mlp_block`."""
    total = stream + branch
    return total + mlp(rms_norm(total, *norm), gate_up, down)


def attention(
    x: Tensor, norm: tuple[Tensor, float] | None, qkv: Packed, o: Packed, rope: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor,
    positions: Tensor, heads: int, window: int | None = None, fresh: bool = False,
) -> Tensor:  # fmt: skip
    """See `kernels.packed.attention`."""
    x = x if norm is None else rms_norm(x, *norm)
    batch, length, _ = x.shape
    _, groups, slots, size = keys.shape
    q, k, v = linear(x, qkv).view(batch, length, -1, size).transpose(1, 2).split([heads, groups, groups], dim=1)  # (B, ., T, K)
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    mixed = []
    for t in range(length):  # one by one, so that nothing is written that hides a key that is still seen
        for row in range(batch):
            slot = positions[row, t] % slots
            keys[row, :, slot], values[row, :, slot] = k[row, :, t], v[row, :, t]
        newest, slot = positions[:, t : t + 1], torch.arange(slots)
        held = (newest - (newest - slot) % slots).clamp_min(-1)  # (B, S): the position that a slot holds, -1 where it is empty
        mixed.append(cached_attention(q[:, :, t : t + 1], keys, values, held, newest, window))
    return linear(torch.cat(mixed, dim=2).transpose(1, 2).reshape(batch, length, -1), o)


def pack_mamba(*weights: Packed | Tensor) -> tuple[Packed | Tensor, ...]:
    """See `kernels.packed.pack_mamba`."""
    return weights


def mamba(x: Tensor, norm: tuple[Tensor, float] | None, mixer: Any, taps: Tensor, state: Tensor) -> Tensor:
    """See `kernels.packed.mamba`."""
    in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj = mixer
    x = x if norm is None else rms_norm(x, *norm)
    out = []
    for t in range(x.shape[1]):
        new, z = linear(x[:, t], in_proj).chunk(2, dim=-1)  # (B, C)
        inputs = torch.cat([taps, new[:, None]], dim=1)  # (B, W, C)
        taps.copy_(inputs[:, 1:])
        u = F.silu((inputs * conv_weight.T).sum(dim=1) + conv_bias)
        low, b, c = linear(u, x_proj).tensor_split([-2 * A.shape[1], -A.shape[1]], dim=-1)
        dt = F.softplus(linear(low, dt_proj) + dt_bias)
        state.copy_(torch.exp(dt[..., None] * A) * state + (dt * u)[..., None] * b[:, None])
        y = (state * c[:, None]).sum(dim=-1) + D * u
        out.append(linear(y * F.silu(z), out_proj))
    return torch.stack(out, dim=1)
