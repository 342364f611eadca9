"""DPO against numbers worked out by hand, and sequence log-probabilities against float64 with all logits in memory."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from components.contracts import IGNORE
from components.losses.preference import dpo, sequence_logprobs


def tensors(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_dpo_by_hand():
    """m = 0.5 * ((-10 + 11) - (-9 + 7)) = 1.5."""
    losses, chosen, rejected = dpo(*tensors(-10.0, -9.0, -11.0, -7.0), beta=0.5, label_smoothing=0.0)
    assert (chosen.item(), rejected.item()) == (0.5, -1.0)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-12)


def test_smoothed_labels_by_hand():
    losses, _, _ = dpo(*tensors(-10.0, -9.0, -11.0, -7.0), beta=0.5, label_smoothing=0.2)
    assert losses.item() == pytest.approx(0.8 * math.log1p(math.exp(-1.5)) + 0.2 * math.log1p(math.exp(1.5)), abs=1e-12)


def test_gradient_is_that_of_the_paper():
    """The gradient section of the paper: -beta * sigmoid(r_rejected - r_chosen) with respect to log policy(chosen)."""
    values = [value.requires_grad_() for value in tensors(-10.0, -9.0)]
    losses, chosen, rejected = dpo(*values, *tensors(-11.0, -7.0), beta=0.5, label_smoothing=0.0)
    losses.sum().backward()
    wanted = 0.5 / (1 + math.exp(1.5))
    assert [value.grad.item() for value in values] == [pytest.approx(-wanted, abs=1e-12), pytest.approx(wanted, abs=1e-12)]
    assert not chosen.requires_grad and not rejected.requires_grad


def test_far_margins_stay_finite():
    losses, _, _ = dpo(*tensors(-1e5, 0.0, 0.0, -1e5), beta=1.0, label_smoothing=0.0)
    assert losses.item() == pytest.approx(2e5)


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 7, 6, generator=generator, dtype=dtype)
    head = torch.randn(11, 6, generator=generator, dtype=dtype)
    labels = torch.randint(11, (5, 7), generator=generator)
    labels[0, :3], labels[1, 2:], labels[3] = IGNORE, IGNORE, IGNORE  # the fourth row has none
    return hidden, head, labels


def plain(hidden, head, labels, normalise):
    """With all logits in memory."""
    logprobs = log_softmax(hidden @ head.T, dim=-1)
    counted = labels != IGNORE
    picked = logprobs.gather(2, labels.where(counted, 0)[..., None]).squeeze(2).where(counted, 0.0)
    return picked.sum(1) / (counted.sum(1).clamp(min=1) if normalise == "mean" else 1)


@pytest.mark.parametrize("normalise", ["sum", "mean"])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_logprobs_and_gradients_equal_all_logits_in_memory(normalise, frozen):
    hidden, head, labels = case()
    weights = torch.tensor([0.3, -1.2, 0.0, 5.0, 2.0], dtype=torch.float64)
    found = []
    for function in (plain, lambda *inputs: sequence_logprobs(*inputs)[0]):
        inputs = [tensor.clone().requires_grad_(i != frozen) for i, tensor in enumerate((hidden, head))]
        values = function(*inputs, labels, normalise)
        (values * weights).sum().backward()
        found.append([values.detach(), *(tensor.grad for i, tensor in enumerate(inputs) if i != frozen)])
    for reference, ours in zip(*found, strict=True):
        assert (ours - reference).norm() <= 1e-12 * reference.norm()  # float64 in another order
    assert sequence_logprobs(hidden, head, labels, normalise)[1].tolist() == [4, 2, 7, 0, 7]


def test_autocast_holds_in_the_backward_too():
    """The second pass through the head runs in the precision of the first, wherever the backward is called."""
    hidden, head, labels = case(torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = sequence_logprobs(hidden, head, labels, "sum")
    values.sum().backward()
    rounded = hidden.detach().bfloat16().float().requires_grad_()
    plain(rounded, head.bfloat16().float(), labels, "sum").sum().backward()
    assert (hidden.grad - rounded.grad).norm() <= 1e-2 * rounded.grad.norm()  # measured 2e-3
    assert (hidden.grad - rounded.grad).norm() > 1e-5 * rounded.grad.norm()  # or it was not bfloat16
