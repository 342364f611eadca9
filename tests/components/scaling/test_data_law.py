"""The laws of loss over data against planted parameters, the published predictions, scipy's curve_fit and simulations."""

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import f as f_distribution

from components.scaling.data_law import LEVEL, Law, fit

PLANTED = Law(20.0, 2.0, 0.8, 2.0)  # E is what the largest size is made of; of a flatter law, noise hides more (see the last tests)
PAPER_SIZES = [10, 50, 250, 300, 1000, 4000]  # billions of tokens, arXiv 2503.19551
PAPER_ERRORS = {"3B": [35.4, 25.3, 19.5, 19.1, 16.9, 15.6], "8B": [26.8, 21.4, 18.6, 18.4, 17.4, 16.8]}


def planted(law, sizes, seeds=1, noise=0.0, seed=0, shared=0.0):
    """Runs of a law with normal errors of log L: of each run alone, and of all runs of a size together."""
    rng = np.random.default_rng(seed)
    runs = np.repeat(sizes, seeds)
    of_sizes = np.repeat(shared * rng.standard_normal(len(sizes)), seeds)
    return runs, np.array([law.loss(size) for size in runs]) * np.exp(of_sizes + noise * rng.standard_normal(len(runs)))


def numbers(law):
    return [law.B, law.D_l, law.beta, law.E]


@pytest.mark.parametrize(
    ("law", "low", "high"),
    [
        (PLANTED, 0.3, 300),
        (Law(43.07, 0.792, 0.515, 16.2), 0.1, 1000),
        (Law(5e8, 1.8e8, 1.476, 3.86), 5e4, 3e6),
        (Law(400.0, 30.0, 0.34, 1.7), 1e6, 1e12),
    ],
)
def test_planted_parameters_come_back(law, low, high):
    found = fit(*planted(law, np.geomspace(low, high, 8)), True, seed=0, at=[10 * high])
    assert numbers(found.law) == pytest.approx(numbers(law), rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-7) and found.scatter < 1e-8
    assert found.beta == (pytest.approx(law.beta, rel=1e-5),) * 2 and found.band[0] == (pytest.approx(law.loss(10 * high), rel=1e-5),) * 2


def test_from_scratch_d_l_is_zero_and_both_laws_are_one():
    law = Law(3000.0, 0.0, 0.4, 1.5)
    runs = planted(law, np.geomspace(1e6, 1e9, 8))
    both = [fit(*runs, rectified, seed=0).law for rectified in (True, False)]
    assert both[0].D_l == 0 and both[1].D_l == 0
    for found in both:
        assert numbers(found) == pytest.approx(numbers(law), rel=1e-6)


@pytest.mark.parametrize(("size", "beta", "e", "b", "d_l"), [("8B", 0.515, 16.20, 43.07, 0.792), ("3B", 0.522, 14.29, 100.94, 1.454)])
def test_the_published_predictions(size, beta, e, b, d_l):
    """To a tenth of a percent they are rounded, so that B and D_l are known to some percent only."""
    law = fit(PAPER_SIZES, PAPER_ERRORS[size], True, seed=0).law
    assert (law.beta, law.E) == (pytest.approx(beta, abs=0.005), pytest.approx(e, abs=0.05))
    assert (law.B, law.D_l) == (pytest.approx(b, rel=0.03), pytest.approx(d_l, rel=0.06))
    assert max(abs(law.loss(d) - error) for d, error in zip(PAPER_SIZES, PAPER_ERRORS[size])) < 0.04


@pytest.mark.parametrize(("size", "error"), [("8B", 28.7), ("3B", 40.0)])
def test_the_published_point_at_4_5_billion_lies_on_no_such_curve(size, error):
    sizes, errors = [4.5, *PAPER_SIZES], [error, *PAPER_ERRORS[size]]
    law = fit(sizes, errors, True, seed=0).law
    assert max(abs(law.loss(d) - e) for d, e in zip(sizes, errors)) > 0.25


def log_loss(x, log_b, log_d, beta, e):
    return np.log(np.exp(log_b) / (np.exp(log_d) + x**beta) + e)


def two_sided(sizes):
    """Errors of 1e-4 up and down, far within the least corner of Huber's loss, so that the fit is one of least squares."""
    x, losses = planted(PLANTED, sizes)
    return x, losses * np.exp(1e-4 * np.random.default_rng(3).choice([-1, 1], len(x)))


def test_equals_curve_fit():
    x, losses = two_sided(np.geomspace(0.3, 300, 12))
    law = fit(x, losses, True, seed=0).law
    theirs, _ = curve_fit(log_loss, x, np.log(losses), p0=[3.0, 1.0, 1.0, 1.0], maxfev=20000, xtol=1e-12, ftol=1e-12)
    assert [np.log(law.B), np.log(law.D_l), law.beta, law.E] == pytest.approx(theirs.tolist(), rel=1e-5)


def test_an_interval_ends_where_the_f_test_refuses():
    """The best fit with beta held there, by curve_fit: F of its sum of squares."""
    x, losses = two_sided(np.geomspace(0.3, 300, 12))
    found = fit(x, losses, True, seed=0)
    start = [np.log(found.law.B), np.log(found.law.D_l), found.law.E]

    def squares(beta):
        p, _ = curve_fit(lambda x, b, d, e: log_loss(x, b, d, beta, e), x, np.log(losses), p0=start, maxfev=20000, xtol=1e-12, ftol=1e-12)
        return np.square(log_loss(x, p[0], p[1], beta, p[2]) - np.log(losses)).sum()

    least = squares(found.law.beta)
    for end in found.beta:
        assert (squares(end) / least - 1) * (12 - 4) == pytest.approx(f_distribution.ppf(LEVEL, 1, 12 - 4), rel=0.02)


def test_what_a_size_shares_is_no_spread_of_its_runs():
    """Copies of a run are no further evidence, and do not narrow the intervals."""
    x, losses = two_sided(np.geomspace(0.3, 300, 8))
    once, copied = fit(x, losses, True, seed=0), fit(np.repeat(x, 5), np.repeat(losses, 5), True, seed=0)
    assert copied.law.beta == pytest.approx(once.law.beta, rel=1e-6)
    assert (copied.beta, copied.E) == (pytest.approx(once.beta, rel=1e-3), pytest.approx(once.E, rel=1e-3))


@pytest.mark.parametrize("c", [1e-9, 1e6])
def test_another_unit_of_the_size(c):
    x, losses = planted(PLANTED, np.geomspace(0.3, 300, 8), seeds=2, noise=0.01)
    here, there = fit(x, losses, True, seed=0), fit(c * x, losses, True, seed=0)
    assert (there.law.beta, there.law.E) == (pytest.approx(here.law.beta, rel=1e-6), pytest.approx(here.law.E, rel=1e-6))
    scaled = [value * c**here.law.beta for value in (here.law.B, here.law.D_l)]
    assert [there.law.B, there.law.D_l] == pytest.approx(scaled, rel=1e-4)  # beta's last digits times log c
    assert there.beta == pytest.approx(here.beta, rel=1e-3) and there.error == pytest.approx(here.error, abs=1e-6)


def test_the_largest_size_is_predicted_from_the_others():
    x, losses = planted(PLANTED, np.geomspace(0.3, 300, 8), seeds=2, noise=0.01)
    losses[-2:] *= 1.1
    found = fit(x, losses, True, seed=0)
    assert found.predicted == pytest.approx(fit(x[:-2], losses[:-2], True, seed=0).law.loss(300), rel=1e-9)
    assert found.error == pytest.approx(found.predicted / losses[-2:].mean() - 1, rel=1e-9) and -0.15 < found.error < -0.05


def test_a_run_that_went_astray_does_not_bend_the_curve():
    x, losses = planted(PLANTED, np.geomspace(0.3, 300, 8), seeds=3, noise=0.002)
    losses[13] *= 1.5
    law = fit(x, losses, True, seed=0).law
    assert (law.beta, law.E) == (pytest.approx(PLANTED.beta, abs=0.02), pytest.approx(PLANTED.E, rel=0.02))


@pytest.mark.parametrize("seed", range(3))
def test_planted_parameters_come_back_under_noise(seed):
    """1 % on every run, 16 sizes over three decades, 8 seeds each: no estimator can know beta better than to 0.007, E than to 0.5 %."""
    law = fit(*planted(PLANTED, np.geomspace(0.3, 300, 16), 8, 0.01, seed), True, seed=0).law
    assert abs(law.beta - PLANTED.beta) <= 0.02 and abs(law.E / PLANTED.E - 1) <= 0.02


def test_what_the_runs_leave_open_is_said():
    """Five points of a nearly straight line: any beta, and E anywhere below the smallest loss."""
    x = np.geomspace(1, 3, 5)
    found = fit(x, 3 - 0.1 * np.log(x) + 0.02 * np.array([1, -1, 1, -1, 1]), True, seed=0, at=[30.0])
    assert found.beta == (-np.inf, np.inf)
    assert found.E[0] == 0 and found.E[1] == pytest.approx(2.8976, abs=1e-4)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1, 2, 4, 8], [4, 3, 2.5, 2.2], r"4 different size\(s\); the law has 4 parameters and needs at least 5"),
        ([1, 2, 4, 8, 8, 8], [4, 3, 2.5, 2.2, 2.2, 2.3], r"4 different size\(s\)"),
        ([1, 2, 4, 8, 16], [2.5] * 5, "all losses are 2.5; there is nothing to fit"),
        ([1, 2, 4, 8, 16], [1, 2, 3, 4, 5], "the loss does not fall as the size grows"),
        ([1, 2, 4, 8, 16], [4, 3, np.nan, 2.2, 2.1], "a loss is nan; it must be a number above 0"),
        ([1, 2, 4, 8, 16], [4, 3, 2.5, 0, 2.1], "a loss is 0;"),
        ([0, 2, 4, 8, 16], [4, 3, 2.5, 2.2, 2.1], "a size is 0;"),
        ([1, 2, 4, 8, np.inf], [4, 3, 2.5, 2.2, 2.1], "a size is inf;"),
    ],
)
def test_nothing_to_fit(sizes, losses, message):
    with pytest.raises(ValueError, match=message):
        fit(sizes, losses, True, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "shared"), [(1, 0.0), (3, 0.01)])
def test_intervals_hold_the_planted_values_about_as_often_as_they_say(seeds, shared):
    """100 sweeps of 8 sizes over three decades; 88 of 100 is three standard deviations below 95 %."""
    held = np.zeros(2)
    for seed in range(100):
        found = fit(*planted(PLANTED, np.geomspace(0.3, 300, 8), seeds, 0.01, seed, shared), True, seed)
        held += [found.beta[0] <= PLANTED.beta <= found.beta[1], found.E[0] <= PLANTED.E <= found.E[1]]
    assert (held >= 88).all(), held


@pytest.mark.slow
def test_errors_are_near_the_least_possible():
    """100 sweeps of 12 sizes over three decades, 4 seeds, 1 %: the Cramer-Rao bound is 0.0116 for beta and 0.8 % for E."""
    x, _ = planted(PLANTED, np.geomspace(0.3, 300, 12), 4)
    theta = np.array([np.log(PLANTED.B), np.log(PLANTED.D_l), PLANTED.beta, PLANTED.E])
    slopes = np.stack([(log_loss(x, *(theta + h)) - log_loss(x, *(theta - h))) / 2e-6 for h in 1e-6 * np.eye(4)], axis=1)
    bound = 0.01 * np.sqrt(np.linalg.inv(slopes.T @ slopes).diagonal())[2:]
    laws = [fit(*planted(PLANTED, np.geomspace(0.3, 300, 12), 4, 0.01, seed), True, seed).law for seed in range(100)]
    errors = np.array([[law.beta - PLANTED.beta, law.E - PLANTED.E] for law in laws])
    assert (np.sqrt(np.square(errors).mean(0)) < 1.25 * bound).all()  # Huber costs 2.5 %, and 100 sweeps tell the rest to 7 %
    within = (np.abs(errors) <= [0.02, 0.02 * PLANTED.E]).all(1)
    assert within.sum() >= 80
