"""Many LoRAs in one batch: every token goes through the adapter that it belongs to.

`lora_grouped`, for LoRAs that share nothing (the grouped products of Punica, arXiv 2310.18547): tokens are sorted by adapter once
(`segments`), for all layers of a model; each segment then is an ordinary pair of thin products. `lora_mixed`, for tasks that share A and
the B (MTL-LoRA, arXiv 2410.09437): nothing is sorted, since tasks differ in a few numbers a token only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import expect_shape
from kernels.dispatch import pick

__all__ = ["Segments", "lora_grouped", "lora_mixed", "segments"]


class Segments(NamedTuple):
    """Which tokens belong to which adapter.

    order: (M,) int64, places of the tokens that have an adapter, sorted by it, in their own order inside; None: all tokens, as they stand.
    sizes: tokens of each adapter; they sum to M.
    """

    order: Tensor | None
    sizes: tuple[int, ...]


def segments(ids: Tensor, adapters: int) -> Segments:
    """Sort tokens by adapter. ids: (N,) int64, each the number of an adapter, or -1 for none. Reads the counts, so a GPU is waited for.

    Raises: ValueError for another shape or an id that no adapter has.

    >>> segments(torch.tensor([1, -1, 0, 1]), 3)
    Segments(order=tensor([2, 0, 3]), sizes=(1, 2, 0))
    """
    if ids.dim() != 1 or ids.is_floating_point() or (ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < adapters):
        raise ValueError(f"segments: ids are {ids.dtype} {tuple(ids.shape)}; expected whole numbers (N,) from -1 to {adapters - 1}")
    without, *sizes = torch.bincount(ids + 1, minlength=adapters + 1).tolist()
    if not without and bool((ids.diff() >= 0).all()):
        return Segments(None, tuple(sizes))
    return Segments(ids.argsort(stable=True)[without:], tuple(sizes))


@torch.compiler.disable  # the sizes of the segments are data
def lora_grouped(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], rows: Segments
) -> Tensor:  # fmt: skip
    """y_i + scales_g B_g A_g x_i for every token i of adapter g; y_i itself, bit for bit, for a token without one.

    Products are in the dtype of x, A and B; the sum is taken in the wider dtype and cast to y's. An adapter without tokens gets no
    gradient at all (None), so that an optimizer leaves it alone; where none has any, the result can still be differentiated. Equal calls
    give equal bits, gradients too.

    Args: y (N, out). x (N, in). a: G matrices (R_g, in); ranks may differ. b: G matrices (out, R_g). scales: G. rows: from `segments`.
    Returns: (N, out) in y's dtype. Raises: ValueError for shapes and numbers of adapters that do not fit.

    >>> y, x = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
    >>> a, b = [torch.ones(2, 1), torch.ones(1, 1)], [torch.ones(1, 2), torch.ones(1, 1)]
    >>> lora_grouped(y, x, a, b, [1.0, 10.0], segments(torch.tensor([1, -1, 0]), 2)).T
    tensor([[10.,  0.,  6.]])
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(f"lora_grouped: x has shape {tuple(x.shape)}, y {tuple(y.shape)}; expected (N, in) and (N, out)")
    if not len(a) == len(b) == len(scales) == len(rows.sizes):
        raise ValueError(f"lora_grouped: {len(a)} A, {len(b)} B, {len(scales)} scales, {len(rows.sizes)} segments; expected one of each")
    if sum(rows.sizes) != (len(x) if rows.order is None else len(rows.order)):
        raise ValueError(f"lora_grouped: segments of {sum(rows.sizes)} tokens for {len(x)} rows")
    for down, up in zip(a, b):
        expect_shape("lora_grouped", "A", down, *down.shape[:1], x.shape[1], letters="(R, in)")
        expect_shape("lora_grouped", "B", up, y.shape[1], *down.shape[:1], letters="(out, R)")
        if down.dtype != x.dtype or up.dtype != x.dtype:
            raise ValueError(f"lora_grouped: A is {down.dtype}, B {up.dtype}, x {x.dtype}; expected one dtype")
    return pick("lora_grouped", x.device).lora_grouped(y, x, a, b, scales, rows)


def lora_mixed(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, shares: Tensor, lambdas: Tensor | None, scale: float, ids: Tensor, splits: Sequence[int]
) -> Tensor:  # fmt: skip
    """y_i + scale B_t Lambda_t A x_i for the task t of row i, with B_t = sum_j shares_tj B_j (MTL-LoRA, section 2 of arXiv 2410.09437).

    Differentiable in all tensors but ids; parts of tasks that no row has get a gradient of zero. Products are in the dtype of x, A and B,
    or in that of autocast; the sum is taken in the wider dtype and cast to y's.

    Args: y (I, S, out), x (I, S, in): S tokens of each row. a (r, in). b (n, out, r). shares (T, n). lambdas: one matrix (T, blocks, r, r),
    or one diagonal (T, blocks, r), for each block of the rows of y; None: the identity. ids (I,) int64 from 0 to T - 1, not checked.
    splits: rows of each block, which sum to out. Returns: (I, S, out) in y's dtype. Raises: ValueError for shapes that do not fit.

    >>> one, two = torch.ones(1, 1), torch.tensor([[[1.0]], [[3.0]]])
    >>> shares = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    >>> lora_mixed(torch.zeros(2, 1, 1), torch.ones(2, 1, 1), one, two, shares, None, 10.0, torch.tensor([1, 0]), [1]).flatten()
    tensor([20., 10.])
    """
    if x.dim() != 3 or y.dim() != 3 or x.shape[:2] != y.shape[:2]:
        raise ValueError(f"lora_mixed: x has shape {tuple(x.shape)}, y {tuple(y.shape)}; expected (I, S, in) and (I, S, out)")
    expect_shape("lora_mixed", "ids", ids, len(x), letters="(I,)")
    expect_shape("lora_mixed", "A", a, *a.shape[:1], x.shape[2], letters="(r, in)")
    expect_shape("lora_mixed", "B", b, *b.shape[:1], y.shape[2], a.shape[0], letters="(n, out, r)")
    expect_shape("lora_mixed", "shares", shares, *shares.shape[:1], b.shape[0], letters="(T, n)")
    if sum(splits) != y.shape[2]:
        raise ValueError(f"lora_mixed: blocks of {sum(splits)} rows; y has {y.shape[2]}")
    if lambdas is not None:
        rank = (a.shape[0],) * (2 if lambdas.dim() == 4 else 1)
        expect_shape("lora_mixed", "lambdas", lambdas, len(shares), len(splits), *rank, letters="(T, blocks, r, r) or (T, blocks, r)")
    return pick("lora_grouped", x.device).lora_mixed(y, x, a, b, shares, lambdas, scale, ids, splits)
