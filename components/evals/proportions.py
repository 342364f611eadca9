"""How sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # the standard normal stays within it with probability 0.95


def wilson(right: float, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): inside [0, 1], and not empty where all or none are right.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    >>> [round(end, 4) for end in wilson(0, 10)]
    [0.0, 0.2775]
    """
    p, extra = right / total, Z95**2 / total
    middle, half = p + extra / 2, Z95 * math.sqrt(p * (1 - p) / total + extra / total / 4)
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def standard_error(values: Sequence[float]) -> float:
    """Of their mean: s / sqrt(n), s with n - 1; inf for one value, which says nothing of its spread.

    >>> standard_error([0.0, 1.0, 1.0, 0.0]) == (1 / 12) ** 0.5
    True
    """
    n, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else math.inf
