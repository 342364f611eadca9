"""`data=text`: the user's own text files, folders, globs, tables and hub data sets, alone or mixed by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.contracts import UserError
from components.data.base import CorpusData
from components.data.documents import Corpus
from components.data.errors import choice, fraction, lengths
from components.data.sources import PathSpec, text_corpora
from components.data.window_mix import WindowMix


class TextData(CorpusData):
    """Text from `path`: a file, folder, glob or hub:NAME, a list of them, or entries {path, weight, column} in a list or by name.

    A text file is one document, a row of .jsonl or .parquet is one (its `column`). Held out is `val_path` where given, else `val_fraction`:
    whole documents by a hash of their names, or the tail of each where there are fewer than 1 / val_fraction of them.
    encoding_errors: strict (refuse bytes that are not UTF-8) or replace (with U+FFFD). See CorpusData for the other arguments.
    """

    def __init__(
        self, path: PathSpec | None, tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, val_fraction: float,
        val_path: PathSpec | None, column: str, encoding_errors: str, document_mask: bool, eval_lengths: Sequence[int], num_workers: int,
        window_mix: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        self.document_mask, self.eval_lengths = document_mask, lengths("data.eval_lengths", eval_lengths)
        self.window_mix = WindowMix.of(window_mix)
        if path is None:
            raise UserError("data.path: missing; give a file, folder, glob or hub:NAME (data.path=notes.txt), or a list of them")
        errors: Any = choice("data.encoding_errors", encoding_errors, ("strict", "replace"))
        self._texts = text_corpora(path, val_path, column, fraction("data.val_fraction", val_fraction), errors)
        self.source = "; ".join(corpus.name for corpus in self._texts)

    def _corpora(self) -> Sequence[Corpus]:
        return self._texts
