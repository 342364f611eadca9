"""Selective scan in plain torch for any device: chunked, checkpointed, replayed in the backward.

Working layout is time-major with the channels innermost, (Q, B, N, D): every broadcast then runs over D contiguous elements, a time step
is one contiguous block, and no tensor of B*L*D*N elements ever exists.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Steps per chunk: as many as fill this many bytes of (Q, B, N, D), inside the bounds. Forward and backward on one AVX-512 core (1 MiB L2,
# 32 MiB L3), fp32, B=8 L=256 D=384 N=16: 4 steps 46 ms, 10 steps 41 ms, 21 steps 39 ms.
_CHUNK_BYTES = 1 << 22
_MIN_STEPS, _MAX_STEPS = 4, 32
# The backward starts each chunk from its state. All chunks' states are kept up to this many bytes; above, those of every sqrt(chunks)-th,
# and the backward scans once more for the ones between. B=8 L=4096 D=3072 N=16: 0.1 in place of 1.6 GB.
_MAX_KEPT_BYTES = 1 << 26
_SOFTPLUS_LINEAR = 20.0


def _chunk_steps(length: int, state_bytes: int) -> int:
    """Steps per chunk for states of `state_bytes` bytes."""
    return min(length, max(_MIN_STEPS, min(_MAX_STEPS, _CHUNK_BYTES // state_bytes)))


def _kept_every(chunks: int, state_bytes: int) -> int:
    """Of how many chunks one state is kept for the backward."""
    return 1 if chunks * state_bytes <= _MAX_KEPT_BYTES else math.ceil(math.sqrt(chunks))


class _Problem:
    """The inputs of one call, cast and laid out time-major; shared by forward and backward so that both compute the same bits."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor | None, softplus: bool, start: Tensor | None
    ) -> None:
        acc = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.u = u.to(acc).transpose(0, 1)  # (L, B, D)
        self.raw = dt.to(acc).transpose(0, 1)  # (L, B, D) before softplus
        if bias is not None:
            self.raw = self.raw + bias.to(acc)
        self.dt = F.softplus(self.raw, threshold=_SOFTPLUS_LINEAR) if softplus else self.raw
        self.A = A.to(acc).t().contiguous()  # (N, D)
        # exp2 on the pre-scaled A: 0.15 against 0.70 ns an element for exp (4 ns where exp underflows) on an AVX-512 core
        self.A2 = self.A * math.log2(math.e)
        self.B = B.to(acc).transpose(0, 1).contiguous()  # (L, B, N)
        self.C = C.to(acc).transpose(0, 1).contiguous()
        length, batch, dim = self.u.shape
        states = A.shape[1]
        self.shape = (length, batch, states, dim)
        self.dtu = torch.mul(self.dt, self.u, out=self.B.new_empty(length, batch, dim))
        state_bytes = batch * states * dim * self.A.element_size()
        self.steps = _chunk_steps(length, state_bytes)
        self.kept_every = _kept_every(math.ceil(length / self.steps), state_bytes)
        self._starts: Tensor | None = None  # (S, 2) step and row of every start, in the order of the steps
        self._before: list[int] = []  # how many of them come before each step
        if start is not None:
            self._starts = start.t().nonzero()
            self._before = list(accumulate(start.sum(dim=0).tolist(), initial=0))
        # Work space of one chunk: decays, and the states with the one before; the views are made once, since making them costs as much
        # as the arithmetic of a small step.
        self.a, self.h = self.buffer(self.steps), self.buffer(self.steps + 1)
        self.a_steps, self.h_steps = self.a.unbind(0), self.h.unbind(0)

    def buffer(self, steps: int) -> Tensor:
        """Uninitialised (steps, B, N, D)."""
        return self.A.new_empty(steps, *self.shape[1:])

    def chunks(self) -> list[tuple[int, int, int]]:
        """(index, first step, end) of every chunk."""
        length = self.shape[0]
        return [(i, t, min(t + self.steps, length)) for i, t in enumerate(range(0, length, self.steps))]

    def starts(self, first: int, end: int) -> tuple[Tensor, Tensor] | None:
        """Index (step - first, row) of the documents that start in steps first..end-1; None where none does."""
        if self._starts is None or self._before[first] == self._before[end]:
            return None
        step, row = self._starts[self._before[first] : self._before[end]].unbind(1)
        return step - first, row

    def advance(self, target: Tensor, decay: Tensor, source: Tensor, step: int) -> None:
        """target += decay * source, (B, N, D), but for the rows where a document starts at `step`: they take nothing over."""
        starts = self.starts(step, step + 1)
        if starts is None:
            target.addcmul_(decay, source)
        else:  # not a decay of 0, which infinity and NaN would survive
            own = target[starts[1]]
            target.addcmul_(decay, source)
            target[starts[1]] = own

    def replay(self, first: int, end: int) -> None:
        """Fill a[:n] with the decays of the chunk of n = end - first steps and h[1:n+1] with its states, from h[0]."""
        n = end - first
        torch.mul(self.dt[first:end].unsqueeze(2), self.A2, out=self.a[:n]).exp2_()
        torch.mul(self.dtu[first:end].unsqueeze(2), self.B[first:end].unsqueeze(3), out=self.h[1 : n + 1])
        for i in range(n):
            self.advance(self.h_steps[i + 1], self.a_steps[i], self.h_steps[i], first + i)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
        h0: Tensor | None, softplus: bool, start: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch.autocast(u.device.type, enabled=False):
            p = _Problem(u, dt, A, B, C, bias, softplus, start)
            length, batch, states, dim = p.shape
            keep = any(ctx.needs_input_grad)
            chunks = p.chunks()
            saved = p.buffer(math.ceil(len(chunks) / p.kept_every)) if keep else None  # state before every kept_every-th chunk
            h = p.h
            y = p.A.new_empty(length, batch, dim)
            if h0 is None:
                h[0].zero_()
            else:
                h[0].copy_(h0.transpose(1, 2))
            for index, first, end in chunks:
                n = end - first
                if saved is not None and index % p.kept_every == 0:
                    saved[index // p.kept_every].copy_(h[0])
                p.replay(first, end)
                rows = n * batch
                torch.bmm(p.C[first:end].view(rows, 1, states), h[1 : n + 1].view(rows, states, dim), out=y[first:end].view(rows, 1, dim))
                h[0].copy_(h[n])
            out = y.transpose(0, 1)
            if D is not None:
                out = torch.addcmul(out, u.to(y.dtype), D.to(y.dtype))
            if z is not None:
                out = F.silu(z.to(y.dtype)).mul_(out)
            final = h[0].transpose(1, 2).contiguous()  # (B, D, N)
        ctx.softplus = softplus
        ctx.save_for_backward(u, dt, A, B, C, D, z, bias, h0, start, saved)
        return out.to(u.dtype).contiguous(), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_out: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, bias, h0, start, saved = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            p = _Problem(u, dt, A, B, C, bias, ctx.softplus, start)
            dy = torch.empty_like(p.dtu).copy_(dy_out.transpose(0, 1))  # (L, B, D)
            dz = dD = None
            if z is not None:
                zt = z.to(dy.dtype).transpose(0, 1)
                gate = torch.sigmoid(zt)
                dz = dy * (gate * (1 + zt * (1 - gate)))  # still without its factor y
                dy.mul_(zt * gate)
            g = _scan_backward(p, saved, dy, dfinal, want_y=z is not None)
            du = g["x"] * p.dt
            ddt = g["x"].mul_(p.u).add_(g["dt"])
            if ctx.softplus:
                ddt.mul_(torch.where(p.raw > _SOFTPLUS_LINEAR, 1.0, torch.sigmoid(p.raw)))
            if D is not None:
                du.addcmul_(dy, D.to(dy.dtype))
                dD = (dy * p.u).sum(dim=(0, 1)).to(D.dtype)
            if dz is not None:
                dz.mul_(g["y"] if D is None else g["y"].addcmul_(p.u, D.to(dy.dtype)))
            grads = (
                du.transpose(0, 1).to(u.dtype),
                ddt.transpose(0, 1).to(dt.dtype),
                g["A"].t().to(A.dtype),
                g["B"].transpose(0, 1).to(B.dtype),
                g["C"].transpose(0, 1).to(C.dtype),
                dD,
                None if z is None or dz is None else dz.transpose(0, 1).to(z.dtype),
                None if bias is None else ddt.sum(dim=(0, 1)).to(bias.dtype),
                None if h0 is None else g["h0"].transpose(1, 2).to(h0.dtype),
            )
        return (*grads, None, None)


def _scan_backward(p: _Problem, saved: Tensor, dy: Tensor, dfinal: Tensor, want_y: bool) -> dict[str, Tensor]:
    """Reverse pass of h_t = a_t h_{t-1} + x_t, y_t = C_t h_t over replayed chunks, last to first.

    saved: (., B, N, D) states before every kept_every-th chunk; dy: (L, B, D); dfinal: (B, D, N).
    Returns gradients, time-major: x (L, B, D) of dt*u; dt (L, B, D) through the decay only; A (N, D); B, C (L, B, N); h0 (B, N, D);
    and y (L, B, D) again when `want_y`.
    """
    _, batch, states, dim = p.shape
    h, g = p.h, p.buffer(p.steps)
    g_steps = g.unbind(0)
    carry = p.buffer(1)[0].copy_(dfinal.transpose(1, 2))  # a_{t+1} G_{t+1}
    out = {name: torch.empty_like(p.dtu) for name in (("x", "dt", "y") if want_y else ("x", "dt"))}
    out |= {"B": torch.empty_like(p.B), "C": torch.empty_like(p.C), "A": torch.zeros_like(p.A)}
    chunks = p.chunks()
    before = saved[:0]
    for index, first, end in reversed(chunks):
        n, part = end - first, slice(first, end)
        rows = n * batch
        an, gn, hn = p.a[:n], g[:n], h[1 : n + 1]
        group, member = divmod(index, p.kept_every)
        if member + 1 == p.kept_every or index + 1 == len(chunks):
            before = _states_before(p, saved[group], chunks[group * p.kept_every : index + 1])
        h[0].copy_(before[member])
        p.replay(first, end)
        flat_h, flat_g = hn.view(rows, states, dim), gn.view(rows, states, dim)
        dy_row, C_row = dy[part].view(rows, 1, dim), p.C[part].view(rows, 1, states)
        if want_y:
            torch.bmm(C_row, flat_h, out=out["y"][part].view(rows, 1, dim))
        torch.bmm(dy_row, flat_h.mT, out=out["C"][part].view(rows, 1, states))
        torch.mul(dy[part].unsqueeze(2), p.C[part].unsqueeze(3), out=gn)
        g_steps[n - 1].add_(carry)
        for i in range(n - 2, -1, -1):
            p.advance(g_steps[i], p.a_steps[i + 1], g_steps[i + 1], first + i + 1)
        torch.bmm(p.dtu[part].view(rows, 1, dim), flat_g.mT, out=out["B"][part].view(rows, 1, states))
        torch.bmm(p.B[part].view(rows, 1, states), flat_g, out=out["x"][part].view(rows, 1, dim))
        an.mul_(gn)
        starts = p.starts(first, end)
        if starts is not None:
            an[starts] = 0
            h[starts] = 0
        carry.copy_(an[0])
        s = an.mul_(h[:n])  # G_t a_t h_{t-1}, the gradient of dt_t * A
        out["A"] += torch.mul(s, p.dt[part].unsqueeze(2), out=gn).sum(dim=(0, 1))
        torch.sum(s.mul_(p.A), dim=2, out=out["dt"][part])
    out["h0"] = carry
    return out


def _states_before(p: _Problem, first_state: Tensor, chunks: list[tuple[int, int, int]]) -> Tensor:
    """(chunks, B, N, D): the states before each of some chunks in a row, from the one before the first; overwrites p's work space."""
    if len(chunks) == 1:
        return first_state.unsqueeze(0)
    before = p.buffer(len(chunks))
    before[0].copy_(first_state)
    for i, (_, first, end) in enumerate(chunks[:-1]):
        p.h[0].copy_(before[i])
        p.replay(first, end)
        before[i + 1].copy_(p.h[end - first])
    return before


def _step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None, h0: Tensor | None,
    softplus: bool, start: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One time step without gradients (decoding)."""
    acc = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, delta = u[:, 0].to(acc), dt[:, 0].to(acc)  # (B, D)
    if bias is not None:
        delta = delta + bias
    if softplus:
        delta = F.softplus(delta, threshold=_SOFTPLUS_LINEAR)
    h = (delta * x).unsqueeze(2) * B[:, 0].to(acc).unsqueeze(1)  # (B, D, N)
    if h0 is not None:
        before = h0.to(acc)
        if start is not None:
            before = before.masked_fill(start[:, :, None], 0)
        h.addcmul_((delta.unsqueeze(2) * (A.to(acc) * math.log2(math.e))).exp2_(), before)
    y = (h * C[:, 0].to(acc).unsqueeze(1)).sum(dim=2)  # (B, D)
    if D is not None:
        y = torch.addcmul(y, x, D.to(acc))
    if z is not None:
        y = y * F.silu(z[:, 0].to(acc))
    return y.unsqueeze(1).to(u.dtype), h


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
    """See `kernels.selective_scan.selective_scan`."""
    if u.shape[1] == 1 and not torch.is_grad_enabled():
        return _step(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, document_start)
    return _Scan.apply(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, document_start)


def selective_state_update(state: Tensor, *inputs: Any) -> Tensor:
    """See `kernels.selective_scan.selective_state_update`."""
    arguments: Any = (*inputs, state)
    y, final = selective_scan(*arguments)
    state.copy_(final)
    return y
