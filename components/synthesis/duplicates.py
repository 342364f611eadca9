"""Which texts repeat an earlier one: exactly after normalisation, or nearly by MinHash (Broder 1997) with locality-sensitive hashing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from components.decoding.sampling import GOLDEN, MASK, mix64
from components.errors import UserError
from components.synthesis.text import Hashes, gram_hashes, normal_text

_RECALL = 0.99  # share of pairs exactly at the threshold that the bands must bring together; what they bring is then compared exactly
_GRAMS_AT_ONCE = 1 << 20


def exact_duplicates(texts: Sequence[str]) -> NDArray[np.int64]:
    """For each text the index of the first one of the same normal form, -1 for that one itself: (texts,)."""
    first: dict[str, int] = {}
    found = np.full(len(texts), -1, dtype=np.int64)
    for place, text in enumerate(texts):
        earlier = first.setdefault(normal_text(text), place)
        if earlier != place:
            found[place] = earlier
    return found


@dataclass
class NearDuplicates:
    """Finds texts whose sets of word n-grams are alike: |a & b| / |a | b| >= threshold with a text that was kept before.

    Candidates share a band of MinHash values and are then compared by their n-grams themselves, so that no text is called a duplicate by
    chance; two texts exactly at the threshold are missed in at most one case in a hundred, more similar ones less often.

    Args:
        words: n of the n-grams (a shorter text is one run).
        permutations: MinHash values of a text.
        threshold: above 0, at most 1.

    Raises UserError for a value that is not allowed.
    """

    words: int
    permutations: int
    threshold: float
    _rows: int = field(init=False)
    _buckets: list[dict[bytes, list[int]]] = field(init=False)
    _kept: dict[int, Hashes] = field(init=False, default_factory=dict)
    _seen: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        for key in ("words", "permutations"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"duplicates.{key}: {value!r}; allowed is a whole number of at least 1")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not 0 < self.threshold <= 1:
            raise UserError(f"duplicates.threshold: {self.threshold!r}; allowed is a number above 0 and up to 1, such as 0.8")
        self._rows = band_rows(self.permutations, self.threshold)
        self._buckets = [{} for _ in range(self.permutations // self._rows)]

    def add(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """For each text the number of the earliest kept text that it is nearly equal to, or -1: it is kept. (texts,)

        Numbers count all texts ever added, so that a corpus may be given in parts.
        """
        found = np.full(len(texts), -1, dtype=np.int64)
        grams, ends = gram_hashes(texts, self.words, short=True)
        signatures = minhash(grams, ends, self.permutations)
        for place in range(len(texts)):
            own = np.unique(grams[ends[place] : ends[place + 1]])
            keys = [band.tobytes() for band in signatures[place, : self._rows * len(self._buckets)].reshape(-1, self._rows)]
            near = {number for bucket, key in zip(self._buckets, keys) for number in bucket.get(key, ())} if len(own) else set()
            for number in sorted(near):
                if similarity(own, self._kept[number]) >= self.threshold:
                    found[place] = number
                    break
            else:
                if len(own):  # a text without words is like no other
                    self._kept[self._seen + place] = own
                    for bucket, key in zip(self._buckets, keys):
                        bucket.setdefault(key, []).append(self._seen + place)
        self._seen += len(texts)
        return found


def band_rows(permutations: int, threshold: float) -> int:
    """Rows r of a band: the most with which a pair at the threshold shares one of permutations // r bands with probability 0.99.

    >>> band_rows(128, 0.8)
    6
    """
    fit = [r for r in range(1, permutations + 1) if 1 - (1 - threshold**r) ** (permutations // r) >= _RECALL]
    return max(fit, default=1)


def minhash(grams: Hashes, ends: NDArray[np.int64], permutations: int) -> Hashes:
    """Least values of `permutations` random orders over the n-grams of each text, (texts, permutations) uint64; all ones without any.

    grams, ends: see `text.gram_hashes`. An order is a * x + b modulo 2^64 of the (well mixed) hash x, with a odd.
    """
    found = np.full((len(ends) - 1, permutations), MASK, dtype=np.uint64)
    counters = np.arange(1, permutations + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    factors, shifts = mix64(counters) | np.uint64(1), mix64(counters + np.uint64(1))
    filled = np.flatnonzero(np.diff(ends))
    first = 0
    while first < len(filled):
        begin = ends[filled[first]]
        last = max(int(np.searchsorted(ends[filled + 1], begin + _GRAMS_AT_ONCE, side="right")), first + 1)
        rows = filled[first:last]
        part, starts = grams[begin : ends[rows[-1] + 1]], ends[rows] - begin
        for place in range(permutations):
            found[rows, place] = np.minimum.reduceat(part * factors[place] + shifts[place], starts)
        first = last
    return found


def similarity(a: Hashes, b: Hashes) -> float:
    """Jaccard similarity of two sorted sets of hashes."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
