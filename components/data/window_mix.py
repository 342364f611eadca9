"""Rows of two window lengths in one training stream, each with its RoPE regime (LongRoPE2, arXiv 2502.20082, sec. 3.3).

A short row is what the model was trained on before: documents, none longer than the original window, that do not see each other, neither
by attention nor by the state of a recurrent layer, under the original RoPE. A long row is one text as long as the row, whatever documents
it joins, under the rescaled RoPE. The regime travels with the row (`Batch.rope_regime`): by its length alone a packed short row would
count as a long one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from components.contracts import Batch, UserError
from components.data.errors import at_least

KEYS = ("short_len", "long_share")


@dataclass(frozen=True)
class WindowMix:
    """short_len: tokens of a short window, L0. long_share: of the rows, and so of the tokens, that are long; exact to rounding an epoch.

    long_source: of the stream's sources, the one whose rows are long; None: they are drawn among all rows.
    """

    short_len: int
    long_share: float
    long_source: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> WindowMix | None:
        """From the node `data.window_mix`. Raises UserError for unknown or missing keys and values out of range."""
        if options is None:
            return None
        if set(options) != set(KEYS):
            raise UserError(f"data.window_mix: has {', '.join(options) or 'no keys'}; it needs {' and '.join(KEYS)}")
        share = options["long_share"]
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"data.window_mix.long_share: {share!r}; allowed is a share of the rows from 0 to 1")
        return cls(at_least("data.window_mix.short_len", options["short_len"], 2), float(share))

    def long_rows(self, shape: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
        """Which rows of an epoch are long: bool of `shape`, a pure function of (seed, epoch) and independent of the rows' order."""
        total = int(np.prod(shape))
        long = np.arange(total) < round(self.long_share * total)
        return np.random.Generator(np.random.PCG64([seed, epoch, 0, 1])).permutation(long).reshape(shape)

    def apply(self, batch: Batch, long: np.ndarray) -> Batch:
        """Give the rows (B, T) their windows. long: (B,) bool.

        Labels stay: the last token of a window still predicts the next one of its document.
        """
        rows, length = batch.input_ids.shape
        column = torch.arange(length).expand(rows, length)
        segments = batch.segment_ids if batch.segment_ids is not None else torch.zeros(rows, length, dtype=torch.int32)
        begins = segments != torch.nn.functional.pad(segments[:, :-1], (1, 0), value=-1)  # (B, T)
        begin = torch.where(begins, column, 0).cummax(dim=1).values
        begins = begins | ((column - begin) % self.short_len == 0)
        begins[torch.from_numpy(long)] = column[0] == 0
        begin = torch.where(begins, column, 0).cummax(dim=1).values
        return replace(
            batch,
            segment_ids=begins.cumsum(dim=1).to(torch.int32) - 1,
            position_ids=column - begin,
            rope_regime=torch.from_numpy(long.astype(np.int8)),
        )
