"""Rows: which spans of a token file stand in one row of a batch, for running text and for whole documents.

A span (start, length) means input_ids = tokens[start : start + length] and labels = tokens[start + 1 : start + length + 1], so that every
token is a label once. The last token of a document is followed in the file by the next document's E, which is its end mark.
"""

from __future__ import annotations

import bisect
from typing import Protocol

import numpy as np
import torch

from components.contracts import IGNORE, Batch
from components.data.token_file import TokenFile

Span = tuple[int, int]


class Rows(Protocol):
    """The rows of one token file."""

    file: TokenFile
    count: int  # rows of one pass over the file

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the keys of one pass in random order, (count,) int64."""
        ...

    def spans(self, key: int) -> list[Span]: ...
    def label_counts(self, keys: np.ndarray) -> np.ndarray:
        """Labels that count in the loss of each row, same shape as keys, int64."""
        ...


class RunningRows:
    """Non-overlapping rows of running text, cut at a new random phase in every pass.

    The stream E d1 ... dk E is read as a ring (its last E is its first), so that the tokens left over by a pass, fewer than a row, lie at a
    place that is uniform over the file: over many epochs every token is a label equally often.
    """

    def __init__(self, file: TokenFile, seq_len: int) -> None:
        self.file, self._seq_len = file, seq_len
        self._ring = len(file.tokens) - 1
        self.count = self._ring // seq_len

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        phase = int(rng.integers(self._ring))
        return (phase + self._seq_len * rng.permutation(self.count)) % self._ring

    def spans(self, key: int) -> list[Span]:
        before_end = min(self._seq_len, self._ring - key)
        return [(key, before_end)] + ([(0, self._seq_len - before_end)] if before_end < self._seq_len else [])

    def label_counts(self, keys: np.ndarray) -> np.ndarray:
        return np.full(keys.shape, self._seq_len, np.int64)


class DocumentRows:
    """Rows of whole documents, packed best-fit-decreasing; the same rows in every pass, in another order.

    A document longer than a row is cut to it, or goes on in further rows when `split_long`. Rows without a label are left out. packed:
    False gives every document a row of its own.
    """

    def __init__(self, file: TokenFile, seq_len: int, split_long: bool = False, packed: bool = True) -> None:
        self.file = file
        self.truncated = int((np.diff(file.documents) > seq_len).sum())  # documents longer than a row
        pieces, rests = [], []
        for start, end in zip(file.documents[:-1].tolist(), file.documents[1:].tolist(), strict=True):
            pieces.append((start, min(end - start, seq_len)))
            if split_long:
                rests += [(s, min(seq_len, end - s)) for s in range(start + seq_len, end, seq_len)]
        rows = pack(pieces, rests, seq_len) if packed else [[span] for span in [*pieces, *rests]]
        counted = [self._count(row) for row in rows]
        self._rows = [row for row, n in zip(rows, counted, strict=True) if n]
        self._labels = np.array([n for n in counted if n], np.int64)
        self.count = len(self._rows)

    def _count(self, row: list[Span]) -> int:
        if self.file.mask is None:
            return sum(length for _, length in row)
        return sum(int(self.file.mask[start + 1 : start + length + 1].sum()) for start, length in row)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.count)

    def spans(self, key: int) -> list[Span]:
        return self._rows[key]

    def label_counts(self, keys: np.ndarray) -> np.ndarray:
        return self._labels[keys]


def pack(pieces: list[Span], openers: list[Span], size: int) -> list[list[Span]]:
    """Pack spans into rows of at most `size` tokens, best-fit-decreasing (Johnson 1974).

    The longest come first, each goes into the fullest row that has room. Every span of `openers` starts a row of its own, since it
    continues a document and nothing marks its beginning. Ties go by position, so the same lengths always give the same rows.
    """
    rows = [[span] for span in openers]
    free: list[tuple[int, int]] = sorted((size - length, i) for i, (_, length) in enumerate(openers))  # (room, row)
    for span in sorted(pieces, key=lambda s: (-s[1], s[0])):
        at = bisect.bisect_left(free, (span[1], -1))
        if at == len(free):
            rows.append([])
            free.append((size, len(rows) - 1))
        room, row = free.pop(at)
        rows[row].append(span)
        if room > span[1]:
            bisect.insort(free, (room - span[1], row))
    return rows


def make_batch(rows: list[tuple[TokenFile, list[Span]]], seq_len: int, eot_id: int, document_mask: bool = True) -> Batch:
    """Read rows into a Batch of (B, seq_len); what a row leaves empty is a last segment of E inputs with IGNORE labels.

    document_mask: False leaves segments and positions out, so that a row is one text whatever documents it holds. Where the files have
    tasks, `task_ids` (B, seq_len) says each token's; what a row leaves empty has id 0.
    """
    shape = (len(rows), seq_len)
    inputs = np.full(shape, eot_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    used = np.zeros((len(rows), 1), np.int64)
    tasks = np.zeros(shape, np.int64) if any(file.task is not None for file, _ in rows) else None
    for i, (file, spans) in enumerate(rows):
        at = 0
        for start, length in spans:
            inputs[i, at : at + length] = file.tokens[start : start + length]
            follows = file.tokens[start + 1 : start + length + 1].astype(np.int64)
            if file.mask is not None:
                follows = np.where(file.mask[start + 1 : start + length + 1] != 0, follows, IGNORE)
            labels[i, at : at + length] = follows
            at += length
        used[i] = at
        if tasks is not None:
            tasks[i, :at] = file.task or 0
    task_ids = None if tasks is None else torch.from_numpy(tasks)
    if not document_mask:
        return Batch(input_ids=torch.from_numpy(inputs), labels=torch.from_numpy(labels), task_ids=task_ids)
    column = np.arange(seq_len)
    opens = (inputs == eot_id) & (column <= used)  # the first padding token opens the padding's segment, the others do not
    opens[:, 0] = False
    segments = opens.cumsum(1)  # (B, T)
    begin = np.maximum.accumulate(np.where(opens, column, 0), axis=1)
    return Batch(
        input_ids=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        segment_ids=torch.from_numpy(segments.astype(np.int32)),
        position_ids=torch.from_numpy(column - begin),
        task_ids=task_ids,
    )
