"""Selective scan in plain torch for any device: chunked, checkpointed, replayed in the backward.

Working layout is time-major with the channels innermost, (Q, B, N, D): every broadcast then runs over D contiguous elements, a time step
is one contiguous block, and no tensor of B*L*D*N elements ever exists.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Steps per chunk: as many as fill this many bytes of (Q, B, N, D), inside the bounds. Forward and backward on one AVX-512 core (1 MiB L2,
# 32 MiB L3), fp32, B=8 L=256 D=384 N=16: 4 steps 46 ms, 10 steps 41 ms, 21 steps 39 ms; the states kept for the backward shrink with it.
_CHUNK_BYTES = 1 << 22
_MIN_STEPS, _MAX_STEPS = 4, 32
_SOFTPLUS_LINEAR = 20.0


def _chunk_steps(length: int, state_bytes: int) -> int:
    """Steps per chunk for states of `state_bytes` bytes; also the spacing of the states kept for the backward."""
    return min(length, max(_MIN_STEPS, min(_MAX_STEPS, _CHUNK_BYTES // state_bytes)))


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
        self.steps = _chunk_steps(length, batch * states * dim * self.A.element_size())
        self.start = None
        self.has_start: list[bool] = []
        if start is not None:
            self.start = start.t()  # (L, B)
            in_step = self.start.any(dim=1)
            self.has_start = [bool(chunk.any()) for chunk in in_step.split(self.steps)]
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

    def replay(self, index: int, first: int, end: int) -> None:
        """Fill a[:n] with the decays of the chunk of n = end - first steps and h[1:n+1] with its states, from h[0]."""
        n = end - first
        a = self.a[:n]
        torch.mul(self.dt[first:end].unsqueeze(2), self.A2, out=a).exp2_()
        if self.start is not None and self.has_start[index]:
            a[self.start[first:end]] = 0
        torch.mul(self.dtu[first:end].unsqueeze(2), self.B[first:end].unsqueeze(3), out=self.h[1 : n + 1])
        for i in range(n):
            self.h_steps[i + 1].addcmul_(self.a_steps[i], self.h_steps[i])


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
            saved = p.buffer(len(chunks)) if keep else None  # state before each chunk
            h = p.h
            y = p.A.new_empty(length, batch, dim)
            if h0 is None:
                h[0].zero_()
            else:
                h[0].copy_(h0.transpose(1, 2))
            for index, first, end in chunks:
                n = end - first
                if saved is not None:
                    saved[index].copy_(h[0])
                p.replay(index, first, end)
                rows = n * batch
                torch.bmm(p.C[first:end].view(rows, 1, states), h[1 : n + 1].view(rows, states, dim), out=y[first:end].view(rows, 1, dim))
                h[0].copy_(h[n])
            out = y.transpose(0, 1)
            if D is not None:
                out = torch.addcmul(out, u.to(y.dtype), D.to(y.dtype))
            if z is not None:
                out = out * F.silu(z.to(y.dtype))
            final = h[0].transpose(1, 2).contiguous()  # (B, D, N)
        ctx.softplus = softplus
        ctx.save_for_backward(u, dt, A, B, C, D, z, bias, h0, start, saved)
        return out.to(u.dtype, memory_format=torch.contiguous_format), final

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

    saved: (chunks, B, N, D) states before each chunk; dy: (L, B, D); dfinal: (B, D, N).
    Returns gradients, time-major: x (L, B, D) of dt*u; dt (L, B, D) through the decay only; A (N, D); B, C (L, B, N); h0 (B, N, D);
    and y (L, B, D) again when `want_y`.
    """
    _, batch, states, dim = p.shape
    h, g = p.h, p.buffer(p.steps)
    g_steps = g.unbind(0)
    carry = p.buffer(1)[0].copy_(dfinal.transpose(1, 2))  # a_{t+1} G_{t+1}
    out = {name: torch.empty_like(p.dtu) for name in (("x", "dt", "y") if want_y else ("x", "dt"))}
    out |= {"B": torch.empty_like(p.B), "C": torch.empty_like(p.C), "A": torch.zeros_like(p.A)}
    for index, first, end in reversed(p.chunks()):
        n, part = end - first, slice(first, end)
        rows = n * batch
        an, gn, hn = p.a[:n], g[:n], h[1 : n + 1]
        h[0].copy_(saved[index])
        p.replay(index, first, end)
        flat_h, flat_g = hn.view(rows, states, dim), gn.view(rows, states, dim)
        dy_row, C_row = dy[part].view(rows, 1, dim), p.C[part].view(rows, 1, states)
        if want_y:
            torch.bmm(C_row, flat_h, out=out["y"][part].view(rows, 1, dim))
        torch.bmm(dy_row, flat_h.mT, out=out["C"][part].view(rows, 1, states))
        torch.mul(dy[part].unsqueeze(2), p.C[part].unsqueeze(3), out=gn)
        g_steps[n - 1].add_(carry)
        for i in range(n - 2, -1, -1):
            g_steps[i].addcmul_(p.a_steps[i + 1], g_steps[i + 1])
        torch.bmm(p.dtu[part].view(rows, 1, dim), flat_g.mT, out=out["B"][part].view(rows, 1, states))
        torch.bmm(p.B[part].view(rows, 1, states), flat_g, out=out["x"][part].view(rows, 1, dim))
        an.mul_(gn)
        carry.copy_(an[0])
        s = an.mul_(h[:n])  # G_t a_t h_{t-1}, the gradient of dt_t * A
        out["A"] += torch.mul(s, p.dt[part].unsqueeze(2), out=gn).sum(dim=(0, 1))
        torch.sum(s.mul_(p.A), dim=2, out=out["dt"][part])
    out["h0"] = carry
    return out


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
        decay = (delta.unsqueeze(2) * (A.to(acc) * math.log2(math.e))).exp2_()
        if start is not None:
            decay.masked_fill_(start[:, :, None], 0)
        h.addcmul_(decay, h0.to(acc))
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
