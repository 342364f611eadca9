"""Many LoRAs in one batch.

`lora_grouped`: tokens gathered by adapter once, two products a segment, one scatter. The gathered tokens are gathered again in the backward
rather than kept; of the shrunk ones, (M, R), all are. `lora_mixed`: two dense products for all tasks together, since all B lie side by side
in one (out, n r) matrix, and what differs between tasks is applied to the r numbers of a token between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.lora_grouped import Segments


def _gathered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.index_select(0, order)


def _spans(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Number and place of every adapter that has tokens."""
    end = 0
    for g, size in enumerate(sizes):
        end += size
        if size:
            yield g, slice(end - size, end)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, scales: Sequence[float], rows: Segments, *matrices: Tensor) -> Tensor:
        ctx.scales, ctx.sizes = scales, rows.sizes
        if not sum(rows.sizes):
            return y.view_as(y)
        a, b = matrices[: len(rows.sizes)], matrices[len(rows.sizes) :]
        sorted_x = _gathered(x, rows.order)  # (M, in)
        delta = x.new_empty(len(sorted_x), y.shape[1])
        shrunk = []
        for g, span in _spans(rows.sizes):
            z = (sorted_x[span] @ a[g].T).mul_(scales[g])  # (size, R)
            torch.mm(z, b[g].T, out=delta[span])
            shrunk.append(z)
        ctx.save_for_backward(x, rows.order, *matrices, *shrunk)
        if rows.order is None:
            return (y + delta).to(y.dtype)
        if y.dtype == delta.dtype:
            return y.index_add(0, rows.order, delta)
        return y.index_copy(0, rows.order, (y.index_select(0, rows.order) + delta).to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        count = len(ctx.sizes)
        if not sum(ctx.sizes):
            return (dy, *(None,) * (3 + 2 * count))
        x, order, *rest = ctx.saved_tensors
        a, b, shrunk = rest[:count], rest[count : 2 * count], rest[2 * count :]
        needed = ctx.needs_input_grad[4:]
        da: list[Tensor | None] = [None] * count
        db: list[Tensor | None] = [None] * count
        sorted_dy = _gathered(dy, order).to(x.dtype)  # (M, out)
        sorted_x = _gathered(x, order) if any(needed[:count]) else None
        dx = x.new_empty(len(sorted_dy), x.shape[1]) if ctx.needs_input_grad[1] else None
        for (g, span), z in zip(_spans(ctx.sizes), shrunk):
            if needed[count + g]:
                db[g] = sorted_dy[span].T @ z
            if dx is None and not needed[g]:
                continue
            dz = (sorted_dy[span] @ b[g]).mul_(ctx.scales[g])  # (size, R)
            if needed[g] and sorted_x is not None:
                da[g] = dz.T @ sorted_x[span]
            if dx is not None:
                torch.mm(dz, a[g], out=dx[span])
        if dx is not None and order is not None:
            dx = torch.zeros_like(x).index_copy_(0, order, dx)
        return dy, dx, None, None, *da, *db


def lora_grouped(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], rows: Segments
) -> Tensor:  # fmt: skip
    """See `kernels.lora_grouped.lora_grouped`."""
    return _Grouped.apply(y, x, scales, rows, *a, *b)


def lora_mixed(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, shares: Tensor, lambdas: Tensor | None, scale: float, ids: Tensor, splits: Sequence[int]
) -> Tensor:  # fmt: skip
    """See `kernels.lora_grouped.lora_mixed`."""
    z = scale * F.linear(x, a)  # (I, S, r)
    weights = shares[ids][:, None, :, None]  # (I, 1, n, 1)
    turned = [z] if lambdas is None else [_turned(z, block, ids) for block in lambdas.unbind(1)]
    parts = [(weights * part[:, :, None, :]).flatten(2).to(b.dtype) for part in turned]  # blocks x (I, S, n r)
    beside = b.transpose(0, 1).flatten(1)  # (out, n r)
    ups = [beside] if lambdas is None else beside.split(list(splits))
    delta = [F.linear(part, up) for part, up in zip(parts, ups, strict=True)]
    return (y + (delta[0] if len(delta) == 1 else torch.cat(delta, -1))).to(y.dtype)


def _turned(z: Tensor, lambdas: Tensor, ids: Tensor) -> Tensor:
    """Lambda_t z for one block: (I, S, r). lambdas: (T, r, r), or (T, r) for diagonals."""
    if lambdas.dim() == 2:
        return z * lambdas[ids][:, None]
    if z.shape[1] > 1:
        return torch.bmm(z, lambdas[ids].mT)
    # One token an id: r numbers for each of the T tasks take less memory than r x r for each token. The product is one by task, so that a
    # task which is added later changes no bit of the others.
    every = torch.bmm(z[:, 0].expand(len(lambdas), -1, -1), lambdas.mT)  # (T, I, r)
    return every.take_along_dim(ids[None, :, None], 0).transpose(0, 1)
