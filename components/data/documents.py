"""Documents as the token files see them, and the rule that holds some of them out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

HELD_OUT_SALT = "held-out"  # picks the same ~200 kB of the standard library on Python 3.11 and 3.12


@dataclass(frozen=True)
class Piece:
    """A stretch of a document: user text, or the name of a special token; `loss` says whether its tokens are labels."""

    text: str
    special: bool = False
    loss: bool = True


@dataclass(frozen=True)
class Document:
    """One document: `key` names it independently of where the data lie (the split is a hash of it)."""

    key: str
    pieces: tuple[Piece, ...]

    def text(self, loss_only: bool = False) -> str:
        """Return the user text without specials; with `loss_only` what counts in the loss, which is what bits per byte divide by."""
        return "".join(p.text for p in self.pieces if not p.special and (p.loss or not loss_only))


class Corpus(Protocol):
    """A re-readable set of documents with its held-out part; the unit that a weight belongs to."""

    name: str
    weight: float | None

    def fingerprint(self) -> str:
        """16 hex digits that change with the documents or with the split."""
        ...

    def train(self) -> Iterator[Document]: ...
    def held_out(self) -> Iterator[Document]: ...
    def size(self, split: str) -> int:
        """Characters of the part `split` (train or val), about, for progress bars."""
        ...


def digest(*parts: object) -> str:
    """Return 16 hex digits of the SHA-256 of the parts' texts (bytes are taken as they are)."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:16]


def hash_unit(key: str) -> float:
    """Map a document's key to [0, 1), the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256((HELD_OUT_SALT + key).encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def held_out_keys(keys: Iterable[str], fraction: float) -> set[str]:
    """Choose whole documents to hold out: those whose hash lies below `fraction`, so that adding one moves no other.

    Never none and never all while there are two: then the one with the smallest hash is taken, or the one with the largest left.
    """
    ranked = sorted(set(keys), key=lambda key: (hash_unit(key), key))
    below = sum(hash_unit(key) < fraction for key in ranked)
    return set(ranked[: min(max(below, 1), max(len(ranked) - 1, 1))])


def split_tail(text: str, fraction: float) -> tuple[str, str]:
    """Cut the last `fraction` of the UTF-8 bytes off at the next start of a line, or of a character where there is no further line.

    Returns (head, tail); head + tail is the text. Either may be empty for very short texts.
    """
    data = text.encode()
    cut = round(len(data) * (1.0 - fraction))
    newline = data.find(b"\n", max(cut - 1, 0))
    if newline != -1 and newline + 1 < len(data):
        cut = newline + 1
    while cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a character
        cut += 1
    return data[:cut].decode(), data[cut:].decode()
