"""Causal convolution as loops over positions and taps: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.causal_conv1d.causal_conv1d`."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, dim = x.shape
    width = weight.shape[1]
    history = x.new_zeros(batch, width - 1, dim) if initial_state is None else initial_state
    inputs = torch.cat([history.to(acc), x.to(acc)], dim=1).unbind(1)  # inputs[W-1+t] is x_t

    def seen(t: int, back: int) -> Tensor:
        """x_{t-back} as the document of position t sees it: zero when a document starts in between. (B, D)"""
        value = inputs[width - 1 + t - back]
        if document_start is None or back == 0:
            return value
        crossed = document_start[:, max(0, t - back + 1) : t + 1].any(dim=1, keepdim=True)
        return torch.where(crossed, 0.0, value)

    outputs = []
    for t in range(length):
        y = x.new_zeros(batch, dim, dtype=acc) if bias is None else bias.to(acc).expand(batch, dim)
        for back in range(width):
            y = y + weight[:, width - 1 - back].to(acc) * seen(t, back)
        outputs.append(y if activation is None else F.silu(y))
    last = [seen(length - 1, back) for back in range(width - 2, -1, -1)]
    state = torch.stack(last, dim=1) if last else history
    return torch.stack(outputs, dim=1).to(x.dtype), state.to(x.dtype)
