"""What data with tasks share: a corpus a task, rows that know their task, and every task measured by itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components.contracts import Batch, Tokenizer, UserError
from components.data.base import CorpusData
from components.data.progress import note
from components.data.rows import DocumentRows
from components.data.token_file import TokenFile


class TaskData(CorpusData):
    """Base of the data options with tasks: `task_names`, and one corpus for each in the same order. A row holds documents of one task.

    Batches carry `task_ids` (B, seq_len). Every task's held-out rows are measured at the end of a run: eval/NAME/loss, eval/NAME/accuracy.
    """

    whole_documents = True

    def prepare(self, cache_dir: Path, tokenizer: Tokenizer | None = None) -> None:
        """As CorpusData; also says how many examples and which share of training each task has, and how many are cut.

        Raises UserError for a task of which a row of `seq_len` holds no label.
        """
        super().prepare(cache_dir, tokenizer)  # type: ignore[arg-type]
        files = self._files["train"]
        rows = [DocumentRows(file, self.seq_len, packed=self.packed) for file in files]
        for file, some in zip(files, rows, strict=True):
            if not some.count:
                raise UserError(
                    f"data.seq_len: {self.seq_len}; every prompt of task {self._name(file)} is longer, so that no answer is left; raise it"
                )
        self._rows = list(rows)
        weights = self._stream_weights() or [float(some.count) for some in rows]
        facts = zip(files, weights, strict=True)
        said = ", ".join(f"{self._name(file)} {_examples(file):,} ({weight / sum(weights):.0%})" for file, weight in facts)
        cut = sum(some.truncated for some in rows)
        longer = f"; {cut:,} are longer than data.seq_len={self.seq_len} and cut" if cut else ""
        note(f"tasks, their examples and their share of training: {said}{longer}")

    def evaluations(self) -> dict[str, Iterable[Batch]]:
        """Return the held-out rows of each task, by its name."""
        return {self._name(file): self._held_out_batches(self.seq_len, self.batch_size, files=[file]) for file in self._files["val"]}

    def summary(self) -> dict[str, int | float | str]:
        """As CorpusData, with the examples to train on and those held out of each task: rows/NAME, val_rows/NAME."""
        found: dict[str, Any] = super().summary()
        for split, key in (("train", "rows"), ("val", "val_rows")):
            found |= {f"{key}/{self._name(file)}": _examples(file) for file in self._files[split]}
        return found

    def _name(self, file: TokenFile) -> str:
        assert file.task is not None
        return self.task_names[file.task]


def _examples(file: TokenFile) -> int:
    return len(file.documents) - 1
