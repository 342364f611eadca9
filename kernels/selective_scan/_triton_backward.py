"""Backward kernel of the selective scan; see triton_kernel.py.

What runs side by side, here and in the forward: B * ceil(D / BD) programs of one warp, with BD = 16 channels at N = 16. Time is not split:
a program walks through all L steps of its row, one group after the other. B = 8 and D = 3072 are 1536 warps, three for each of the 528
schedulers of an H100 or H200. B = 1 is 192 warps: at least 336 schedulers stand idle, the others have no second warp to hide a latency
with, and the time grows with L however large the card. So a single long row (reading a prompt, or training with B = 1) takes about as long
as two such rows side by side. Splitting L into chunks whose carries are scanned would mend that; it is not written. By counting, not by
measurement: nothing ran on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.selective_scan._triton_forward import LOG2E, append, column, load_group, row, sigmoid, step_sizes

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _replay(
    h, A2, bias, dt, u, B, start, dt_t, u_t, B_t, d, n, j, in_d, in_n,
    N: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The state after a whole group of steps, from the state before it."""
    everywhere = in_d[:, None] & (j < STEPS)[None, :]
    delta = step_sizes(load_group(dt, dt_t, d, j, everywhere), bias, everywhere, SOFTPLUS)
    xu = delta * load_group(u, u_t, d, j, everywhere).to(tl.float32)
    for k in tl.static_range(STEPS):
        if start is not None:
            h = tl.where(tl.load(start + k) != 0, 0.0, h)
        h = tl.exp2(column(delta, k, j) * A2) * h + column(xu, k, j) * row(B + k * B_t + n, in_n)[None, :]
    return h


@triton.jit
def _states(h, A2, delta, xu, B, start, B_t, n, j, first, length, ends_n, STEPS: tl.constexpr):
    """The states before and after each step of a group, from the state before it: two tuples of STEPS tiles."""
    befores, afters = (), ()
    for k in tl.static_range(STEPS):
        if start is not None:
            h = tl.where(tl.load(start + k, mask=first + k < length, other=0) != 0, 0.0, h)
        befores = append(befores, h)
        h = tl.exp2(column(delta, k, j) * A2) * h + column(xu, k, j) * row(B + k * B_t + n, first + k < ends_n)[None, :]
        afters = append(afters, h)
    return befores, afters


@triton.jit
def _reverse(
    carry, dA, befores, afters, A2, delta, xu, g, B, C, dB, dC, start, B_t, C_t, n, j, first, length, ends_n,
    N: tl.constexpr, STEPS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """From the last step of a group to its first; writes dB and dC.

    carry: a_{t+1} G_{t+1} on entry, that of the step before the group on return. dA: its sum so far. Also returns, (BD, STEPS): C_t h_t
    where GATED, the gradient of dt u, and that of dt through the decay, in units of ln 2.
    """
    out = tl.zeros_like(g)
    x_grad, decay_sum = out, out
    for k in tl.static_range(STEPS - 1, -1, -1):
        in_row = first + k < ends_n
        Bk, Ck = row(B + k * B_t + n, in_row)[None, :], row(C + k * C_t + n, in_row)[None, :]
        gk, delta_k = column(g, k, j), column(delta, k, j)
        here = j[None, :] == k
        if GATED:
            out = tl.where(here, tl.sum(afters[k] * Ck, axis=1)[:, None], out)
        G = carry + gk * Ck
        tl.store(dC + k * N + n, tl.sum(afters[k] * gk, axis=0), mask=in_row)
        tl.store(dB + k * N + n, tl.sum(G * column(xu, k, j), axis=0), mask=in_row)
        x_grad = tl.where(here, tl.sum(G * Bk, axis=1)[:, None], x_grad)
        carry = tl.exp2(delta_k * A2) * G
        if start is not None:
            carry = tl.where(tl.load(start + k, mask=first + k < length, other=0) != 0, 0.0, carry)
        decay_grad = carry * befores[k]  # of dt * A
        dA += decay_grad * delta_k
        decay_sum = tl.where(here, tl.sum(decay_grad * A2, axis=1)[:, None], decay_sum)
    return carry, dA, out, x_grad, decay_sum


@triton.jit
def _or_zeros(pointer, d, in_d, BD: tl.constexpr):
    """One number a channel, 0 where the argument is left out."""
    values = tl.zeros((BD,), tl.float32)
    if pointer is not None:
        values += row(pointer + d, in_d)
    return values


@triton.jit
def _group(
    carry, dA, dD, dbias, u, dt, B, C, z, start, saved, dy, du, ddt, dz, dB, dC, A2, bias, skip, group, length, dim,
    u_t, dt_t, B_t, C_t, z_t, dy_t, d, n, j, in_d, in_n, ends_n, tile, in_tile,
    N: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Everything of one group, at whose first step the pointers stand. Returns carry (see `_reverse`) and the three sums with its part.

    dD, dbias: (BD, STEPS), summed over the steps at the end.
    """
    first = group * STEPS
    inside = in_d[:, None] & (first + j < length)[None, :]
    raw, us, gs = load_group(dt, dt_t, d, j, inside), load_group(u, u_t, d, j, inside), load_group(dy, dy_t, d, j, inside)
    if z is not None:
        zs = load_group(z, z_t, d, j, inside).to(tl.float32)
    h = row(saved + tile, in_tile)
    for index in range(group % GROUPS):
        shift = (index - group % GROUPS) * STEPS  # from this group to the earlier one
        at = None if start is None else start + shift
        h = _replay(
            h, A2, bias, dt + shift * dt_t, u + shift * u_t, B + shift * B_t, at, dt_t, u_t, B_t, d, n, j, in_d, in_n,
            N, STEPS, SOFTPLUS,
        )  # fmt: skip
    us, gs = us.to(tl.float32), gs.to(tl.float32)
    delta = step_sizes(raw, bias, inside, SOFTPLUS)
    xu = delta * us
    g = gs  # gradient of y before its gate
    if z is not None:
        gate = sigmoid(zs)
        g = gs * zs * gate
    befores, afters = _states(h, A2, delta, xu, B, start, B_t, n, j, first, length, ends_n, STEPS)
    carry, dA, out, x_grad, decay_sum = _reverse(
        carry, dA, befores, afters, A2, delta, xu, g, B, C, dB, dC, start, B_t, C_t, n, j, first, length, ends_n,
        N, STEPS, z is not None,
    )  # fmt: skip
    dt_grad = decay_sum * LN2 + x_grad * us
    if SOFTPLUS:
        dt_grad *= sigmoid(raw.to(tl.float32) + bias[:, None])
    tl.store(ddt + j[None, :] * dim + d[:, None], dt_grad, mask=inside)
    tl.store(du + j[None, :] * dim + d[:, None], x_grad * delta + skip[:, None] * g, mask=inside)
    if z is not None:
        out += skip[:, None] * us
        tl.store(dz + j[None, :] * dim + d[:, None], gs * out * gate * (1.0 + zs * (1.0 - gate)), mask=inside)
    return carry, dA, dD + g * us, dbias + tl.where(inside, dt_grad, 0.0)


@triton.jit(do_not_specialize=["length"])
def backward_kernel(
    u, dt, A, B, C, D, z, dt_bias, start, saved, dy, dfinal, du, ddt, dA, dB, dC, dD, dz, dbias, dh0, length, dim, tiles,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, dy_b, dy_t,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One sequence, BD channels, last group of STEPS steps first; saved holds the state before every GROUPS-th group.

    du, ddt, dz: (B, L, D). dA, dh0: (B, D, N). dD, dbias: (B, D). dB, dC: (tiles, B, L, N).
    """
    batch, tile_index = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    d = tile_index * BD + tl.arange(0, BD)
    n, j = tl.arange(0, NP), tl.arange(0, STEPS)
    in_d, in_n = d < dim, n < N
    tile = d[:, None] * N + n[None, :]  # (BD, NP) inside (D, N)
    in_tile = in_d[:, None] & in_n[None, :]
    ends_n = tl.where(in_n, length, 0)  # t < ends_n: inside in both
    A2 = row(A + tile, in_tile) * LOG2E
    bias, skip = _or_zeros(dt_bias, d, in_d, BD), _or_zeros(D, d, in_d, BD)
    groups = tl.cdiv(length, STEPS)
    t = ((groups - 1) * STEPS).to(tl.int64)  # every pointer moves to the first step of the last group
    u, dt, dy = u + batch * u_b + t * u_t, dt + batch * dt_b + t * dt_t, dy + batch * dy_b + t * dy_t
    B, C = B + batch * B_b + t * B_t, C + batch * C_b + t * C_t
    here = (batch * length + t) * dim
    du, ddt = du + here, ddt + here
    if z is not None:
        z, dz = z + batch * z_b + t * z_t, dz + here
    if start is not None:
        start += batch * length + t
    rows = ((tile_index * (tl.num_programs(0) // tiles) + batch) * length + t) * N
    dB, dC = dB + rows, dC + rows
    saved += (batch * tl.cdiv(groups, GROUPS) + (groups - 1) // GROUPS) * dim * N
    carry = row(dfinal + batch * dim * N + tile, in_tile)  # a_{t+1} G_{t+1}
    dA_sum = tl.zeros((BD, NP), tl.float32)
    dD_sum, dbias_sum = tl.zeros((BD, STEPS), tl.float32), tl.zeros((BD, STEPS), tl.float32)
    for back in range(groups):
        group = groups - 1 - back
        carry, dA_sum, dD_sum, dbias_sum = _group(
            carry, dA_sum, dD_sum, dbias_sum, u, dt, B, C, z, start, saved, dy, du, ddt, dz, dB, dC, A2, bias, skip, group, length, dim,
            u_t, dt_t, B_t, C_t, z_t, dy_t, d, n, j, in_d, in_n, ends_n, tile, in_tile, N, STEPS, GROUPS, SOFTPLUS,
        )  # fmt: skip
        u, dt, dy = u - STEPS * u_t, dt - STEPS * dt_t, dy - STEPS * dy_t
        B, C = B - STEPS * B_t, C - STEPS * C_t
        du, ddt, dB, dC = du - STEPS * dim, ddt - STEPS * dim, dB - STEPS * N, dC - STEPS * N
        if z is not None:
            z, dz = z - STEPS * z_t, dz - STEPS * dim
        if group % GROUPS == 0:
            saved -= dim * N
        if start is not None:
            start -= STEPS
    tl.store(dA + batch * dim * N + tile, dA_sum, mask=in_tile)
    if dh0 is not None:
        tl.store(dh0 + batch * dim * N + tile, carry, mask=in_tile)
    if D is not None:
        tl.store(dD + batch * dim + d, tl.sum(dD_sum, axis=1), mask=in_d)
    if dt_bias is not None:
        tl.store(dbias + batch * dim + d, tl.sum(dbias_sum, axis=1), mask=in_d)
