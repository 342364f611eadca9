"""Intervals of shares against published numbers and scipy."""

import math

import pytest

from components.evals.proportions import standard_error, wilson


@pytest.mark.parametrize(  # Newcombe 1998, table I, method 3
    ("right", "total", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
)
def test_wilson_equals_newcombes_table(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (3, 7), (50, 100), (1319, 1319), (286, 1319)])
def test_wilson_equals_scipy(right, total):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    expected = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert wilson(right, total) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-15)
    low, high = wilson(right, total)
    assert 0.0 <= low < high <= 1.0


def test_standard_error_by_hand():
    """1, 2, 3: s = 1."""
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3)) and standard_error([4.0]) == math.inf
