"""Linear cross-entropy with all logits in memory: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "sum", chunk_tokens: int | None = None
) -> Tensor:
    """See `kernels.cross_entropy.linear_cross_entropy`; `chunk_tokens` changes nothing here."""
    acc = torch.float64 if torch.promote_types(hidden.dtype, weight.dtype) == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(acc) @ weight.to(acc).t()  # (M, V)
    valid = labels != ignore_index
    picked = logits.gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1)
    nll = (logits.logsumexp(dim=1) - picked).where(valid, 0.0)
    return nll.sum() if reduction == "sum" else nll
