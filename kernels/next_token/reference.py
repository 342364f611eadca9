"""Written out: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(logits: Tensor, blocked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `kernels.next_token.greedy`."""
    ids = (logits if blocked is None else torch.where(blocked, -torch.inf, logits)).argmax(dim=1)
    return ids, logprobs(logits, ids[:, None]).squeeze(1)


def logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """See `kernels.next_token.logprobs`."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1).gather(1, ids)
