"""Linear cross-entropy over chunks of tokens; the gradients are computed in the forward, while a chunk's logits are at hand.

Taking the gradients at once keeps one chunk of logits alive instead of all. The exponential is exp2 of pre-scaled logits, for the
reason given in selective_scan.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits at a time. 2^20 (4 MiB of float32) measured best or within 5 % of it at M=2048 D=192 V=2048 on one AVX-512 core, fp32 and bf16.
_CHUNK_LOGITS = 1 << 20
_MIN_TOKENS = 128  # keeps the matmuls of a large vocabulary wide
_LOG2E = math.log2(math.e)


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    common = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and common != torch.float64:
        return torch.get_autocast_dtype(device)
    return common


class Chunks:
    """Valid rows of one call in the dtype of the matmuls; a backend with a kernel of its own overrides `softmax` and `default_tokens`."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk_tokens: int | None, dtype: torch.dtype
    ) -> None:
        # On a GPU this waits for the device, once a call: what it takes for ignored rows to cost nothing.
        rows = (labels != ignore_index).nonzero().squeeze(1)
        self.rows = None if len(rows) == len(labels) else rows  # (M',) indices, None for all
        self.labels = labels if self.rows is None else labels[self.rows]
        self.hidden = (hidden if self.rows is None else hidden[self.rows]).to(dtype)  # (M', D)
        self.weight = weight.to(dtype)  # (V, D)
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.size = min(chunk_tokens or self.default_tokens(), max(1, len(self.labels)))
        self.logits = self.hidden.new_empty(self.size, len(weight))

    def default_tokens(self) -> int:
        return max(_MIN_TOKENS, _CHUNK_LOGITS // len(self.weight))

    def starts(self) -> range:
        return range(0, len(self.labels), self.size)

    def forward(self, first: int, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """nll (n,) of the chunk that begins at row `first`, and its dlogits (n, V) in a buffer that the next chunk reuses."""
        hidden, labels = self.hidden[first : first + self.size], self.labels[first : first + self.size]
        return self.softmax(torch.mm(hidden, self.weight.t(), out=self.logits[: len(labels)]), labels, gradient)

    def softmax(self, logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """nll (n,), and with `gradient` softmax - onehot (n, V) in the dtype of the logits, which may be overwritten."""
        raise NotImplementedError

    def spread(self, values: Tensor, length: int) -> Tensor:
        """Put the valid rows' values back among `length` rows, zero elsewhere."""
        if self.rows is None:
            return values
        return values.new_zeros(length, *values.shape[1:]).index_copy_(0, self.rows, values)


class _TorchChunks(Chunks):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.probabilities = self.logits.new_empty(*self.logits.shape, dtype=self.acc)

    def softmax(self, logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        n, labels = len(labels), labels.unsqueeze(1)
        top = logits.amax(dim=1, keepdim=True).to(self.acc)
        p = torch.sub(logits, top, out=self.probabilities[:n])
        picked = p.gather(1, labels)
        total = p.mul_(_LOG2E).exp2_().sum(dim=1, keepdim=True)
        nll = (total.log() - picked).squeeze(1)
        if not gradient:
            return nll, None
        p.div_(total).scatter_add_(1, labels, p.new_full((n, 1), -1.0))
        return nll, p if p.dtype == logits.dtype else logits.copy_(p)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk_tokens: int | None, kind: type[Chunks]
    ) -> Tensor:
        dtype = _matmul_dtype(hidden, weight)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = kind(hidden, weight, labels, ignore_index, chunk_tokens, dtype)
            loss = chunks.hidden.new_zeros((), dtype=chunks.acc)
            dhidden = torch.empty_like(chunks.hidden) if want_hidden else None
            dweight = chunks.weight.new_zeros(chunks.weight.shape, dtype=chunks.acc) if want_weight else None
            for first in chunks.starts():
                nll, dlogits = chunks.forward(first, want_hidden or want_weight)
                loss += nll.sum()
                if dlogits is None:
                    continue
                rows = slice(first, first + len(nll))
                if dhidden is not None:
                    torch.mm(dlogits, chunks.weight, out=dhidden[rows])
                if dweight is not None:
                    dweight += dlogits.t() @ chunks.hidden[rows]
            if dhidden is not None:
                dhidden = chunks.spread(dhidden, len(hidden)).to(hidden.dtype)
            if dweight is not None:
                dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * dloss.to(dhidden.dtype),
            None if dweight is None else dweight * dloss.to(dweight.dtype),
            None,
            None,
            None,
            None,
        )


def chunked(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str, chunk_tokens: int | None, kind: type[Chunks]
) -> Tensor:
    """See `kernels.cross_entropy.linear_cross_entropy`; `kind` says how the softmax of a chunk is computed."""
    if reduction == "sum":
        return _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index, chunk_tokens, kind)
    with torch.no_grad():
        dtype = _matmul_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = kind(hidden, weight, labels, ignore_index, chunk_tokens, dtype)
            values = [chunks.forward(first, False)[0] for first in chunks.starts()]
            nll = torch.cat(values) if values else chunks.hidden.new_zeros(0, dtype=chunks.acc)
            return chunks.spread(nll, len(hidden))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "sum", chunk_tokens: int | None = None
) -> Tensor:
    """See `kernels.cross_entropy.linear_cross_entropy`."""
    return chunked(hidden, weight, labels, ignore_index, reduction, chunk_tokens, _TorchChunks)
