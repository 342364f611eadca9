"""Many LoRAs in one batch, token by token, or task by task: the specification."""

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


def lora_mixed(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, shares: Tensor, lambdas: Tensor | None, scale: float, ids: Tensor, splits: Sequence[int]
) -> Tensor:  # fmt: skip
    """See `kernels.lora_grouped.lora_mixed`. Every task for every row; the row keeps that of its own."""
    out = y
    for task in range(len(shares)):
        up = sum(share * matrix for share, matrix in zip(shares[task], b))  # (out, r)
        if lambdas is not None:
            inner = lambdas[task].diag_embed() if lambdas.dim() == 3 else lambdas[task]  # (blocks, r, r)
            up = torch.cat([rows @ matrix for rows, matrix in zip(up.split(list(splits)), inner)])
        mixed = (y + scale * (x @ a.T) @ up.T).to(y.dtype)
        out = torch.where((ids == task)[:, None, None], mixed, out)
    return out
