"""Many LoRAs in one batch, token by token: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.lora_grouped import Segments


def lora_grouped(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], rows: Segments
) -> Tensor:  # fmt: skip
    """See `kernels.lora_grouped.lora_grouped`."""
    order = range(len(x)) if rows.order is None else rows.order.tolist()
    adapters = [g for g, size in enumerate(rows.sizes) for _ in range(size)]
    adapter = dict(zip(order, adapters))
    wide = torch.promote_types(x.dtype, y.dtype)
    out = []
    for i in range(len(x)):
        g = adapter.get(i)
        out.append(y[i] if g is None else (y[i].to(wide) + scales[g] * (b[g] @ (a[g] @ x[i]))).to(y.dtype))
    return torch.stack(out)
