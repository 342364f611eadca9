"""Batch streams: the order of an epoch is a pure function of (seed, epoch), so that a run continues exactly from {epoch, position}."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from components.contracts import IGNORE, Batch, UserError
from components.data.rows import DocumentRows, Rows, Span, make_batch
from components.data.token_file import TokenFile
from components.data.window_mix import WindowMix

PREFETCH = 4  # micro-batches that each worker prepares ahead


@dataclass(frozen=True)
class Plan:
    """Which row stands where in an epoch. All arrays: (micro-batches, ranks, rows of a micro-batch)."""

    source: np.ndarray  # int64, which of the sources
    key: np.ndarray  # int64, the source's own name of the row
    labels: np.ndarray  # int64, labels of the row that count in the loss
    long: np.ndarray | None = None  # bool, rows of a long window where there are two kinds


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` rows out in proportion to `weights`, exact to rounding (largest remainders; ties to the first)."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for i in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[i] += 1
    return shares.tolist()


def plan_epoch(sources: Sequence[Rows], weights: Sequence[float], shape: tuple[int, int, int], seed: int, epoch: int) -> Plan:
    """Lay out one epoch: each source gives its quota of rows, in as many passes as that takes, and all are shuffled together.

    Source i draws from PCG64([seed, epoch, i + 1]) and the mixing from PCG64([seed, epoch]), which numpy takes for [seed, epoch, 0]. No
    global generator is touched, and the order depends on nothing else.
    """
    total = int(np.prod(shape))
    source, key, labels = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    at = 0
    for i, (rows, quota) in enumerate(zip(sources, quotas(weights, total), strict=True)):
        rng = np.random.Generator(np.random.PCG64([seed, epoch, i + 1]))
        passes = [rows.draw(rng) for _ in range(-(-quota // rows.count))]
        drawn = np.concatenate([np.empty(0, np.int64), *passes])[:quota]
        here = slice(at, at + quota)
        source[here], key[here], labels[here] = i, drawn, rows.label_counts(drawn)
        at += quota
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(total)
    return Plan(source[order].reshape(shape), key[order].reshape(shape), labels[order].reshape(shape))


class PackedStream:
    """Endless epochs of packed micro-batches for one rank (contract: BatchStream).

    An epoch has as many rows as the sources together, less what does not fill a micro-batch on every rank; which rows are left out changes
    from epoch to epoch. `accumulate` micro-batches make an optimizer step; the last step of an epoch may have fewer. `weights` None draws
    each row of each source once. `window_mix`: see there. Raises UserError when one micro-batch for every rank cannot be filled.
    """

    def __init__(
        self, sources: Sequence[Rows], seq_len: int, batch_size: int, eot_id: int, seed: int, *, weights: Sequence[float] | None = None,
        accumulate: int = 1, rank: int = 0, world_size: int = 1, num_workers: int = 0, document_mask: bool = True,
        window_mix: WindowMix | None = None,
    ) -> None:  # fmt: skip
        rows = sum(source.count for source in sources)
        self._length = rows // (batch_size * world_size)
        if self._length == 0:
            raise UserError(
                f"data.batch_size: {batch_size} x {world_size} process(es) x {seq_len} tokens; the training data has only {rows} row(s) of "
                f"{seq_len} tokens; lower data.batch_size or data.seq_len, or give more text"
            )
        self._sources, self._seq_len, self._eot_id, self._seed = list(sources), seq_len, eot_id, seed
        self._weights = list(weights) if weights is not None else [float(source.count) for source in sources]
        self._shape = (self._length, world_size, batch_size)
        self._accumulate, self._rank, self._num_workers, self._document_mask = accumulate, rank, num_workers, document_mask
        self._window_mix = window_mix
        self._epoch = self._position = 0
        self._plan = lru_cache(maxsize=1)(self._make_plan)

    def __len__(self) -> int:
        """Micro-batches in every epoch, whatever was read of the current one."""
        return self._length

    def state_dict(self) -> dict[str, int]:
        """Return {epoch, position} of the next batch to deliver; after the last batch of an epoch that is the next epoch's first."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on at `state`. Raises UserError when the epoch is shorter than that, so that the data or the batch size must have changed."""
        epoch, position = int(state["epoch"]), int(state["position"])
        if not 0 <= position <= self._length:
            raise UserError(
                f"resume: the run stopped at batch {position} of an epoch that now has {self._length}; data.batch_size, data.seq_len or "
                "the data changed since"
            )
        self._epoch, self._position = (epoch + 1, 0) if position == self._length else (epoch, position)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch. The state counts a batch from the moment it is handed over."""
        epoch, first = self._epoch, self._position
        batches = self._batches(epoch, first)
        for position, batch in enumerate(batches, first):
            self._epoch, self._position = (epoch, position + 1) if position + 1 < self._length else (epoch + 1, 0)
            yield batch

    def _batches(self, epoch: int, first: int) -> Iterable[Batch]:
        dataset = _MicroBatches(self, epoch)
        self._plan(epoch)  # laid out once, before the workers are forked
        if self._num_workers == 0:
            return map(dataset.__getitem__, range(first, self._length))
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first, self._length),
            num_workers=self._num_workers,
            collate_fn=_as_is,
            prefetch_factor=PREFETCH,
            generator=torch.Generator(),  # else the loader draws from the global generator at every epoch
        )

    def _make_plan(self, epoch: int) -> Plan:
        plan = plan_epoch(self._sources, self._weights, self._shape, self._seed, epoch)
        mix = self._window_mix
        if mix is None:
            return plan
        drawn = mix.long_source is None
        return replace(plan, long=mix.long_rows(self._shape, self._seed, epoch) if drawn else plan.source == mix.long_source)

    def batch(self, epoch: int, position: int) -> Batch:
        """Return the micro-batch at a place of an epoch, for this rank."""
        plan = self._plan(epoch)
        chosen = zip(plan.source[position, self._rank].tolist(), plan.key[position, self._rank].tolist(), strict=True)
        rows = self._rows([(self._sources[i], key) for i, key in chosen])
        window = position // self._accumulate * self._accumulate
        batch = make_batch(rows, self._seq_len, self._eot_id, self._document_mask)
        if self._window_mix is not None and plan.long is not None:
            batch = self._window_mix.apply(batch, plan.long[position, self._rank])
        return replace(
            batch,
            loss_tokens=int(plan.labels[window : window + self._accumulate].sum()),
            index=epoch * self._length + position,
        )

    def _rows(self, chosen: list[tuple[Rows, int]]) -> list[tuple[TokenFile, list[Span]]]:
        """What stands in each row of a micro-batch."""
        return [(source.file, source.spans(key)) for source, key in chosen]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._plan = lru_cache(maxsize=1)(self._make_plan)


class _MicroBatches(Dataset[Batch]):
    """One epoch of a stream by position."""

    def __init__(self, stream: PackedStream, epoch: int) -> None:
        self._stream, self._epoch = stream, epoch

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, position: int) -> Batch:
        return self._stream.batch(self._epoch, position)


def count_labels(batch: Batch) -> int:
    """Return the labels of a batch that count in the loss."""
    return 0 if batch.labels is None else int((batch.labels != IGNORE).sum())


def _as_is(batch: Any) -> Any:
    return batch


class HeldOutBatches:
    """Every held-out label exactly once, in order, re-iterable. Each batch's `loss_tokens` counts its own labels.

    Running text is one stream a file, cut into rows of seq_len without overlap; with `whole_documents` documents are packed whole and only
    what is longer than a row goes on in another. document_mask: see make_batch. multiple_of: of running text, only so many tokens from its
    beginning that rows of this length fill them; None for all.
    """

    def __init__(
        self, files: Sequence[TokenFile], seq_len: int, batch_size: int, eot_id: int, whole_documents: bool = False,
        document_mask: bool = True, multiple_of: int | None = None,
    ) -> None:  # fmt: skip
        self._seq_len, self._batch_size, self._eot_id, self._document_mask = seq_len, batch_size, eot_id, document_mask
        self._rows: list[tuple[TokenFile, list[Span]]] = []
        if whole_documents:
            for packed in (DocumentRows(file, seq_len, split_long=True) for file in files):
                self._rows += [(packed.file, packed.spans(key)) for key in range(packed.count)]
        else:
            for file in files:
                ring = len(file.tokens) - 1
                ring -= ring % multiple_of if multiple_of else 0
                self._rows += [(file, [(start, min(seq_len, ring - start))]) for start in range(0, ring, seq_len)]

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index, start in enumerate(range(0, len(self._rows), self._batch_size)):
            batch = make_batch(self._rows[start : start + self._batch_size], self._seq_len, self._eot_id, self._document_mask)
            yield replace(batch, loss_tokens=count_labels(batch), index=index)
