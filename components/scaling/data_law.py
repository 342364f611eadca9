"""How loss falls with data: the rectified law L(D) = B / (D_l + D^beta) + E of arXiv 2402.02314, and the power law, which has D_l = 0.

D_l is what earlier training is worth; from scratch, 0 is the right answer. B and D_l depend on the unit of D (with D counted in units
of c, they are B / c^beta and D_l / c^beta); beta, E and B / D_l do not.

Every run is an observation, seeds of one size included, with one spread of log L for all: a size with more runs counts more. Huber's
loss, whose corner follows the spread of the residuals, keeps single runs that went astray from bending the curve.

Note: the points that arXiv 2503.19551 publishes do not lie on one curve. Its six predictions from 10B tokens on give B = 43.07 (D in
billions, error in %), D_l = 0.792, beta = 0.515, E = 16.20 for 8B, and so 30.8 % at 4.5B tokens, where the text has 28.7 %; the
fitted E is lower for 3B (14.3) than for 8B, which only says how little an asymptote far beyond the points is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

LEVEL = 0.95
STARTS = 64
POLISHED = 4  # of them, to full precision
SIZES = 5  # different ones, at least: four parameters, and a size held out
BETA = (0.01, 5.0)  # beyond these, no sizes that one can afford tell beta from its neighbours
CORNER = 1.345  # of Huber's loss in standard deviations: 95 % of the efficiency of least squares under normal errors
LEAST_CORNER = 1e-3  # of it, in log L, where the curve goes through the points
ROUNDING = 1e-9  # of log L: losses are written with some nine digits
LOW, HIGH = np.array([-40.0, -30.0, BETA[0], 0.0]), np.array([60.0, 12.0, BETA[1], 1.0])  # of (log b, log d, beta, e), see _Points

Interval = tuple[float, float]


@dataclass(frozen=True)
class Law:
    """L(D) = B / (D_l + D^beta) + E."""

    B: float
    D_l: float
    beta: float
    E: float

    def loss(self, size: float) -> float:
        """The loss at a size."""
        return self.B / (self.D_l + size**self.beta) + self.E


@dataclass(frozen=True)
class Fit:
    """A law fitted to all runs, how sure it is, and how it predicts the largest size from the others.

    The intervals are those of the profile likelihood at LEVEL: all values for which the best choice of the other parameters fits no
    worse than F(LEVEL; 1, n - p) allows, with the scatter of the n runs round the curve, or that of the means of the n sizes, whichever
    gives the wider interval: what all runs of a size share, be it that the law is only nearly true, does not average out with seeds.
    An infinite end is one that the runs leave open; E has none, since it lies between 0 and the smallest loss.
    """

    law: Law
    beta: Interval
    E: Interval
    scatter: float  # of the runs' log L round the curve: a robust standard deviation with n - p degrees of freedom
    predicted: float  # the loss at the largest size, by the law fitted without it
    error: float  # that over the mean observed there, minus 1
    band: list[Interval]  # of the mean loss at every size that was asked for


def fit(sizes: Sequence[float], losses: Sequence[float], rectified: bool, seed: int, at: Sequence[float] = ()) -> Fit:
    """Fit a law to runs of different sizes.

    Args:
        sizes: (n,) above 0, at least SIZES different ones; D in any unit.
        losses: (n,) above 0.
        rectified: with D_l; if not, the power law.
        seed: of the STARTS starting points.
        at: sizes where the loss is to have an interval.

    Raises:
        ValueError: there is nothing to fit, with the reason in one line.

    Example:
        >>> sizes = [10, 30, 100, 300, 1000, 3000]
        >>> found = fit(sizes, [3 / (2 + d**0.5) + 1.5 for d in sizes], True, 0).law
        >>> [round(x, 4) for x in (found.B, found.D_l, found.beta, found.E)]
        [3.0, 2.0, 0.5, 1.5]
    """
    x, y = np.asarray(sizes, float), np.asarray(losses, float)
    _check(x, y)
    largest = x == x.max()
    found = _Fitter(x, y, rectified, seed)
    predicted = _Fitter(x[~largest], y[~largest], rectified, seed).law.loss(float(x.max()))
    low, high = found.interval(_parameter(found.free, 3))
    band = [found.interval(_loss_at(found.free, size / found.unit)) for size in at]
    return Fit(
        found.law,
        found.interval(_parameter(found.free, 2)),
        (max(low, 0.0) * found.least, min(high, 1.0) * found.least),
        found.scatter,
        predicted,
        float(predicted / y[largest].mean() - 1),
        [(math.exp(low) * found.least, math.exp(high) * found.least) for low, high in band],
    )


def _check(x: np.ndarray, y: np.ndarray) -> None:
    for name, values in (("size", x), ("loss", y)):
        if wrong := [value for value in values if not (math.isfinite(value) and value > 0)]:
            raise ValueError(f"a {name} is {wrong[0]:g}; it must be a number above 0")
    if (count := len(np.unique(x))) < SIZES:
        raise ValueError(f"{count} different size(s); the law has 4 parameters and needs at least {SIZES}")
    if np.ptp(np.log(y)) <= ROUNDING:
        raise ValueError(f"all losses are {y[0]:g}; there is nothing to fit")
    if np.polyfit(np.log(x), np.log(y), 1)[0] >= 0:
        raise ValueError("the loss does not fall as the size grows; no law of this form describes that")


@dataclass(frozen=True)
class _Pin:
    """A value whose profile is wanted: what stays free while it is held, and how it is read and put in."""

    free: list[int]
    low: float
    high: float
    read: Callable[[np.ndarray], float]
    place: Callable[[np.ndarray, float], np.ndarray | None]  # into theta; returns d(log b) / d(theta) where log b follows the others
    ceiling: Callable[[float], float] = lambda value: 1.0  # of e: no curve goes through a loss below it


def _parameter(free: list[int], index: int) -> _Pin:
    """A parameter."""

    def place(theta: np.ndarray, value: float) -> None:
        theta[index] = value

    return _Pin([i for i in free if i != index], LOW[index], HIGH[index], lambda theta: float(theta[index]), place)


def _loss_at(free: list[int], x: float) -> _Pin:
    """log L at x; log b follows."""

    def place(theta: np.ndarray, value: float) -> np.ndarray:
        d, power = math.exp(theta[1]), x ** theta[2]
        drop = max(math.exp(value) - theta[3], 1e-15)
        theta[0] = math.log(drop) + math.log(d + power)
        return np.array([0.0, d / (d + power), power * math.log(x) / (d + power), -1 / drop])

    return _Pin(
        free[1:], -20.0, 100.0, lambda theta: float(_curve(theta, np.array([x]))[0][0]), place, lambda value: min(1.0, math.exp(value))
    )


def _curve(theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L (n,) and its derivatives in theta (n, 4)."""
    d, power = math.exp(theta[1]), x ** theta[2]
    drop = math.exp(theta[0]) / (d + power)
    loss = drop + theta[3]
    slopes = [drop, -drop * d / (d + power), -drop * power * np.log(x) / (d + power), np.ones_like(x)]
    return np.log(loss), np.stack(slopes, axis=-1) / loss[:, None]


class _Fitter:
    """The best curve of one law through some runs.

    Sizes are over their geometric mean and losses over the smallest one, since powers of raw token counts leave no curvature to see:
    theta = (log b, log d, beta, e) with B = b * least * unit^beta, D_l = d * unit^beta, E = e * least.
    """

    def __init__(self, sizes: np.ndarray, losses: np.ndarray, rectified: bool, seed: int) -> None:
        self.unit, self.least = math.exp(np.log(sizes).mean()), float(losses.min())
        self.x, self.y = sizes / self.unit, np.log(losses / self.least)
        self.free, self.corner = ([0, 1, 2, 3] if rectified else [0, 2, 3]), math.inf
        rough = [self.solve(start, self.free, precision=1e-6, evaluations=40) for start in self.starts(seed)]
        tries = [theta for theta, _ in sorted(rough, key=lambda pair: pair[1])[:POLISHED]]
        self.theta, self.cost = self.best(tries)
        for _ in range(3):  # the corner follows the spread, and the curve the corner
            scale = 1.4826 * np.median(np.abs(self.residuals(self.theta))) * math.sqrt(len(sizes) / max(len(sizes) - len(self.free), 1))
            self.corner = max(CORNER * scale, LEAST_CORNER)
            self.theta, self.cost = self.best([self.theta, *tries])
        if rectified:
            theta, cost = self.solve(np.where(np.arange(4) == 1, -math.inf, self.theta), [0, 2, 3])
            if cost <= self.cost * (1 + 1e-4) + len(sizes) * ROUNDING**2:  # D_l does nothing
                self.theta, self.cost = theta, cost

    def starts(self, seed: int) -> np.ndarray:
        """STARTS thetas (STARTS, 4): beta and D_l at random, b and e by linear least squares of relative errors."""
        rng = np.random.Generator(np.random.PCG64(seed))
        beta = rng.uniform(0.05, 2.0, STARTS)
        log_d = beta * rng.uniform(np.log(self.x.min()) - 2, np.log(self.x.max()), STARTS) if 1 in self.free else np.full(STARTS, -math.inf)
        found = np.zeros((STARTS, 4))
        for row, b, d in zip(found, beta, log_d):
            columns = np.stack([1 / (math.exp(d) + self.x**b), np.ones_like(self.x)], axis=1) * np.exp(-self.y)[:, None]
            height, floor = np.linalg.lstsq(columns, np.ones_like(self.x), rcond=None)[0]
            row[:] = math.log(max(height, 1e-6)), d, b, min(max(floor, 0.01), 0.99)
        return found

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        return _curve(theta, self.x)[0] - self.y

    def best(self, tries: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
        return min((self.solve(theta, self.free) for theta in tries), key=lambda pair: pair[1])

    def solve(
        self,
        start: np.ndarray,
        free: list[int],
        pin: _Pin | None = None,
        value: float = 0.0,
        precision: float = 1e-15,
        evaluations: int = 200,
    ) -> tuple[np.ndarray, float]:
        """The nearest minimum over the free parameters, with the pin at a value: theta and its cost."""
        from scipy.optimize import least_squares

        identity = np.eye(4)[:, free]

        def whole(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            theta, chain = start.copy(), identity
            theta[free] = values
            if pin is not None and (follows := pin.place(theta, value)) is not None:
                chain = identity.copy()
                chain[0] = follows[free]
            return theta, chain

        def slopes(values: np.ndarray) -> np.ndarray:
            theta, chain = whole(values)
            return _curve(theta, self.x)[1] @ chain

        loss: dict[str, Any] = {} if math.isinf(self.corner) else {"loss": "huber", "f_scale": self.corner}
        low, high = LOW[free], HIGH[free]
        if pin is not None and 3 in free:
            high[-1] = pin.ceiling(value)
        found = least_squares(
            lambda values: self.residuals(whole(values)[0]), np.clip(start[free], low + 1e-9, high * (1 - 1e-9)), slopes, (low, high),
            ftol=precision, xtol=precision, gtol=precision, x_scale="jac", max_nfev=evaluations, **loss,
        )  # fmt: skip
        return whole(found.x)[0], float(found.cost)

    @property
    def law(self) -> Law:
        log_b, log_d, beta, e = (float(value) for value in self.theta)
        per_unit = self.unit**beta
        return Law(math.exp(log_b) * self.least * per_unit, math.exp(log_d) * per_unit, beta, e * self.least if e > ROUNDING else 0.0)

    @property
    def scatter(self) -> float:
        return self._deviation(self._clipped, len(self.x) - len(self.free))

    @property
    def _clipped(self) -> np.ndarray:
        return np.clip(self.residuals(self.theta), -self.corner, self.corner)

    def _deviation(self, values: np.ndarray, degrees: int) -> float:
        """Standard deviation of log L, as the test of robust regressions takes it (Schrader and Hettmansperger 1980)."""
        inside = float(np.mean(np.abs(self._clipped) < self.corner))
        return max(math.sqrt(float(values @ values) / degrees / inside), ROUNDING)

    @cached_property
    def reach(self) -> float:
        """Root of the deviance, 2 (cost - least cost), at the ends of an interval."""
        from scipy.special import stdtrit

        _, which, counts = np.unique(self.x, return_inverse=True, return_counts=True)
        of_sizes = np.bincount(which, self._clipped) / np.sqrt(counts)
        found = [(values, len(values) - len(self.free)) for values in (self._clipped, of_sizes)]
        return max(float(stdtrit(degrees, (1 + LEVEL) / 2)) * self._deviation(values, degrees) for values, degrees in found)

    def interval(self, pin: _Pin) -> Interval:
        """Profile-likelihood interval; an end that is not reached within the pin's bounds is infinite."""
        return self._end(pin, -1), self._end(pin, 1)

    def _end(self, pin: _Pin, side: int) -> float:
        from scipy.optimize import brentq

        centre, bound = pin.read(self.theta), pin.high if side > 0 else pin.low
        near = self.theta

        @cache  # the search begins from values that were seen, and must see the same again
        def excess(value: float) -> float:
            nonlocal near
            if value == centre:
                return -self.reach
            tries = [self.solve(start, pin.free, pin, value, 1e-10) for start in (near, self.theta)]
            near, cost = min(tries, key=lambda pair: pair[1])
            return math.sqrt(max(0.0, 2 * (cost - self.cost))) - self.reach

        step = max(1e-3 * abs(centre), 1e-8)
        inside = centre
        while True:
            outside = centre + side * step
            if side * (bound - outside) <= 0:
                outside = bound
            if excess(outside) > 0:
                return float(brentq(excess, inside, outside, xtol=max(1e-3 * abs(outside - centre), 1e-12)))
            if outside == bound:
                return side * math.inf
            inside, step = outside, 3 * step
