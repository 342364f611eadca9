"""Selective scan, the recurrence of Mamba-1 (arXiv 2312.00752, Alg. 2; Samba, arXiv 2406.07522, sec. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import expect_bool, expect_dims, expect_like, expect_shape
from kernels.dispatch import pick

__all__ = ["selective_scan", "selective_state_update"]


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
    """Run h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t and read y_t = (C_t h_t + D u_t) * silu(z_t).

    Every argument is differentiable, the initial state and the final state included, so that a carried state can be trained through.
    State and arithmetic are float32 (float64 for float64 inputs), also under autocast.

    Args:
        u: (B, L, D) input; its dtype is the dtype of y.
        dt: (B, L, D) step sizes; dt_bias is added first, then softplus (linear above 20) when `dt_softplus`.
        A: (D, N) continuous-time decay, negative.
        B: (B, L, N) input matrix, Euler-discretised (dt * B). C: (B, L, N) output matrix.
        D: (D,) skip weight. z: (B, L, D) gate before its silu. dt_bias: (D,).
        initial_state: (B, D, N) h_{-1}; zeros when None.
        document_start: (B, L) bool; True drops the state that the position would inherit.

    Returns: y (B, L, D) in u's dtype, and the last state (B, D, N) in float32 (float64).
    Raises: ValueError for a shape or dtype that does not fit.

    >>> u = torch.ones(1, 3, 1)
    >>> y, state = selective_scan(u, u, -torch.ones(1, 1), u, u)
    >>> [round(v, 3) for v in y.flatten().tolist()]
    [1.0, 1.368, 1.503]
    """
    _check("selective_scan", u, dt, A, B, C, D, z, dt_bias, initial_state, document_start)
    if torch.compiler.is_compiling():
        # An opaque call: tracing would unroll the loop over time into thousands of nodes.
        return torch.compiler.disable(_run)(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, document_start)
    return _run(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, document_start)


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_scan` from `state` (B, D, N) on, which becomes the last state in place. Without gradients. Returns y (B, L, D).

    Raises: ValueError for what does not fit, or where gradients are recorded.
    """
    op = "selective_state_update"
    _check(op, u, dt, A, B, C, D, z, dt_bias, state, None)
    if torch.is_grad_enabled():
        raise ValueError(f"{op}: gradients are recorded; call selective_scan, or use torch.no_grad")
    return pick("selective_scan", u.device).selective_state_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _check(
    op: str, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, document_start: Tensor | None,
) -> None:  # fmt: skip
    expect_dims(op, "u", u, 3, "(B, L, D)")
    expect_dims(op, "A", A, 2, "(D, N)")
    batch, length, dim = u.shape
    states = A.shape[1]
    expect_shape(op, "dt", dt, batch, length, dim, letters="(B, L, D)")
    expect_shape(op, "A", A, dim, states, letters="(D, N)")
    expect_shape(op, "B", B, batch, length, states, letters="(B, L, N)")
    expect_shape(op, "C", C, batch, length, states, letters="(B, L, N)")
    expect_shape(op, "D", D, dim, letters="(D,)")
    expect_shape(op, "z", z, batch, length, dim, letters="(B, L, D)")
    expect_shape(op, "dt_bias", dt_bias, dim, letters="(D,)")
    expect_shape(op, "initial_state", initial_state, batch, dim, states, letters="(B, D, N)")
    expect_shape(op, "document_start", document_start, batch, length, letters="(B, L)")
    expect_bool(op, "document_start", document_start)
    expect_like(op, u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)


def _run(u: Tensor, *args: Tensor | bool | None) -> tuple[Tensor, Tensor]:
    return pick("selective_scan", u.device).selective_scan(u, *args)
