"""Schedules by hand: t counts optimizer steps from 1."""

import io
import math
import pickle

import pytest
import torch

from components.contracts import UserError
from components.schedules import constant, cosine, wsd

WSD = {"warmup_steps": None, "warmup_fraction": 0.0, "decay_steps": None, "decay_fraction": 0.5, "decay": "linear", "final_factor": 0.0}


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}, {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1}]
    return torch.optim.SGD(groups)


def factors(schedule, steps: int) -> list[float]:
    """Rates that the steps 1..n of the first group really run at; the second group must keep its ratio."""
    seen = []
    for _ in range(steps):
        first, second = (group["lr"] for group in schedule.optimizer.param_groups)
        assert second == pytest.approx(0.1 * first)
        seen.append(first)
        schedule.optimizer.step()
        schedule.step()
    return seen


def test_constant():
    assert factors(constant(optimizer(), 6, warmup_steps=4, warmup_fraction=0.5), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factors(constant(optimizer(), 3, warmup_steps=None, warmup_fraction=0.0), 3) == [1, 1, 1]


def test_cosine():
    got = factors(cosine(optimizer(), 6, warmup_steps=2, warmup_fraction=0.0, final_factor=0.1), 8)
    by_hand = [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)] + [0.1, 0.1]
    assert got == pytest.approx(by_hand, rel=1e-12)
    assert got[5] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("decay", "tail"), [("linear", [0.8, 0.6, 0.4, 0.2]), ("one_minus_sqrt", [0.2 + 0.8 * (1 - math.sqrt(k / 4)) for k in (1, 2, 3, 4)])]
)
def test_wsd(decay, tail):
    schedule = wsd(optimizer(), 10, warmup_steps=2, warmup_fraction=0.0, decay_steps=4, decay_fraction=0.0, decay=decay, final_factor=0.2)
    assert factors(schedule, 11) == pytest.approx([0.5, 1, 1, 1, 1, 1, *tail, 0.2], rel=1e-12)


def test_fractions_round_and_steps_win():
    assert factors(constant(optimizer(), 10, warmup_steps=None, warmup_fraction=0.19), 3) == [0.5, 1, 1]
    assert factors(constant(optimizer(), 10, warmup_steps=0, warmup_fraction=0.19), 2) == [1, 1]
    assert factors(wsd(optimizer(), 4, **WSD), 4) == [1, 1, 0.5, 0]
    assert factors(cosine(optimizer(), 1, warmup_steps=None, warmup_fraction=0.9, final_factor=0.5), 1) == [0.5]


def test_resume_continues_with_the_configured_horizon():
    """State is numbers only, loads with weights_only, and does not bring the old horizon back."""
    first = cosine(optimizer(), 8, warmup_steps=2, warmup_fraction=0.0, final_factor=0.0)
    whole = factors(cosine(optimizer(), 8, warmup_steps=2, warmup_fraction=0.0, final_factor=0.0), 8)
    assert factors(first, 3) == whole[:3]
    file = io.BytesIO()
    torch.save({"schedule": first.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = cosine(optimizer(), 8, warmup_steps=2, warmup_fraction=0.0, final_factor=0.0)
    second.load_state_dict(saved["schedule"])
    second.optimizer.load_state_dict(saved["optimizer"])
    assert factors(second, 5) == whole[3:]
    longer = constant(optimizer(), 50, warmup_steps=10, warmup_fraction=0.0)
    longer.load_state_dict(saved["schedule"])
    longer.step()
    assert longer.get_last_lr()[0] == pytest.approx(0.5)


def test_factor_functions_pickle():
    schedule = wsd(optimizer(), 10, **WSD)
    again = pickle.loads(pickle.dumps(schedule.lr_lambdas))
    assert [again[0](t) for t in range(10)] == [schedule.lr_lambdas[0](t) for t in range(10)]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: constant(optimizer(), 5, warmup_steps=5, warmup_fraction=0.0), "schedule.warmup_steps: 5;"),
        (lambda: constant(optimizer(), 5, warmup_steps=-1, warmup_fraction=0.0), "schedule.warmup_steps: -1;"),
        (lambda: constant(optimizer(), 5, warmup_steps=None, warmup_fraction=1.0), "schedule.warmup_fraction: 1.0;"),
        (lambda: constant(optimizer(), 0, warmup_steps=None, warmup_fraction=0.0), "trainer.max_steps: 0;"),
        (lambda: cosine(optimizer(), 5, warmup_steps=1, warmup_fraction=0.0, final_factor=1.5), "schedule.final_factor: 1.5;"),
        (lambda: wsd(optimizer(), 5, **{**WSD, "decay": "cubic"}), "schedule.decay: cubic; allowed: linear, one_minus_sqrt"),
        (lambda: wsd(optimizer(), 5, **{**WSD, "decay_steps": 4, "warmup_steps": 2}), "schedule.decay_steps: 4;"),
        (lambda: wsd(optimizer(), 5, **{**WSD, "decay_fraction": -0.5}), "schedule.decay_fraction: -0.5;"),
    ],
)
def test_mistakes_are_named(build, words):
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
