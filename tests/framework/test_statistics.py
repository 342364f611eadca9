"""Quantiles against printed tables, intervals worked out by hand, tests of paired answers against scipy."""

import numpy as np
import pytest

from framework.statistics import k_correct, mcnemar, mean_interval, paired_bootstrap, t_quantile, welch_interval


@pytest.mark.parametrize(  # printed tables of Student's t
    ("p", "df", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.95, 10, 1.81246), (0.995, 3, 5.84091), (0.975, 30, 2.04227),
     (0.975, 1e9, 1.959964), (0.9995, 5, 6.86883), (0.025, 2, -4.30265), (0.5, 7, 0.0)],
)  # fmt: skip
def test_t_quantile_equals_the_tables(p, df, value):
    assert t_quantile(p, df) == pytest.approx(value, rel=3e-6, abs=1e-9)


def test_t_quantile_of_fractional_df_lies_between():
    assert t_quantile(0.975, 3) < t_quantile(0.975, 2.5) < t_quantile(0.975, 2)
    with pytest.raises(ValueError, match="df"):
        t_quantile(0.975, 0.5)


def test_mean_interval_by_hand():
    """1, 2, 3: s = 1, half = 4.302653 / sqrt(3) = 2.484138."""
    assert mean_interval([1, 2, 3]) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-6)
    assert mean_interval([5.0]) == (5.0, float("-inf"), float("inf"))
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_welch_interval_by_hand():
    """1, 2, 3 and 4, 5, 9: variances 1 and 7; s^2 = 8/3; df = (8/3)^2 / ((1/9 + 49/9) / 2) = 2.56."""
    difference, low, high = welch_interval([1, 2, 3], [4, 5, 9])
    half = t_quantile(0.975, 2.56) * (8 / 3) ** 0.5
    assert (difference, low, high) == pytest.approx((-4.0, -4.0 - half, -4.0 + half))


def test_mcnemar_by_hand():
    """5 and 1 discordant of 8: p = 2 (C(6,0) + C(6,1)) / 2^6 = 14/64."""
    first = [True] * 5 + [False] + [True, False]
    second = [False] * 5 + [True] + [True, False]
    assert mcnemar(first, second) == (5, 1, 14 / 64) and mcnemar(second, first) == (1, 5, 14 / 64)
    assert mcnemar(first, first) == (0, 0, 1.0) and mcnemar([True, False], [False, True]) == (1, 1, 1.0)
    with pytest.raises(ValueError, match="2 and 1 items"):
        mcnemar([True, False], [True])


@pytest.mark.parametrize(("gained", "lost"), [(91, 195), (1, 0), (10, 10), (30, 12), (700, 600), (2000, 2100)])
def test_mcnemar_equals_scipys_binomial_test(gained, lost):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    _, _, p = mcnemar([True] * gained + [False] * lost, [False] * gained + [True] * lost)
    assert p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)


def test_paired_bootstrap_of_gains_alone_is_binomial():
    """20 gains among 100 items: a resample's mean is Bin(100, 0.2) / 100, whose 2.5 and 97.5 % quantiles are 0.12 and 0.28 (tables)."""
    difference, low, high = paired_bootstrap([1.0] * 20 + [0.5] * 80, [0.0] * 20 + [0.5] * 80)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.12, 0.28), abs=0.0101)  # a step of the distribution, which 10,000 draws may miss by one


def test_paired_bootstrap_equals_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    first, second = np.random.default_rng(1).normal(size=(2, 200))
    found = paired_bootstrap(first.tolist(), second.tolist())
    sample = (first - second,)
    other = stats.bootstrap(sample, np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    width = other.high - other.low
    assert found[1:] == pytest.approx((other.low, other.high), abs=0.03 * width)  # of 10,000 draws an end's error is 0.7 % of the width
    assert found == paired_bootstrap(first.tolist(), second.tolist()) != paired_bootstrap(first.tolist(), second.tolist(), seed=1)


def test_paired_bootstrap_knows_of_pairs():
    """Equal answers have no difference at all, however spread they are."""
    assert paired_bootstrap([0.0, 1.0, 5.0], [0.0, 1.0, 5.0]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="0 and 0 items"):
        paired_bootstrap([], [])


def test_k_correct_by_hand():
    candidates = [[True, True, False], [False, False, False], [True, False, False], [False, False, True], [True, True, True]]
    assert k_correct(candidates, [True, True, False, True, True]) == [(0, 1, 1), (1, 2, 1), (2, 1, 1), (3, 1, 1)]
    with pytest.raises(ValueError, match="2 to 3 candidates"):
        k_correct([[True, True], [True, True, True]], [True, True])
    with pytest.raises(ValueError, match="1 and 2 items"):
        k_correct([[True]], [True, True])
