"""Quantiles against printed tables, intervals worked out by hand."""

import pytest

from framework.statistics import mean_interval, t_quantile, welch_interval


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
