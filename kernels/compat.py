"""The functions of mamba_ssm and causal_conv1d under their own names and layouts, run by the kernels of this project on any device.

Code written for those packages needs its imports changed and nothing else, as far as a layer with input-dependent B and C goes:

    from kernels.compat import causal_conv1d_fn, causal_conv1d_update, selective_scan_fn, selective_state_update

What is not offered (constant, complex or grouped B and C, heads) is a ValueError, never another result. Everything but the two updates,
which write to a state in place, is differentiable, initial and final convolution state and the last scan state included.
Tested on the CPU; these adapters themselves have not been run on a GPU.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.checks import expect_dims, expect_shape
from kernels.selective_scan import selective_scan

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "selective_scan_fn", "selective_state_update"]


@overload
def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., return_last_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., *, return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's selective scan on channel-major tensors; see `kernels.selective_scan.selective_scan`.

    Args:
        u, delta, z: (B, D, L). A: (D, N) real. D, delta_bias: (D,).
        B, C: (B, N, L), or (B, 1, N, L) with its one group.

    Returns: (B, D, L) in u's dtype; with `return_last_state` also the state (B, D, N) in float32, here with a gradient.
    Raises: ValueError for shapes that do not fit, for B or C of several groups or constant in time, and for complex A.

    >>> u = torch.ones(1, 1, 3)
    >>> [round(v, 3) for v in selective_scan_fn(u, u, -torch.ones(1, 1), u, u).flatten().tolist()]
    [1.0, 1.368, 1.503]
    """
    op = "selective_scan_fn"
    expect_dims(op, "u", u, 3, "(B, D, L)")
    if A.is_complex():
        raise ValueError(f"{op}: A is complex; a real (D, N) is expected")
    expect_dims(op, "A", A, 2, "(D, N)")
    batch, channels, length = u.shape
    states = A.shape[1]
    expect_shape(op, "delta", delta, batch, channels, length, letters="(B, D, L)")
    expect_shape(op, "z", z, batch, channels, length, letters="(B, D, L)")
    b, c = (_time_major(op, name, t, batch, channels, states, length) for name, t in (("B", B), ("C", C)))
    gate = None if z is None else z.transpose(1, 2)
    y, state = selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, b, c, D, gate, delta_bias, delta_softplus)
    y = y.transpose(1, 2)  # (B, D, L)
    return (y, state) if return_last_state else y


def _time_major(op: str, name: str, tensor: Tensor, batch: int, channels: int, states: int, length: int) -> Tensor:
    """(B, N, L) or (B, 1, N, L) as (B, L, N)."""
    if tensor.dim() == 2 and tensor.shape == (channels, states):
        raise ValueError(f"{op}: {name} is constant in time, (D, N) = {(channels, states)}; only (B, N, L) is offered")
    if tensor.dim() == 4:
        if tensor.shape[1] != 1:
            raise ValueError(f"{op}: {name} has {tensor.shape[1]} groups; only one, (B, N, L) or (B, 1, N, L), is offered")
        tensor = tensor[:, 0]
    expect_shape(op, name, tensor, batch, states, length, letters="(B, N, L)")
    return tensor.transpose(1, 2)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Advance mamba_ssm's scan by one token. state: (B, D, N), written in place, keeping its dtype.

    Args: x, dt, z: (B, D). A: (D, N). B, C: (B, N). D, dt_bias: (D,).
    Returns: (B, D) in x's dtype.
    Raises: ValueError for shapes that do not fit; states with heads (Mamba-2) are not offered.

    >>> state = torch.zeros(1, 1, 1)
    >>> one = torch.ones(1, 1)
    >>> float(selective_state_update(state, one, one, -one, one, one)), float(state)
    (1.0, 1.0)
    """
    op = "selective_state_update"
    expect_dims(op, "state", state, 3, "(B, D, N)")
    batch, channels, states = state.shape
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        expect_shape(op, name, tensor, batch, channels, letters="(B, D)")
    for name, tensor in (("B", B), ("C", C)):
        expect_shape(op, name, tensor, batch, states, letters="(B, N)")
    expect_shape(op, "A", A, channels, states, letters="(D, N)")
    gate = None if z is None else z[:, None]
    y, last = selective_scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, dt_softplus, initial_state=state)
    state.copy_(last)
    return y[:, 0]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_conv1d's convolution on channel-major tensors; see `kernels.causal_conv1d.causal_conv1d`.

    Args:
        x: (B, D, L). weight: (D, W). bias: (D,). activation: None, "silu" or "swish".
        seq_idx: (B, L) int: which packed sequence a position belongs to; taps never reach into another one. Below 0 is padding: y is 0.
        initial_states: (B, D, W-1) inputs before x, oldest first.
        final_states_out: (B, D, W-1) tensor that takes the final states, without a gradient.

    Returns: (B, D, L) in x's dtype; with `return_final_states` also the last W-1 inputs, (B, D, W-1).
    Raises: ValueError for shapes or an activation that do not fit, and for seq_idx together with states, as there.

    >>> causal_conv1d_fn(torch.ones(1, 1, 3), torch.tensor([[1.0, 10.0]])).flatten().tolist()
    [10.0, 11.0, 11.0]
    """
    op = "causal_conv1d_fn"
    expect_dims(op, "x", x, 3, "(B, D, L)")
    expect_dims(op, "weight", weight, 2, "(D, W)")
    batch, channels, length = x.shape
    taps = weight.shape[1] - 1
    expect_shape(op, "initial_states", initial_states, batch, channels, taps, letters="(B, D, W-1)")
    expect_shape(op, "final_states_out", final_states_out, batch, channels, taps, letters="(B, D, W-1)")
    expect_shape(op, "seq_idx", seq_idx, batch, length, letters="(B, L)")
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise ValueError(f"{op}: seq_idx excludes initial_states and return_final_states: a state belongs to one sequence")
    if final_states_out is not None and not return_final_states:
        raise ValueError(f"{op}: final_states_out is given, but return_final_states is False")
    start = None if seq_idx is None else F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))  # (B, L)
    before = None if initial_states is None else initial_states.transpose(1, 2)
    y, last = causal_conv1d(x.transpose(1, 2), weight, bias, _activation(op, activation), before, start)
    y, last = y.transpose(1, 2), last.transpose(1, 2)  # (B, D, L), (B, D, W-1)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[:, None], 0.0)
    if not return_final_states:
        return y
    if final_states_out is not None:
        last = final_states_out.copy_(last.detach())
    return y, last


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """Advance causal_conv1d's convolution by the tokens of x, in place. conv_state: (B, D, S) with S >= W-1, newest last.

    W-1 columns are all that is needed; the W of mamba_ssm and transformers have one more, the oldest, which is only shifted along.

    Args:
        x: (B, D) or (B, D, L). weight: (D, W). bias: (D,). activation: None, "silu" or "swish".
        cache_seqlens: (B,) int: conv_state is a ring instead, and token t of row b lives in column (cache_seqlens[b] + t) mod S.

    Returns: x's shape and dtype.
    Raises: ValueError for shapes or an activation that do not fit.

    >>> state = torch.tensor([[[9.0, 1.0]]])
    >>> causal_conv1d_update(torch.tensor([[2.0]]), state, torch.tensor([[1.0, 10.0]])).item(), state.flatten().tolist()
    (21.0, [1.0, 2.0])
    """
    op = "causal_conv1d_update"
    expect_dims(op, "conv_state", conv_state, 3, "(B, D, S)")
    expect_dims(op, "weight", weight, 2, "(D, W)")
    batch, channels, columns = conv_state.shape
    taps = weight.shape[1] - 1
    if columns < taps:
        raise ValueError(f"{op}: conv_state has {columns} columns; expected at least W-1 = {taps}")
    tokens = x[:, :, None] if x.dim() == 2 else x
    expect_dims(op, "x", tokens, 3, "(B, D) or (B, D, L)")
    expect_shape(op, "x", tokens, batch, channels, tokens.shape[2], letters="(B, D) or (B, D, L)")
    expect_shape(op, "cache_seqlens", cache_seqlens, batch, letters="(B,)")
    length = tokens.shape[2]
    places = None
    if cache_seqlens is None:
        before = conv_state[:, :, columns - taps :]
    else:
        first = cache_seqlens.long()[:, None]  # (B, 1)
        back = torch.arange(-taps, 0, device=x.device)
        before = conv_state.gather(2, ((first + back) % columns)[:, None].expand(-1, channels, -1))
        places = ((first + torch.arange(length, device=x.device)) % columns)[:, None].expand(-1, channels, -1)  # (B, D, L)
    y, _ = causal_conv1d(tokens.transpose(1, 2), weight, bias, _activation(op, activation), before.transpose(1, 2).to(x.dtype))
    new = tokens.to(conv_state.dtype)
    if places is None:
        conv_state.copy_(torch.cat([conv_state, new], dim=2)[:, :, -columns:])
    else:
        conv_state.scatter_(2, places[:, :, -columns:], new[:, :, -columns:])  # of more than S tokens the last S stay
    return y.transpose(1, 2).reshape(x.shape)


def _activation(op: str, name: str | None) -> Literal["silu"] | None:
    if name not in (None, "silu", "swish"):
        raise ValueError(f"{op}: activation is {name!r}; allowed are None, 'silu' and 'swish'")
    return None if name is None else "silu"
