"""Many LoRAs in one batch: every token goes through the adapter that it belongs to (the grouped products of Punica, arXiv 2310.18547).

Tokens are sorted by adapter once (`segments`), for all layers of a model; each segment then is an ordinary pair of thin products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import expect_shape
from kernels.dispatch import pick

__all__ = ["Segments", "lora_grouped", "segments"]


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
