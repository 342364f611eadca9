"""Language-model losses: pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from components.contracts import IGNORE
from kernels.cross_entropy import linear_cross_entropy


def next_token_loss(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, loss_tokens: int, accumulate: int = 1, world_size: int = 1
) -> Tensor:
    """One micro-batch's share of the mean negative log-likelihood of an optimizer step.

    The trainer divides the loss of each micro-batch by `accumulate`, and gradients are averaged over `world_size` ranks. Both are
    undone here, so that the gradient of the whole step is that of sum(nll) / loss_tokens, however unevenly the counted tokens are spread.

    Args:
        hidden: (B, T, D) output of the final norm.
        head_weight: (V, D).
        labels: (B, T) int64, the token that follows each position; IGNORE where it does not count.
        loss_tokens: counted labels of the whole optimizer step (all micro-batches, all ranks).
        accumulate: micro-batches in an optimizer step.
        world_size: ranks.

    Returns:
        () float32.

    Example:
        >>> hidden, head = torch.zeros(1, 2, 4), torch.zeros(8, 4)
        >>> round(next_token_loss(hidden, head, torch.tensor([[1, 2]]), loss_tokens=2).item(), 4)  # ln 8
        2.0794
    """
    total = linear_cross_entropy(hidden.flatten(0, 1), head_weight, labels.flatten(), reduction="sum")
    return total * (accumulate * world_size / max(1, loss_tokens))


@torch.no_grad()
def nll_sum(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood summed over the counted labels, () float64 nats, and their number, () int64. Shapes as above."""
    nll = linear_cross_entropy(hidden.flatten(0, 1), head_weight, labels.flatten(), reduction="none")  # (B*T,)
    return nll.double().sum(), (labels != IGNORE).sum()


def bits_per_byte(nll: float, text_bytes: int) -> float:
    """Nats over a whole text to bits per byte of it.

    Example:
        >>> bits_per_byte(math.log(2) * 80, 10)
        8.0
    """
    return nll / math.log(2) / text_bytes
