"""The learning-rate law against planted parameters."""

import math

import numpy as np
import pytest

from components.scaling.lr_law import Law, fit_law, optimum

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
BUDGETS = [1e6, 2e6, 4e6, 8e6]


def points(tokens, b, slope, noise=0.0, seed=0, curvature=0.1):
    """Losses that are a parabola in ln lr round b * tokens^slope."""
    rng = np.random.default_rng(seed)
    best = math.log(b * tokens**slope)
    return {lr: [3 + curvature * (math.log(lr) - best) ** 2 + noise * rng.standard_normal()] for lr in RATES}


@pytest.mark.parametrize("slope", [-0.32, -0.1, 0.05])
def test_planted_parameters_come_back(slope):
    b = 6e-3 / 2.8e6**slope
    found = [optimum(tokens, points(tokens, b, slope)) for tokens in BUDGETS]
    for one in found:
        assert one.inside and one.rate == pytest.approx(b * one.tokens**slope, rel=1e-6) and one.loss == pytest.approx(3, abs=1e-9)
    law = fit_law(found, slope, seed=0)
    assert (law.B, law.free_slope) == (pytest.approx(b, rel=1e-6), pytest.approx(slope, abs=1e-6))
    assert law.free_B == pytest.approx(b, rel=1e-4) and law.rate(1e9) == pytest.approx(b * 1e9**slope, rel=1e-6)
    assert law.interval == (pytest.approx(slope, abs=1e-5), pytest.approx(slope, abs=1e-5))  # no residual


def test_another_slope_changes_b_and_not_the_free_slope():
    found = [optimum(tokens, points(tokens, 2.0, -0.4)) for tokens in BUDGETS]
    law = fit_law(found, -0.32, seed=0)
    assert law.free_slope == pytest.approx(-0.4, abs=1e-6)
    middle = math.exp(np.mean(np.log(BUDGETS)))
    assert law.rate(middle) == pytest.approx(2.0 * middle**-0.4, rel=1e-6)  # the two laws cross in the middle of the budgets


def test_interval_holds_the_planted_slope_about_as_often_as_it_says():
    """60 noisy sweeps. A residual bootstrap of two degrees of freedom a budget is a little short of its level."""
    held, widths = 0, []
    for seed in range(60):
        found = [optimum(tokens, points(tokens, 0.5, -0.32, noise=3e-3, seed=100 * seed + i)) for i, tokens in enumerate(BUDGETS)]
        low, high = fit_law(found, -0.32, seed).interval
        held += low <= -0.32 <= high
        widths.append(high - low)
    assert 45 <= held <= 60 and 0.005 < np.median(widths) < 0.5


def test_seeds_are_averaged():
    one = optimum(1e6, {0.01: [1.0, 3.0], 0.02: [1.5, 1.5], 0.04: [2.5, 1.5]})
    assert one.losses.tolist() == [2.0, 1.5, 2.0] and one.rate == pytest.approx(0.02)


@pytest.mark.parametrize("losses", [[1, 2, 3], [3, 2, 1], [2, 3, 2], [1, 1, 1]])
def test_an_optimum_outside_the_grid_is_said(losses):
    one = optimum(1e6, {lr: [loss] for lr, loss in zip((0.01, 0.02, 0.04), losses)})
    assert not one.inside and one.rate == (0.01, 0.02, 0.04)[int(np.argmin(losses))]


def test_far_rates_do_not_bend_the_parabola():
    near = points(1e6, 0.5, -0.32)
    assert optimum(1e6, {**near, 1.0: [50.0], 2.0: [90.0]}).rate == pytest.approx(optimum(1e6, near).rate, rel=1e-6)


def test_too_little_to_fit():
    with pytest.raises(ValueError, match=r"2 rate\(s\); at least 3"):
        optimum(1e6, {0.1: [1.0], 0.2: [1.0]})
    with pytest.raises(ValueError, match=r"1 budget\(s\) with an optimum inside the grid; at least 2"):
        fit_law([optimum(1e6, points(1e6, 0.5, -0.32))], -0.32, 0)


def test_three_rates_leave_no_residual_and_no_interval():
    found = [optimum(d, {lr: loss for lr, loss in points(d, 0.5, -0.32).items() if 3e-3 < lr < 2e-2}) for d in BUDGETS[:2]]
    assert fit_law(found, -0.32, 0).interval is None


def test_law_is_a_power():
    assert Law(2.0, -0.5, 0, 0, None).rate(4.0) == 1.0
