"""The layers from operators: products by oneDNN with weights in its own layout where torch has it (32 x 256 x 1408 on one core of a Zen 5:
107 us; torch's own 233 us), all else by the ops of this package.

Rows of such products have the same bits however many rows there are in most shapes; torch's own differ below 4 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from kernels.selective_scan import selective_state_update
from kernels.sliding_window import attention as whole_attention
from kernels.sliding_window import cached_attention
from kernels.swiglu import swiglu

_ROWS_HINT = 32  # rows that the layout is chosen for; any number may come


class Packed(NamedTuple):
    """weight (N, K), in oneDNN's layout or as it is; bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None
    onednn: bool


def has_onednn() -> bool:
    """Whether torch has the two operators, which its own compiler uses and no documentation promises."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """See `kernels.packed.pack`."""
    onednn = weight.dtype == torch.float32 and weight.device.type == "cpu" and has_onednn()
    weight, bias = weight.detach(), None if bias is None else bias.detach().clone()
    if onednn:
        return Packed(cast(Any, torch.ops.mkldnn)._reorder_linear_weight(weight, _ROWS_HINT), bias, True)
    return Packed(weight.clone(), bias, False)


def linear(x: Tensor, weight: Packed) -> Tensor:
    """See `kernels.packed.linear`."""
    if not weight.onednn:
        return F.linear(x, weight.weight, weight.bias)
    return cast(Any, torch.ops.mkldnn)._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")


def mlp(x: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """See `kernels.packed.mlp`."""
    return linear(swiglu(*linear(x, gate_up).chunk(2, dim=-1)), down)


def mlp_block(branch: Tensor, stream: Tensor, norm: tuple[Tensor, float], gate_up: Packed, down: Packed) -> Tensor:
    """See `kernels.packed.mlp_block`."""
    normed, total = add_rms_norm(branch, stream, *norm)
    return total + mlp(normed, gate_up, down)


def mix(
    heads_qkv: Tensor, rope: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, positions: Tensor, heads: int, window: int | None,
    fresh: bool,
) -> Tensor:  # fmt: skip
    """What `attention` does between its projections: (B, T, (H+2G) K) to (B, T, H K)."""
    batch, length, _ = heads_qkv.shape
    _, groups, slots, size = keys.shape
    qk, v = heads_qkv.view(batch, length, -1, size).transpose(1, 2).split([heads + groups, groups], dim=1)  # (B, ., T, K)
    if rope is not None:
        qk = apply_rope(qk, *rope)
    q, k = qk.split([heads, groups], dim=1)
    rows, written = torch.arange(batch, device=keys.device)[:, None], positions[:, -slots:] % slots
    keys[rows, :, written] = k[:, :, -slots:].transpose(1, 2)
    values[rows, :, written] = v[:, :, -slots:].transpose(1, 2)
    if fresh:
        mixed = whole_attention(q, k, v, window)
    else:
        newest = positions[:, -1:]
        held = newest - (newest - torch.arange(slots, device=keys.device)) % slots  # (B, S): the position of a slot, below 0 where empty
        mixed = cached_attention(q, keys, values, held.clamp_min(-1), positions, window)
    return mixed.transpose(1, 2).reshape(batch, length, -1)


def attention(
    x: Tensor, norm: tuple[Tensor, float] | None, qkv: Packed, o: Packed, rope: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor,
    positions: Tensor, heads: int, window: int | None = None, fresh: bool = False,
) -> Tensor:  # fmt: skip
    """See `kernels.packed.attention`."""
    x = x if norm is None else rms_norm(x, *norm)
    return linear(mix(linear(x, qkv), rope, keys, values, positions, heads, window, fresh), o)


class Mamba(NamedTuple):
    """Packed projections, and the tensors of `kernels.packed.pack_mamba`."""

    in_proj: Any
    conv_weight: Tensor
    conv_bias: Tensor
    x_proj: Any
    dt_proj: Any
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    out_proj: Any


def pack_mamba(
    in_proj: Any, conv_weight: Tensor, conv_bias: Tensor, x_proj: Any, dt_proj: Any, dt_bias: Tensor, A: Tensor, D: Tensor, out_proj: Any
) -> Mamba:
    """See `kernels.packed.pack_mamba`."""
    own = (conv_weight, conv_bias, dt_bias, A, D)
    weight, shift, bias, decay, skip = (tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in own)
    return Mamba(in_proj, weight, shift, x_proj, dt_proj, bias, decay, skip, out_proj)


def mamba(
    x: Tensor, norm: tuple[Tensor, float] | None, mixer: Mamba, taps: Tensor, state: Tensor, linear: Callable[..., Tensor] = linear
) -> Tensor:
    """See `kernels.packed.mamba`. linear: of the packed projections."""
    states = mixer.A.shape[1]
    u, z = linear(x if norm is None else rms_norm(x, *norm), mixer.in_proj).chunk(2, dim=-1)
    u, last = causal_conv1d(u, mixer.conv_weight, mixer.conv_bias, activation="silu", initial_state=taps)
    low = linear(u, mixer.x_proj)
    dt, b, c = low.split([low.shape[-1] - 2 * states, states, states], dim=-1)
    taps.copy_(last)
    y = selective_state_update(state, u, linear(dt, mixer.dt_proj), mixer.A, b, c, mixer.D, z, mixer.dt_bias, dt_softplus=True)
    return linear(y, mixer.out_proj)
