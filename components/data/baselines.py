"""Bits per byte of simple models on the held-out bytes: the yardsticks that a trained model is read against."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterable

import numpy as np

TRAIN_BYTES = 64 * 2**20  # counts stop to change by then
XZ_BYTES = 16 * 2**20  # held-out bytes that xz compresses: at about 1 MB/s more would be minutes, and the rate hardly moves
XZ_BLOCK = 2**20  # bytes compressed between two calls of `advance`
BLOCK_BYTES = 8 * 2**20  # n-grams counted at a time; more would only cost memory


def gather(texts: Iterable[str], limit: int | None = None) -> np.ndarray:
    """Return the UTF-8 bytes of the texts one after another, (n,) uint8, at most `limit` of them."""
    data = bytearray()
    for text in texts:
        data += text.encode()
        if limit is not None and len(data) >= limit:
            del data[limit:]
            break
    return np.frombuffer(bytes(data), np.uint8)


def bits_per_byte(train: np.ndarray, held_out: np.ndarray, advance: Callable[[int], None] = lambda n: None) -> dict[str, float]:
    """Return {'order0', 'order2', 'xz'} in bits per held-out byte. train, held_out: (n,) uint8, held_out not empty.

    `advance` is told the bytes that xz, by far the slowest, has done of min(n, XZ_BYTES).

    - order0: code length under byte frequencies of the train bytes with one added to each.
    - order2: byte trigrams (two bytes of context) of the train bytes, interpolated down to order0 by the rule of Witten and Bell
      (1991, method C).
    - xz: `lzma` preset 9 extreme of the held-out bytes alone, container included; unlike the others it has seen no train bytes, and of
      more than XZ_BYTES it takes the first XZ_BYTES.
    """
    p0 = order0_probabilities(train)
    return {
        "order0": float(-np.log2(p0[held_out]).mean()),
        "order2": float(-np.log2(order2_probabilities(train, held_out, p0)).mean()),
        "xz": 8.0 * xz_bytes(held_out[:XZ_BYTES], advance) / min(len(held_out), XZ_BYTES),
    }


def xz_bytes(data: np.ndarray, advance: Callable[[int], None]) -> int:
    """Return the bytes of `data`, (n,) uint8, compressed by xz -9e."""
    compressor, size = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME), 0
    for start in range(0, len(data), XZ_BLOCK):
        block = data[start : start + XZ_BLOCK].tobytes()
        size += len(compressor.compress(block))
        advance(len(block))
    return size + len(compressor.flush())


def order0_probabilities(train: np.ndarray) -> np.ndarray:
    """Return P(byte) with add-one smoothing, (256,) float64."""
    counts = np.bincount(train, minlength=256) + 1.0
    return counts / counts.sum()


def order2_probabilities(train: np.ndarray, text: np.ndarray, p0: np.ndarray) -> np.ndarray:
    """Return P(text[i] | the two bytes before it), (n,) float64; the first byte has no context and the second has one.

    P(c|ab) = (N(abc) + T(ab) P(c|b)) / (N(ab) + T(ab)) where T counts the different bytes seen after the context; likewise P(c|b) over p0.
    A context that was never seen passes the lower order on unchanged.
    """
    used = np.flatnonzero(np.bincount(train, minlength=256) + np.bincount(text, minlength=256))
    rank = np.zeros(256, np.int64)
    rank[used] = np.arange(len(used))
    k = len(used)  # tables over the bytes that occur: some 100 for text, so that they stay small
    pairs = _counts(rank[train], 2, k).reshape(k, k)
    triples = _counts(rank[train], 3, k).reshape(k * k, k)
    c = rank[text]
    p = p0[text]  # (n,)
    p[1:] = _interpolate(pairs, c[:-1], c[1:], p[1:])
    p[2:] = _interpolate(triples, c[:-2] * k + c[1:-1], c[2:], p[2:])
    return p


def _interpolate(table: np.ndarray, context: np.ndarray, byte: np.ndarray, lower: np.ndarray) -> np.ndarray:
    total, distinct = table.sum(1)[context], (table > 0).sum(1)[context]
    return np.where(total > 0, (table[context, byte] + distinct * lower) / np.maximum(total + distinct, 1), lower)


def _counts(data: np.ndarray, order: int, k: int) -> np.ndarray:
    """Count the n-grams of `order` symbols below k, (k ** order,) int64."""
    total = np.zeros(k**order, np.int64)
    for start in range(0, max(len(data) - order + 1, 0), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES + order - 1]
        n = len(block) - order + 1
        code = sum(block[i : i + n] * k ** (order - 1 - i) for i in range(order))
        total += np.bincount(code, minlength=len(total))
    return total
