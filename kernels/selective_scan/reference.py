"""Selective scan as a plain loop over time: the specification. Runs in float64 when u is float64, else in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    acc = torch.float64 if u.dtype == torch.float64 else torch.float32
    with torch.autocast(u.device.type, enabled=False):
        x, delta, A, B, C = (tensor.to(acc) for tensor in (u, dt, A, B, C))
        if dt_bias is not None:
            delta = delta + dt_bias.to(acc)
        if dt_softplus:
            delta = F.softplus(delta, threshold=20.0)
        batch, length, dim = u.shape
        h = x.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state.to(acc)
        outputs = []
        for t in range(length):
            if document_start is not None:
                h = torch.where(document_start[:, t, None, None], 0.0, h)
            decay = torch.exp(delta[:, t, :, None] * A)  # (B, D, N)
            h = decay * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]  # (B, D, N)
            outputs.append((h * C[:, t, None, :]).sum(dim=2))  # (B, D)
        y = torch.stack(outputs, dim=1)  # (B, L, D)
        if D is not None:
            y = y + D.to(acc) * x
        if z is not None:
            y = y * F.silu(z.to(acc))
    return y.to(u.dtype), h


def selective_state_update(state: Tensor, *inputs: Any) -> Tensor:
    """See `kernels.selective_scan.selective_state_update`."""
    arguments: Any = (*inputs, state)
    y, final = selective_scan(*arguments)
    state.copy_(final)
    return y
