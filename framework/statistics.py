"""Statistics of comparisons: intervals of few runs by Student's t, and two ways to answer the same items. Needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def t_quantile(p: float, df: float) -> float:
    """The value that Student's t with df degrees of freedom stays below with probability p.

    With t = sqrt(df) tan(a) the density becomes proportional to cos(a)^(df-1), smooth on [0, pi/2]: Gauss-Legendre integrates it
    to 1e-9 or better, and the angle is found by bisection.

    Args:
        p: 0 < p < 1.
        df: at least 1; need not be whole.

    Raises:
        ValueError: p or df out of range.

    Example:
        >>> round(t_quantile(0.975, 2), 4)
        4.3027
    """
    if not 0 < p < 1 or not df >= 1:
        raise ValueError(f"t_quantile: p={p}, df={df}; 0 < p < 1 and df >= 1")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    if math.isinf(df):
        df = 1e12
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi) if df < 1e6 else math.sqrt(df / 2 / math.pi)
    low, high = 0.0, min(math.pi / 2, 40 / math.sqrt(df))  # the normal's mass beyond 40 is below 1e-300
    for _ in range(80):
        angle = (low + high) / 2
        inside = constant * angle / 2 * float(WEIGHTS @ np.exp((df - 1) / 2 * np.log1p(-(np.sin(angle / 2 * (NODES + 1)) ** 2))))
        low, high = (angle, high) if inside < p - 0.5 else (low, angle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its two-sided confidence interval: mean +- t(1 - (1 - level) / 2, n - 1) * s / sqrt(n), s with n - 1.

    Of paired differences, this is the paired t-interval.

    Returns:
        (mean, low, high); the interval is (-inf, inf) for one value, which says nothing of its spread.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("mean_interval: no values")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, -math.inf, math.inf
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(1 - (1 - level) / 2, n - 1) * spread / math.sqrt(n)
    return mean, mean - half, mean + half


def welch_interval(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Difference of two means, first minus second, with Welch's interval: the groups may differ in size and spread.

    s^2 = v1/n1 + v2/n2 and df = s^4 / ((v1/n1)^2 / (n1 - 1) + (v2/n2)^2 / (n2 - 1)).

    Returns:
        (difference, low, high); (-inf, inf) where a group has one value.

    Raises:
        ValueError: a group without values.
    """
    if not first or not second:
        raise ValueError("welch_interval: no values")
    means = [math.fsum(group) / len(group) for group in (first, second)]
    difference = means[0] - means[1]
    if min(len(first), len(second)) == 1:
        return difference, -math.inf, math.inf
    parts = [
        math.fsum((value - mean) ** 2 for value in group) / (len(group) - 1) / len(group) for group, mean in zip((first, second), means)
    ]
    if not sum(parts):
        return difference, difference, difference
    df = sum(parts) ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (first, second)))
    half = t_quantile(1 - (1 - level) / 2, df) * math.sqrt(sum(parts))
    return difference, difference - half, difference + half


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Exact McNemar test of two ways to answer the same items: does one win more of those on which they differ?

    With b items that only the first has right and c only the second, p = min(1, 2 P(X <= min(b, c))), X binomial of b + c draws and 1/2.

    Returns:
        (b, c, two-sided p); p is 1 where they never differ.

    Raises:
        ValueError: no items, or not the same number.

    Example:
        >>> mcnemar([True, True, True, True, False], [False, False, False, True, False])
        (3, 0, 0.25)
    """
    _same_items("mcnemar", first, second)
    only_first = sum(a and not b for a, b in zip(first, second))
    only_second = sum(b and not a for a, b in zip(first, second))
    differ = only_first + only_second
    below = sum(math.comb(differ, i) for i in range(min(only_first, only_second) + 1))
    return only_first, only_second, min(1.0, 2 * below / 2**differ)  # whole numbers up to here: exact, and no overflow


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """Difference of two means over the same items, first minus second, with its percentile interval: items are drawn anew, in pairs.

    Returns:
        (difference, low, high).

    Raises:
        ValueError: no items, or not the same number.
    """
    _same_items("paired_bootstrap", first, second)
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)  # (items,)
    rng, items = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(items, size=items)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


def k_correct(candidates: Sequence[Sequence[bool]], final: Sequence[bool]) -> list[tuple[int, int, int]]:
    """How often the final answer is right, by how many of the candidates it was made from are.

    Args:
        candidates: for each item, which of its n candidates are right; n is the same for all.
        final: for each item, whether the final answer is.

    Returns:
        (k, items with k right candidates, right final answers among them) for k = 0 to n.

    Raises:
        ValueError: no items, not the same number, or items with different numbers of candidates.

    Example:
        >>> k_correct([[True, False], [True, True], [False, True]], [True, True, False])
        [(0, 0, 0), (1, 2, 1), (2, 1, 1)]
    """
    _same_items("k_correct", candidates, final)
    if len(sizes := {len(some) for some in candidates}) > 1:
        raise ValueError(f"k_correct: items with {min(sizes)} to {max(sizes)} candidates; the same number is needed")
    counts = [sum(some) for some in candidates]
    groups = [[right for count, right in zip(counts, final) if count == k] for k in range(sizes.pop() + 1)]
    return [(k, len(group), sum(group)) for k, group in enumerate(groups)]


def _same_items(name: str, first: Sequence[object], second: Sequence[object]) -> None:
    if not first or len(first) != len(second):
        raise ValueError(f"{name}: {len(first)} and {len(second)} items; the same number of at least 1 is needed")
