"""Linear cross-entropy with a Triton softmax: torch multiplies a chunk of rows, one kernel turns its logits into losses and gradients.

Never run on a GPU: compiled for sm_80 and sm_90, its results checked in Triton's interpreter on the CPU only; sizes are unmeasured.

The kernel reads a row twice: once for the running maximum and sum, once to overwrite it with softmax - onehot in the logits' own dtype. So
a chunk needs one buffer where eager needs two. The loop over chunks, the float32 sum of the weight's gradient and the treatment of ignored
rows are eager's. A label outside the vocabulary makes its loss NaN. float64 runs in eager.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import eager
from kernels.launch import on_device

_BLOCK = 4096  # logits at a time within a row
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _softmax(logits, labels, nll, vocabulary, stride, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    logits += row.to(tl.int64) * stride
    known = (label >= 0) & (label < vocabulary)
    picked = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32) * _LOG2E
    top = tl.full((), -float("inf"), tl.float32)  # of the logits in base 2
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32) * _LOG2E
        new_top = tl.maximum(top, tl.max(value, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(value - new_top), 0)
        top = new_top
    tl.store(nll + row, (tl.log2(total) + top - picked) * _LN2)
    if GRADIENT:
        tl.debug_barrier()  # no warp overwrites what another has yet to read
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < vocabulary
            p = tl.exp2(tl.load(logits + column, mask=inside, other=0.0).to(tl.float32) * _LOG2E - top) / total
            p = tl.where(column == label, p - 1, p)
            tl.store(logits + column, p.to(logits.dtype.element_ty), mask=inside)


class _TritonChunks(eager.Chunks):
    def default_tokens(self) -> int:
        """Rows whose logits take about the memory of all hidden rows, so that the peak does not depend on the vocabulary."""
        vocabulary, dim = self.weight.shape
        wanted = triton.cdiv(len(self.labels), triton.cdiv(vocabulary, dim))
        return max(128, triton.next_power_of_2(max(1, wanted)))

    def softmax(self, logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        n, vocabulary = logits.shape
        nll = logits.new_empty(n, dtype=self.acc)
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        _softmax[(n,)](logits, labels, nll, vocabulary, logits.stride(0), BLOCK=block, GRADIENT=gradient, num_warps=8)
        return nll, logits if gradient else None


@on_device
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "sum", chunk_tokens: int | None = None
) -> Tensor:
    """See `kernels.cross_entropy.linear_cross_entropy`."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return eager.linear_cross_entropy(hidden, weight, labels, ignore_index, reduction, chunk_tokens)
    return eager.chunked(hidden, weight, labels, ignore_index, reduction, chunk_tokens, _TritonChunks)
