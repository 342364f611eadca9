"""Newton-Schulz in Triton: products whose result is symmetric compute the tiles on and below the diagonal, and store each one twice.

Those are X X' and the polynomials of it, s x s; the product with X itself is torch's. In them float32 is multiplied in full precision, and
sums are float32. float64 runs in eager. Never run on a GPU: compiled for sm_80 and sm_90, its results checked in Triton's interpreter on
the CPU only; tile sizes are unmeasured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.launch import on_device
from kernels.newton_schulz import eager

_INTERPRETED = knobs.runtime.interpret
_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# (rows of a tile, depth of a step, warps): three stages of two float32 tiles are 48 KiB of shared memory, of two narrow ones 96 KiB. With
# four warps a float32 tile spills registers on sm_80.
_TILES = {torch.float32: (64, 32, 8), torch.bfloat16: (128, 64, 8), torch.float16: (128, 64, 8)}


@triton.jit
def _lower_tile(index):
    """Row and column of tile `index` of a lower triangle that is counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # the root is rounded
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def _symmetric_kernel(
    left, right, add, out, size, depth, tiles, alpha, beta, left_b, left_s, left_k, right_b, right_k, right_s, add_b, add_s, add_t,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of alpha * left @ right + beta * add and its mirror image. left: (batch, s, k). right: (batch, k, s). add: (batch, s, s)."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile_row, tile_column = _lower_tile(tl.program_id(0) % tiles)
    row = (tile_row * SIDE + tl.arange(0, SIDE))[:, None]
    column = (tile_column * SIDE + tl.arange(0, SIDE))[None, :]
    step = tl.arange(0, DEPTH)
    left += batch * left_b + row.to(tl.int64) * left_s
    right += batch * right_b + column.to(tl.int64) * right_s
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for first in range(0, depth, DEPTH):
        k = (first + step).to(tl.int64)
        inside = first + step < depth
        a = tl.load(left + k[None, :] * left_k, mask=(row < size) & inside[None, :], other=0.0).to(DOT)
        b = tl.load(right + k[:, None] * right_k, mask=(column < size) & inside[:, None], other=0.0).to(DOT)
        total = tl.dot(a, b, total, input_precision="ieee")
    total *= alpha
    lower = (row >= column) & (row < size)  # on the diagonal the upper half of a tile is mirrored too: the result is symmetric to the bit
    if add is not None:
        at = add + batch * add_b + row.to(tl.int64) * add_s + column.to(tl.int64) * add_t
        total += beta * tl.load(at, mask=lower, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    out += batch * size * size
    tl.store(out + row.to(tl.int64) * size + column, total, mask=lower)
    tl.store(out + tl.trans(column).to(tl.int64) * size + tl.trans(row), tl.trans(total), mask=tl.trans(lower))


@on_device
def symmetric_product(left: Tensor, right: Tensor, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """See `kernels.newton_schulz.eager.Product`. Any strides; the result is contiguous, in left's dtype. Of add, the lower half counts."""
    if left.dtype not in _DOT_TYPES:
        return eager.full_product(left, right, add, beta, alpha)
    batch, size, depth = left.shape
    out = left.new_empty(batch, size, size)
    if out.numel() == 0:
        return out
    side, step, warps = _TILES[left.dtype]
    side, step = (min(most, max(16, triton.next_power_of_2(needed))) for most, needed in ((side, size), (step, depth)))
    rows = triton.cdiv(size, side)
    tiles = rows * (rows + 1) // 2
    added = (0, 0, 0) if add is None else add.stride()
    _symmetric_kernel[(batch * tiles,)](
        left, right, add, out, size, depth, tiles, alpha, beta, *left.stride(), *right.stride(), *added,
        SIDE=side, DEPTH=step, DOT=tl.float32 if _INTERPRETED else _DOT_TYPES[left.dtype], num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out


def newton_schulz(
    x: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float, dtype: torch.dtype | None = None, form: str = "auto"
) -> Tensor:
    """See `kernels.newton_schulz.newton_schulz`."""
    return eager.newton_schulz(x, steps, coefficients, eps, dtype, form, product=symmetric_product)


def gram_factor(gram: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """See `kernels.newton_schulz.gram_factor`."""
    return eager.gram_factor(gram, steps, coefficients, product=symmetric_product)
