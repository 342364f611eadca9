"""Which texts repeat a benchmark's items: as a whole after normalisation, or by a run of 13 words (Brown et al. 2020, app. C)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.data.readers import read_records
from components.errors import UserError
from components.synthesis.text import Hashes, gram_hashes, normal_text


@dataclass(frozen=True)
class Hit:
    """Why a text is dropped. filter: "exact" or "overlap"."""

    benchmark: str
    filter: str


@dataclass(frozen=True)
class Verdicts:
    """hits: one a text, None for a clean one. counts: BENCHMARK/FILTER -> texts; a text counts once, in the first that it hits."""

    hits: list[Hit | None]
    counts: dict[str, int]


class Benchmarks:
    """What must not be trained on.

    Args:
        items: name of a benchmark -> its texts.
        words: length of a run that gives a text away (13); an item of fewer words is found as a whole only, see `short`.

    Raises UserError for a benchmark without items.
    """

    def __init__(self, items: Mapping[str, Sequence[str]], words: int) -> None:
        if not isinstance(words, int) or isinstance(words, bool) or words < 1:
            raise UserError(f"decontamination.words: {words!r}; allowed is a whole number of at least 1, such as 13")
        self.words = words
        self.short: dict[str, int] = {}  # items with fewer than `words` words
        self._exact: dict[str, set[str]] = {}
        self._grams: dict[str, Hashes] = {}
        for name, texts in items.items():
            if not len(texts):
                raise UserError(f"decontamination.benchmarks.{name}: no items; name a file with some")
            grams, ends = gram_hashes(texts, words, short=False)
            self.short[name] = int((np.diff(ends) == 0).sum())
            self._exact[name] = {normal_text(text) for text in texts}
            self._grams[name] = np.unique(grams)

    def check(self, texts: Sequence[str]) -> Verdicts:
        """Compare each text with every item of every benchmark."""
        grams, ends = gram_hashes(texts, self.words, short=False)
        hits: list[Hit | None] = [None] * len(texts)
        normal = [normal_text(text) for text in texts]
        for name in self._exact:
            for place, text in enumerate(normal):
                if hits[place] is None and text in self._exact[name]:
                    hits[place] = Hit(name, "exact")
        owner = np.repeat(np.arange(len(texts)), np.diff(ends))
        for name, known in self._grams.items():
            for place in np.unique(owner[np.isin(grams, known)]).tolist():
                if hits[place] is None:
                    hits[place] = Hit(name, "overlap")
        found = Counter(f"{hit.benchmark}/{hit.filter}" for hit in hits if hit)
        return Verdicts(hits, {f"{name}/{kind}": found[f"{name}/{kind}"] for name in self._exact for kind in ("exact", "overlap")})


def read_benchmark(name: str, path: Path, column: str) -> list[str]:
    """Texts of one column of a benchmark's file (jsonl, json or parquet). Raises UserError naming file and place for anything else."""
    key, texts = f"decontamination.benchmarks.{name}", []
    if not path.is_file():
        raise UserError(f"{key}: {path}: no such file")
    for place, record in read_records(path):
        if not isinstance(record, dict):
            raise UserError(f"{key}: {path}: a benchmark is a .jsonl, .json or .parquet file of rows with a column {column!r}")
        if not isinstance(record.get(column), str):
            raise UserError(f"{key}: {path}: {place}: no text in column {column!r}; its columns are {', '.join(map(str, record))}")
        texts.append(record[column])
    return texts
