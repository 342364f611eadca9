"""Names of requests, and the set of those that are done: 16 bytes each."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

DIGEST_BYTES = 16
FRESH = 65536  # digests in a Python set (about 100 bytes each) before they join the sorted array; also the piece that a merge copies


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def request_id(**asked: Any) -> str:
    """Name of a request, 32 hex digits: blake2b of the canonical JSON of everything that decides its answer.

    asked: prompt, sampling, model_id, tokenizer_id, template, ... Requests that agree in all are one request; one that is asked twice on
    purpose differs by a number of its own (`replica=1`).

    >>> request_id(prompt="Once", replica=0) == request_id(replica=0, prompt="Once")
    True
    """
    return hashlib.blake2b(canonical(asked).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()


class DoneSet:
    """A set of 16-byte digests: a sorted array of 16 bytes each, and at most FRESH more in a Python set.

    Merging works in place from the back, so it needs no second array; the array grows by realloc, which moves pages and copies none on
    Linux once it is large.
    """

    def __init__(self) -> None:
        self._sorted: np.ndarray = np.empty(0, dtype=f"S{DIGEST_BYTES}")  # (N,); numpy pads with zero bytes, so all 16 are compared
        self._fresh: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._fresh)

    def __contains__(self, digest: bytes) -> bool:
        if digest in self._fresh:
            return True
        place = int(self._sorted.searchsorted(np.bytes_(digest)))
        return place < len(self._sorted) and bool(self._sorted[place] == digest.rstrip(b"\0"))

    def add(self, digest: bytes) -> None:
        """Add a digest that is not in the set."""
        self._fresh.add(digest)
        if len(self._fresh) >= FRESH:
            self._merge()

    def load(self, digests: bytes) -> None:
        """Add many, end to end and in any order. Call `settle` after the last, before anything else."""
        new = np.frombuffer(digests, dtype=self._sorted.dtype)
        self._sorted.resize(len(self._sorted) + len(new), refcheck=False)
        self._sorted[len(self._sorted) - len(new) :] = new

    def settle(self) -> int:
        """Sort what was loaded; returns how many were there more than once, and keeps them once."""
        self._sorted.sort()
        first = np.ones(len(self._sorted), dtype=bool)
        first[1:] = self._sorted[1:] != self._sorted[:-1]
        doubled = len(first) - int(first.sum())
        if doubled:
            self._sorted = self._sorted[first]
        return doubled

    def sha256(self) -> str:
        """Of the sorted digests, end to end."""
        self._merge()
        return hashlib.sha256(self._sorted.data.cast("B") if len(self._sorted) else b"").hexdigest()

    def _merge(self) -> None:
        fresh = np.frombuffer(b"".join(self._fresh), dtype=self._sorted.dtype).copy()
        fresh.sort()
        self._fresh.clear()
        end, left = len(self._sorted), len(fresh)
        self._sorted.resize(end + left, refcheck=False)
        while left:  # a piece moves to the right by the number of fresh digests below it, so nothing unread is written over
            start = max(0, end - FRESH)
            below = int(fresh[:left].searchsorted(self._sorted[start])) if start else 0
            piece = np.concatenate([self._sorted[start:end], fresh[below:left]])
            piece.sort(kind="stable")
            self._sorted[start + below : end + left] = piece
            end, left = start, below
