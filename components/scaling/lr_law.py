"""The best learning rate as a power of the tokens trained on: lr*(D) = B * D^slope (Phi-4-Mini, arXiv 2503.01743, has slope -0.32)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PAPER_SLOPE = -0.32
NEIGHBOURS = 2  # rates on each side of the best one that the parabola is fitted to: far off, a loss is no parabola
LEVEL = 0.95
DRAWS = 2000

Points = Mapping[float, Sequence[float]]  # {learning rate: losses of its runs}


@dataclass(frozen=True)
class Optimum:
    """The best rate of one budget: the vertex of loss = a + b x + c x^2 with x = ln lr, fitted round the best rate that was tried."""

    tokens: float
    rate: float
    loss: float  # at the vertex
    inside: bool  # between the rates tried, of a parabola that opens upwards; if not, `rate` is just the best one tried
    rates: np.ndarray  # (n,) rates fitted to
    losses: np.ndarray  # (n,) mean loss at each
    coefficients: np.ndarray  # (3,) c, b, a


@dataclass(frozen=True)
class Law:
    """lr = B * tokens^slope. interval: of the free slope, None where nothing tells its spread."""

    B: float
    slope: float
    free_B: float
    free_slope: float
    interval: tuple[float, float] | None

    def rate(self, tokens: float) -> float:
        """The rate for so many tokens, by the slope that was given."""
        return self.B * tokens**self.slope


def optimum(tokens: float, points: Points) -> Optimum:
    """Find the best rate of one budget.

    Args:
        tokens: trained on.
        points: at least three different rates, above 0, with finite losses.

    Raises:
        ValueError: fewer.

    Example:
        >>> found = optimum(1e6, {lr: [2 + math.log(lr / 0.01) ** 2] for lr in (0.003, 0.006, 0.012, 0.024)})
        >>> round(found.rate, 6), found.inside
        (0.01, True)
    """
    if len(points) < 3:
        raise ValueError(f"optimum: {len(points)} rate(s); at least 3")
    rates = np.array(sorted(points))
    losses = np.array([float(np.mean(points[rate])) for rate in rates])
    best = int(losses.argmin())
    low = max(0, min(best - NEIGHBOURS, len(rates) - 3))
    near = slice(low, max(best + NEIGHBOURS + 1, low + 3))
    return _vertex(tokens, rates[near], losses[near])


def _vertex(tokens: float, rates: np.ndarray, losses: np.ndarray) -> Optimum:
    x = np.log(rates)
    middle = x.mean()  # for the condition of the fit
    c, b, a = np.polyfit(x - middle, losses, 2)
    at = middle - b / (2 * c) if c > 0 else math.nan
    inside = bool(x[0] <= at <= x[-1])
    best = int(losses.argmin())
    coefficients = np.array([c, b - 2 * c * middle, a - b * middle + c * middle**2])
    if not inside:
        return Optimum(tokens, float(rates[best]), float(losses[best]), False, rates, losses, coefficients)
    return Optimum(tokens, math.exp(at), float(a - b * b / (4 * c)), True, rates, losses, coefficients)


def fit_law(found: Sequence[Optimum], slope: float, seed: int) -> Law:
    """Fit ln lr = ln B + slope * ln D to the optima inside their grids: B with the slope given, and both free (least squares).

    The interval is a residual bootstrap: losses are drawn anew round each parabola, from its residuals times sqrt(n / (n - 3)), and the
    optima and the free slope found again. It knows nothing of what a parabola cannot describe, nor of other seeds of the runs.

    Args:
        found: optima of several budgets.
        slope: the one that B is fitted with.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two different budgets with an optimum inside their grids.
    """
    inside = [one for one in found if one.inside]
    if len({one.tokens for one in inside}) < 2:
        raise ValueError(f"fit_law: {len(inside)} budget(s) with an optimum inside the grid; at least 2")
    free_slope, free_log = _line(inside)
    log_b = float(np.mean([math.log(one.rate) - slope * math.log(one.tokens) for one in inside]))
    return Law(math.exp(log_b), slope, math.exp(free_log), free_slope, _bootstrap(inside, seed))


def _line(found: Sequence[Optimum]) -> tuple[float, float]:
    slope, intercept = np.polyfit(np.log([one.tokens for one in found]), np.log([one.rate for one in found]), 1)
    return float(slope), float(intercept)


def _bootstrap(found: Sequence[Optimum], seed: int) -> tuple[float, float] | None:
    """The middle LEVEL of the free slopes; None where every parabola goes through its points exactly, so that nothing is left to draw."""
    rng = np.random.Generator(np.random.PCG64(seed))
    if all(len(one.rates) == 3 for one in found):
        return None
    places, kept = [], np.ones(DRAWS, bool)
    for one in found:
        x, count = np.log(one.rates), len(one.rates)
        fitted = np.polyval(one.coefficients, x)
        residuals = (one.losses - fitted) * math.sqrt(count / (count - 3)) if count > 3 else np.zeros(1)
        drawn = fitted + rng.choice(residuals, (DRAWS, count))
        middle = x.mean()
        c, b, _ = np.linalg.pinv(np.vander(x - middle, 3)) @ drawn.T  # (DRAWS,) each
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(c > 0, middle - b / (2 * c), np.nan)
        kept &= (x[0] <= at) & (at <= x[-1])
        places.append(at)
    if kept.sum() < DRAWS // 2:  # too noisy for the optima to be found again
        return -math.inf, math.inf
    axis = np.log([one.tokens for one in found])
    axis -= axis.mean()
    slopes = axis @ np.stack(places)[:, kept] / (axis @ axis)
    low, high = np.quantile(slopes, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
