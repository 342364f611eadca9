"""The space that LongRoPE2 searches (arXiv 2502.20082, sec. 3.2): where interpolation begins, and the factors from there on.

Indices count pairs of dims, as in RopeSpec: pair i turns by base^(-2i/rotary_dim) a token, and lambda_i divides that frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.errors import UserError

Vector = NDArray[np.float64]
Key = tuple[int, bytes]


@dataclass(frozen=True)
class Space:
    """Vectors lambda (rotary_dim/2,) given by an index r and a tail: s*low <= lambda_r <= lambda_(r+1) <= ... <= s*high.

    Below r, lambda_i = lambda_r^(i/r): a larger base. r runs from the pair that turns ten times within L0 to the first that turns less than
    once, both kept within 1 .. rotary_dim/2 - 1.

    Args:
        rotary_dim: even, at least 4. base: > 1. original_len: L0 in tokens, more than 2 pi.
        factor: s, how many times longer the rows get.
        low, high: ends of the searched range, in multiples of s.
        step: vectors whose tails agree after rounding to it count as the same.

    Raises UserError for a value out of its range.

    >>> phi4mini = Space(rotary_dim=96, base=10000.0, original_len=4096, factor=32.0, low=1.0, high=2.0, step=0.01)
    >>> phi4mini.r_min, phi4mini.r_max
    (22, 34)
    """

    rotary_dim: int
    base: float
    original_len: int
    factor: float
    low: float
    high: float
    step: float

    def __post_init__(self) -> None:
        if self.rotary_dim < 4 or self.rotary_dim % 2:
            raise UserError(f"rotary dims of a head: {self.rotary_dim}; allowed is an even number >= 4; change model.head_dim")
        if not 1 < self.base < math.inf:
            raise UserError(f"model.rope_theta: {self.base}; allowed is a finite number > 1; use 10000")
        if not self.original_len > 2 * math.pi:
            raise UserError(f"model.max_length: {self.original_len}; allowed is at least 7 tokens for rotary positions")
        if not 1 < self.factor < math.inf:
            raise UserError(f"rope.factor: {self.factor}; a search needs a finite number > 1: at 1 there is nothing to extend; use 8")
        if not 1 / self.factor <= self.low < self.high < math.inf:
            raise UserError(f"task.low: {self.low}, task.high: {self.high}; allowed is 1/factor <= low < high; use 1 and 2")
        if not 0 < self.step < math.inf:
            raise UserError(f"task.step: {self.step}; allowed is a finite number > 0; use 0.01")

    def complete_at(self, periods: float) -> int:
        """First pair that turns at most `periods` times within L0 (sec. 2, eq. 3 with one period), not kept within the vector."""
        turns = self.original_len / (2 * math.pi * periods)
        return math.ceil(self.size * math.log(turns) / math.log(self.base))

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return self.rotary_dim // 2

    @property
    def r_min(self) -> int:
        """d_10."""
        return min(max(self.complete_at(10), 1), self.size - 1)

    @property
    def r_max(self) -> int:
        """d_tcd, the theoretical critical dimension."""
        return min(max(self.complete_at(1), 1), self.size - 1)

    @property
    def lower(self) -> float:
        """Smallest searched factor."""
        return self.factor * self.low

    @property
    def upper(self) -> float:
        """Largest searched factor."""
        return self.factor * self.high

    def vector(self, r: int, tail: Vector) -> Vector:
        """All factors (size,) from those at r and above (size - r,).

        Note: the paper's Algorithm 1 takes the base for the lower ones from d_10; only r itself makes the vector rise throughout, and the
        published table of Phi-4-mini (r = 31) is made so.
        """
        head = tail[0] ** (np.arange(r) / r)
        return np.concatenate([head, tail])

    def holds(self, r: int, factors: Vector) -> bool:
        """Whether the vector belongs to this space."""
        tail = factors[r:]
        within = self.r_min <= r <= self.r_max and len(factors) == self.size and tail[0] >= self.lower and tail[-1] <= self.upper
        return bool(within and np.all(np.diff(factors) >= 0) and np.array_equal(factors, self.vector(r, tail)))

    def key(self, r: int, factors: Vector) -> Key:
        """What two vectors share when they count as the same."""
        return r, np.rint(factors[r:] / self.step).astype(np.int64).tobytes()

    def nearest(self, factors: Sequence[float]) -> tuple[int, Vector]:
        """(r, vector) near any rising or falling factors (size,): by every r, the tail is clipped; the closest in ln lambda is taken.

        Raises UserError for another size, or factors that are not finite and positive.
        """
        given = np.asarray(factors, dtype=np.float64)
        if given.shape != (self.size,) or not (np.isfinite(given).all() and (given > 0).all()):
            raise UserError(f"task.seeds: {given.size} factors; allowed are {self.size} finite numbers > 0, one a pair of rotary dims")
        found = []
        for r in range(self.r_min, self.r_max + 1):
            tail = np.clip(np.maximum.accumulate(given[r:]), self.lower, self.upper)
            vector = self.vector(r, tail)
            found.append((float(np.square(np.log(vector / given)).sum()), r, vector))
        _, r, vector = min(found, key=lambda one: one[:2])
        return r, vector
