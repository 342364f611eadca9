"""Losses over pairs of answers: pure functions of tensors. A pair is a chosen and a rejected answer to one prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from components.contracts import IGNORE
from kernels.cross_entropy import linear_cross_entropy


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7), with smoothed labels (cDPO, E. Mitchell 2023).

    With the implicit rewards r = beta * (log policy - log reference) and the margin m = r_chosen - r_rejected, the loss of a pair is
    -(1 - label_smoothing) * log sigmoid(m) - label_smoothing * log sigmoid(-m).

    Args:
        policy_chosen, policy_rejected: (B,) log-probability of each answer given its prompt, nats.
        reference_chosen, reference_rejected: (B,) the same under the model that training started from, without gradient.
        beta: how dear it is to leave the reference.
        label_smoothing: share of the pairs that are thought to be labelled the wrong way round, in [0, 0.5); 0 is DPO itself.

    Returns:
        Losses (B,), rewards of the chosen answers (B,), rewards of the rejected ones (B,); the rewards without gradient.

    Example:
        >>> same = torch.tensor([-5.0])
        >>> loss, chosen, rejected = dpo(same, same, same, same, beta=0.1, label_smoothing=0.0)
        >>> round(loss.item(), 4), chosen.item()  # ln 2
        (0.6931, 0.0)
    """
    chosen, rejected = beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected  # (B,)
    losses = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return losses, chosen.detach(), rejected.detach()


def sequence_logprobs(hidden: Tensor, head_weight: Tensor, labels: Tensor, normalise: str) -> tuple[Tensor, Tensor]:
    """Log-probability of the counted labels of every row, without the (B, T, V) logits in memory.

    The backward goes through the head a second time, row by row, because the weight of a row in the loss is known only then.

    Args:
        hidden: (B, T, D) output of the final norm.
        head_weight: (V, D).
        labels: (B, T) int64, the token that follows each position; IGNORE where it does not count.
        normalise: sum over the labels of a row, or mean: the sum over their number.

    Returns:
        (B,) nats, float32 (float64 for float64 inputs), 0 for a row without labels; and (B,) int64, how many labels each row has.

    Example:
        >>> logprobs, counts = sequence_logprobs(torch.zeros(1, 3, 4), torch.zeros(8, 4), torch.tensor([[1, 2, IGNORE]]), "sum")
        >>> round(logprobs.item(), 4), counts.item()  # -2 ln 8
        (-4.1589, 2)
    """
    logprobs: Tensor = _SequenceLogprobs.apply(hidden, head_weight, labels)
    counts = (labels != IGNORE).sum(dim=1)  # (B,)
    return (logprobs / counts.clamp(min=1) if normalise == "mean" else logprobs), counts


class _SequenceLogprobs(torch.autograd.Function):
    """-sum of the negative log-likelihood of each row; the fused loss gives either single values or gradients of a sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
        device = hidden.device.type
        ctx.save_for_backward(hidden, head_weight, labels)
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        nll = linear_cross_entropy(hidden.flatten(0, 1), head_weight, labels.flatten(), reduction="none")  # (B*T,)
        return -nll.view(labels.shape).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, labels = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        wanted = [i for i in (0, 1) if ctx.needs_input_grad[i]]
        weight = head_weight.detach().requires_grad_(1 in wanted)
        dhidden = torch.zeros_like(hidden) if 0 in wanted else None
        dweight = torch.zeros_like(head_weight) if 1 in wanted else None
        for row in range(len(hidden)):
            one = hidden[row].detach().requires_grad_(0 in wanted)
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                nll = linear_cross_entropy(one, weight, labels[row], reduction="sum")
            found = dict(zip(wanted, torch.autograd.grad(nll, [(one, weight)[i] for i in wanted], -grad[row].to(nll.dtype))))
            if dhidden is not None:
                dhidden[row] = found[0]
            if dweight is not None:
                dweight += found[1]
        return dhidden, dweight, None
