"""Names of requests, and the set of those that are done: 14 bytes each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from components.errors import UserError

DIGEST_BYTES = 16
PREFIX_BYTES = 2  # told by where a digest stands, so not stored
REST_BYTES = DIGEST_BYTES - PREFIX_BYTES
PREFIXES = 256**PREFIX_BYTES
FRESH = 65536  # digests in a Python set (about 100 bytes each) before they join the sorted array; also the pieces that are copied


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


def check_twins(digests: np.ndarray, ranks: np.ndarray) -> None:
    """digests: (N,) of requests in input order; ranks: (N,) int64, their stable order. Raises UserError where two are the same."""
    for begin in range(0, len(ranks) - 1, FRESH):  # pieces: a sorted copy of all would be as large as all
        some = digests[ranks[begin : begin + FRESH + 1]]
        if len(twins := np.flatnonzero(some[1:] == some[:-1])):
            first, second = (int(ranks[begin + twins[0] + after]) for after in (0, 1))
            raise UserError(f"prompts: requests {first} and {second} (from 0) are the same; give each an id of its own")


def digests_of(names: Iterable[str]) -> bytearray:
    """The digests of ids, 32 hex digits each, end to end: 16 bytes a request, however many there are."""
    found = bytearray()
    for name in names:
        found += bytes.fromhex(name)
    return found


def count_distinct(names: Iterable[str]) -> int:
    """How many requests there are. Memory: 24 bytes a request. Raises UserError where two are the same, naming their places."""
    digests = np.frombuffer(digests_of(names), dtype=f"S{DIGEST_BYTES}")
    check_twins(digests, digests.argsort(kind="stable"))
    return len(digests)


class DoneSet:
    """A set of 16-byte digests, exact, at 14 bytes each: a sorted array, and at most FRESH more in a Python set.

    The digests that begin with one pair of bytes stand together and are stored without it; `_starts` says where they do (Knuth's
    quotienting, half a megabyte for all pairs). Merging works in place from the back, so it needs no second array; the array grows by
    realloc, which moves pages and copies none on Linux once it is large.
    """

    def __init__(self) -> None:
        self._rest: np.ndarray = np.empty(0, dtype=np.uint8)  # (N * REST_BYTES,), in the order of the digests
        self._starts: np.ndarray = np.zeros(PREFIXES + 1, dtype=np.int64)  # digests before each prefix; the last one is N
        self._loaded: np.ndarray = np.empty(0, dtype=np.uint8)  # whole digests between `load` and `settle`
        self._fresh: set[bytes] = set()

    def __len__(self) -> int:
        return int(self._starts[-1]) + len(self._fresh)

    def __contains__(self, digest: bytes) -> bool:
        if digest in self._fresh:
            return True
        prefix = int.from_bytes(digest[:PREFIX_BYTES])
        begin, end = self._starts[prefix] * REST_BYTES, self._starts[prefix + 1] * REST_BYTES
        group = self._rest[begin:end].view(f"S{REST_BYTES}")  # numpy pads with zero bytes, so all 14 are compared
        rest = digest[PREFIX_BYTES:]
        place = int(group.searchsorted(np.bytes_(rest)))
        return place < len(group) and bool(group[place] == rest.rstrip(b"\0"))

    def add(self, digest: bytes) -> None:
        """Add a digest that is not in the set."""
        self._fresh.add(digest)
        if len(self._fresh) >= FRESH:
            self._merge()

    def load(self, digests: bytes) -> None:
        """Add many to an empty set, end to end and in any order. Call `settle` after the last, before anything else."""
        end = len(self._loaded)
        self._loaded.resize(end + len(digests), refcheck=False)
        self._loaded[end:] = np.frombuffer(digests, dtype=np.uint8)

    def settle(self) -> int:
        """Sort what was loaded; returns how many were there more than once, and keeps them once."""
        whole = self._loaded.view(f"S{DIGEST_BYTES}")
        whole.sort()
        first = np.ones(len(whole), dtype=bool)
        first[1:] = whole[1:] != whole[:-1]
        if doubled := len(first) - int(first.sum()):
            self._loaded = np.array(whole[first].view(np.uint8))  # its own, so that it can be resized
        del whole
        count = len(self._loaded) // DIGEST_BYTES
        self._starts = starts_of(self._loaded)
        for begin in range(0, count, FRESH):  # in place: what is written lies before all that is still to be read
            end = min(count, begin + FRESH)
            rest = self._loaded[begin * DIGEST_BYTES : end * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)[:, PREFIX_BYTES:].ravel()
            self._loaded[begin * REST_BYTES : end * REST_BYTES] = rest
        self._loaded.resize(count * REST_BYTES, refcheck=False)
        self._rest, self._loaded = self._loaded, np.empty(0, dtype=np.uint8)
        return doubled

    def sha256(self) -> str:
        """Of the sorted digests, end to end."""
        self._merge()
        found, begin = hashlib.sha256(), 0
        while begin < PREFIXES:
            end = max(begin + 1, int(self._starts.searchsorted(self._starts[begin] + FRESH, side="right")) - 1)
            found.update(self._whole(begin, end).data)
            begin = end
        return found.hexdigest()

    def _whole(self, begin: int, end: int) -> np.ndarray:
        """(n * DIGEST_BYTES,) uint8: the digests of the prefixes begin .. end - 1, in order."""
        counts = np.diff(self._starts[begin : end + 1])
        found = np.empty((int(counts.sum()), DIGEST_BYTES), dtype=np.uint8)
        found[:, :PREFIX_BYTES] = np.repeat(np.arange(begin, end, dtype=">u2"), counts).view(np.uint8).reshape(-1, PREFIX_BYTES)
        first, last = self._starts[begin] * REST_BYTES, self._starts[end] * REST_BYTES
        found[:, PREFIX_BYTES:] = self._rest[first:last].reshape(-1, REST_BYTES)
        return found.ravel()

    def _merge(self) -> None:
        fresh = np.frombuffer(b"".join(sorted(self._fresh)), dtype=np.uint8)
        self._fresh.clear()
        below = starts_of(fresh)  # fresh digests before each prefix: by so many those of the array move to the right
        self._rest.resize(len(self._rest) + len(fresh) // DIGEST_BYTES * REST_BYTES, refcheck=False)
        end = PREFIXES
        while below[end]:  # prefixes of about FRESH digests at a time, from the back, so nothing unread is written over
            begin = max(0, min(end - 1, int(self._starts.searchsorted(self._starts[end] - FRESH))))
            piece = np.concatenate([self._whole(begin, end), fresh[below[begin] * DIGEST_BYTES : below[end] * DIGEST_BYTES]])
            piece.view(f"S{DIGEST_BYTES}").sort(kind="stable")
            at = (self._starts[begin] + below[begin]) * REST_BYTES
            rest = piece.reshape(-1, DIGEST_BYTES)[:, PREFIX_BYTES:].ravel()
            self._rest[at : at + len(rest)] = rest
            end = begin
        self._starts += below


def starts_of(digests: np.ndarray) -> np.ndarray:
    """(PREFIXES + 1,) int64: how many of the digests, (n * DIGEST_BYTES,) uint8, lie before each prefix."""
    prefixes = digests.view(">u2")[:: DIGEST_BYTES // PREFIX_BYTES]
    found = np.zeros(PREFIXES + 1, dtype=np.int64)
    np.cumsum(np.bincount(prefixes, minlength=PREFIXES), out=found[1:])
    return found
