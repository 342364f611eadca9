"""What text is compared by: normal form, words, hashes of word n-grams. The hashes are the same in every process and on every machine."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from components.decoding.sampling import GOLDEN, MASK, mix64

Hashes = NDArray[np.uint64]
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+|[^\w\s]")


def normal_text(text: str) -> str:
    """Return what two texts share that differ in case and spacing alone: signs stay, so that 3+4 is not 3-4.

    >>> normal_text("Add  3+ 4.")
    'add 3 + 4 .'
    """
    return " ".join(_TOKEN.findall(_folded(text)))


def words(text: str) -> list[str]:
    """Words and numbers in folded case, without signs."""
    return _WORD.findall(_folded(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


@lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(texts: Iterable[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of all words, one text after the other, and where each text begins: (words,), (texts + 1,)."""
    hashes: list[int] = []
    begins = [0]
    for text in texts:
        hashes += map(_word_hash, words(text))
        begins.append(len(hashes))
    return np.array(hashes, dtype=np.uint64), np.array(begins, dtype=np.int64)


def gram_hashes(texts: Sequence[str], size: int, short: bool) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the runs of `size` words within each text, one text after the other, and where each text begins: (grams,), (texts + 1,).

    short: a text of fewer words (but one at least) is one run of all of them; otherwise it has none.
    """
    hashes, begins = word_hashes(texts)
    lengths = np.diff(begins)
    counts = np.maximum(lengths - size + 1, ((lengths > 0) & short).astype(np.int64))
    ends = np.concatenate([[0], np.cumsum(counts)])
    first = np.arange(ends[-1]) - np.repeat(ends[:-1] - begins[:-1], counts)  # place of the first word of each run
    stop = np.repeat(begins[1:], counts)
    found = np.zeros(len(first), dtype=np.uint64)
    for place in range(size):
        inside = first + place < stop
        step = hashes[np.minimum(first + place, max(len(hashes) - 1, 0))] if len(hashes) else found
        salt = np.uint64((place + 1) * GOLDEN & MASK)
        found = np.where(inside, mix64(found + step + salt), found)
    return found, ends
