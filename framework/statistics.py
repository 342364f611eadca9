"""Small-sample statistics of comparisons between runs: Student's t and the intervals made from it. Needs numpy only."""

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
