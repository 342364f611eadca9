"""Forward kernel of the selective scan and what it shares with the backward; see triton_kernel.py."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """log(1 + e^x) as max(x, 0) + 2 atanh(e / (2 + e)), e = e^-|x|.

    log(1 + e) itself would lose the small steps to the rounding of 1 + e. Polynomial in s^2: relative error 4e-9 for e in [0, 1].
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)
    q = s * s
    p = 0.28157778 * q + 0.27965158
    p = p * q + 0.40024595
    p = p * q + 0.66666322
    p = p * q + 2.0
    return tl.maximum(x, 0.0) + s * p


@triton.jit
def column(tile, k, j):
    """Column k of (BD, STEPS) as (BD, 1), selected and not multiplied, so that infinity and NaN stay in theirs."""
    return tl.sum(tl.where(j[None, :] == k, tile, 0.0), axis=1)[:, None]


@triton.jit
def append(items, item):
    return items + (item,)  # noqa: RUF005  (the compiler knows no unpacking here)


@triton.jit
def row(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_sizes(raw, bias, inside, SOFTPLUS: tl.constexpr):
    """dt of a group, (BD, STEPS); 0 outside, which is a decay of 1 and no input."""
    raw = raw.to(tl.float32) + bias[:, None]
    if SOFTPLUS:
        raw = softplus(raw)
    return tl.where(inside, raw, 0.0)


@triton.jit
def load_group(pointer, stride, d, j, inside):
    """(BD, STEPS): the steps of a group, in the dtype of the memory."""
    return tl.load(pointer + j[None, :] * stride + d[:, None], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    u, dt, A, B, C, D, z, dt_bias, h0, start, y, final, saved, length, dim, tiles,
    u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, KEPT: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One sequence, BD channels.

    X_b, X_t: strides over sequences and steps. saved: (B, ceil(L / KEPT), D, N) states before every KEPT steps, or None.
    """
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    n, j = tl.arange(0, NP), tl.arange(0, STEPS)
    in_d, in_n = d < dim, n < N
    tile = d[:, None] * N + n[None, :]  # (BD, NP) inside (D, N)
    in_tile = in_d[:, None] & in_n[None, :]
    ends_n = tl.where(in_n, length, 0)  # t < ends_n: inside in both
    A2 = row(A + tile, in_tile) * LOG2E
    bias = tl.zeros((BD,), tl.float32)
    if dt_bias is not None:
        bias += row(dt_bias + d, in_d)
    if D is not None:
        skip = row(D + d, in_d)
    h = tl.zeros((BD, NP), tl.float32)
    if h0 is not None:
        h += row(h0 + batch * dim * N + tile, in_tile)
    u += batch * u_b
    dt += batch * dt_b
    B += batch * B_b
    C += batch * C_b
    y += batch * length * dim
    if z is not None:
        z += batch * z_b
    if start is not None:
        start += batch * length
    if saved is not None:
        saved += batch * tl.cdiv(length, KEPT) * dim * N
    # The next group's inputs are on their way while this one is computed.
    inside = in_d[:, None] & (j < length)[None, :]
    next_u, next_dt = load_group(u, u_t, d, j, inside), load_group(dt, dt_t, d, j, inside)
    if z is not None:
        next_z = load_group(z, z_t, d, j, inside)
    for first in range(0, length, STEPS):
        if saved is not None:  # noqa: SIM102  (the compiler decides this one, the program the next)
            if first % KEPT == 0:
                tl.store(saved + tile, h, mask=in_tile)
                saved += dim * N
        inside = in_d[:, None] & (first + j < length)[None, :]
        after = in_d[:, None] & (first + STEPS + j < length)[None, :]
        us, delta = next_u.to(tl.float32), step_sizes(next_dt, bias, inside, SOFTPLUS)
        u += STEPS * u_t
        dt += STEPS * dt_t
        next_u, next_dt = load_group(u, u_t, d, j, after), load_group(dt, dt_t, d, j, after)
        if z is not None:
            zs = next_z.to(tl.float32)
            z += STEPS * z_t
            next_z = load_group(z, z_t, d, j, after)
        xu = delta * us
        out = tl.zeros((BD, STEPS), tl.float32)
        for k in tl.static_range(STEPS):
            in_row = first + k < ends_n
            if start is not None:  # selected, not multiplied: infinity and NaN go too
                h = tl.where(tl.load(start + first + k, mask=first + k < length, other=0) != 0, 0.0, h)
            h = tl.exp2(column(delta, k, j) * A2) * h + column(xu, k, j) * row(B + k * B_t + n, in_row)[None, :]
            out = tl.where(j[None, :] == k, tl.sum(h * row(C + k * C_t + n, in_row)[None, :], axis=1)[:, None], out)
        if D is not None:
            out += skip[:, None] * us
        if z is not None:
            out *= zs * sigmoid(zs)
        tl.store(y + j[None, :] * dim + d[:, None], out, mask=inside)
        B += STEPS * B_t
        C += STEPS * C_t
        y += STEPS * dim
    tl.store(final + batch * dim * N + tile, h, mask=in_tile)
