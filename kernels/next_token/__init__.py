"""The end of a decoding step: the most likely token of each row, and log-probabilities of tokens, in one go over the logits."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import expect_dims
from kernels.dispatch import pick

__all__ = ["greedy", "logprobs"]


def greedy(logits: Tensor, blocked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest logit of each row that is not blocked (of equals the first), and its log-probability among all of the row.

    Args: logits (B, V). blocked: bool (V,) or (B, V), what is never chosen; where all is, token 0 is chosen.
    Returns: ids (B,) int64, and their `logprobs` (B,), to the last bit. Raises: ValueError for shapes that do not fit.

    >>> import torch
    >>> greedy(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([False, True, False]))
    (tensor([2]), tensor([-0.8620]))
    """
    expect_dims("greedy", "logits", logits, 2, "(B, V)")
    if blocked is not None and blocked.shape != logits.shape and blocked.shape != logits.shape[1:]:
        raise ValueError(f"greedy: blocked has shape {tuple(blocked.shape)}; expected (V,) or (B, V) of {tuple(logits.shape)}")
    return pick("next_token", logits.device).greedy(logits, blocked)


def logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log_softmax(logits)[row, id]. Without gradients.

    Args: logits (B, V). ids: int64 (B, n), each below V.
    Returns: (B, n) float32 (float64); a row's bits depend on that row alone, and are not finite where one of its logits is NaN or +inf.
    Raises: ValueError for shapes that do not fit.
    """
    expect_dims("logprobs", "logits", logits, 2, "(B, V)")
    if ids.dim() != 2 or len(ids) != len(logits):
        raise ValueError(f"logprobs: ids has shape {tuple(ids.shape)}; expected (B, n) with B = {len(logits)}")
    return pick("next_token", logits.device).logprobs(logits, ids)
