"""By torch's operators: four passes over the logits."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(logits: Tensor, blocked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `kernels.next_token.greedy`."""
    ids = (logits if blocked is None else logits.masked_fill(blocked, -torch.inf)).argmax(dim=1)
    return ids, logprobs(logits, ids[:, None]).squeeze(1)


def logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """See `kernels.next_token.logprobs`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)
