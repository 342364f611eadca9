"""`data=synthllm`: the questions and answers that `task=synthesize` leaves, as conversations: by level, and in nested subsets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from components.contracts import Batch, UserError
from components.data.chat import ChatData, conversation
from components.data.documents import Corpus, Document, Piece, digest, held_out_keys
from components.data.errors import at_least
from components.data.progress import note, progress
from components.data.readers import HUB, suffix_of
from components.data.sources import Entry, FileSet, Record, Render
from components.data.token_file import CODE_VERSION, TokenFile, encoded, replacing
from components.data.tokenizers import Tokenizer

LEVELS = (1, 2, 3)  # SynthLLM, sec. 2.3: from one document | from its concepts | from the graph of all concepts
NEEDED = ("id", "level", "messages")
COLUMNS = (
    "id", "level", "question", "answer", "messages", "topics", "concepts", "doc_ids", "origin", "school_level", "models", "prompt_id",
    "sampling", "seed", "tokens", "finish_reason", "parents",
)  # fmt: skip
FINAL = "final"


def checked_levels(value: object) -> tuple[int, ...]:
    """Levels in rising order, of one level or a list. Raises UserError for others, a level twice and none at all."""
    levels: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for level in levels:
        if isinstance(level, bool) or level not in LEVELS:
            number = isinstance(level, int | float) and not isinstance(level, bool)
            near = f"; did you mean {min(LEVELS, key=lambda one: abs(one - level))}?" if number else ""
            raise UserError(f"data.levels: {level!r} is not one of {', '.join(map(str, LEVELS))}{near}")
    if not levels or len(set(levels)) < len(levels):
        raise UserError(f"data.levels: {levels}; give one or more different ones of {', '.join(map(str, LEVELS))}, such as [1, 2]")
    return tuple(sorted(map(int, levels)))


def tables(key: str, path: str) -> list[str]:
    """What a path means: of a folder that `task=synthesize` wrote the .parquet files in its final/, of another folder its own.

    Raises UserError for a folder without any. All else is left as it is, for `FileSet` to find.
    """
    given = Path(path).expanduser()
    if path.startswith(HUB) or not given.is_dir():
        return [path]
    folder = given / FINAL if (given / FINAL).is_dir() else given
    found = sorted(str(file) for file in folder.iterdir() if suffix_of(file) == ".parquet" and not file.name.startswith("."))
    if not found and folder.name == FINAL:
        raise UserError(f"{key}: {folder}: holds no .parquet file, so that there is nothing to learn; report.json says where the rows went")
    if not found:
        raise UserError(
            f"{key}: {path}: has no {FINAL}/, so it is not finished; `python generate.py task=synthesize output={path}` goes on"
        )
    return found


def identity(file: str, place: str, record: Record) -> tuple[str, int]:
    """(id, level) of a row. Raises UserError naming the row where columns are missing, or are not what they should be."""
    if isinstance(record, str):
        raise UserError(f"{file}: plain text holds no rows; give a folder that task=synthesize wrote, a .parquet or a .jsonl file")
    where = f"{file}, {place}"
    if missing := [name for name in NEEDED if record.get(name) is None]:
        raise UserError(
            f"{where} has no {', '.join(missing)}, only {', '.join(map(str, record))}; rows of task=synthesize have "
            f"{', '.join(COLUMNS)} (needed are {', '.join(NEEDED)}); other conversations are data=chat"
        )
    row, level = record["id"], record["level"]
    if not isinstance(row, str) or not row:
        raise UserError(f"{where}: id is {row!r:.60}; it must be text, the hash of the row's content")
    if isinstance(level, bool) or level not in LEVELS:
        raise UserError(f"{where}: level is {level!r:.60}; it must be one of {', '.join(map(str, LEVELS))}")
    return row, int(level)


@dataclass(frozen=True)
class Choice:
    """What is trained on: rows of these levels, the first `samples` of a permutation, or as many as have `tokens`; None: all."""

    levels: tuple[int, ...]
    samples: int | None
    tokens: int | None
    seed: int


class SynthesisedRows:
    """The rows of some files: which are held out, and which of the others are chosen. A row whose id came before is not there.

    Held out are the ids of `held_out_files`, else those whose hash lies below `share`, of all levels and whatever is chosen. The chosen
    ones are a prefix of one permutation, by a hash of (seed, id), so that smaller sets lie in larger ones.
    tokenizer: counts tokens; called only where `choice.tokens` asks for it.
    """

    def __init__(
        self, files: FileSet, held_out_files: FileSet | None, render: Render, share: float, choice: Choice,
        tokenizer: Callable[[], Tokenizer],
    ) -> None:  # fmt: skip
        self.files, self.choice = files, choice
        self._held_out_files, self._render, self._share, self._tokenizer = held_out_files, render, share, tokenizer
        self.repeated = 0  # rows with an id that came before; there once the files were read

    def fingerprint(self) -> str:
        """16 hex digits that change with the files' contents or with what is held out."""
        return digest(self.files.fingerprint(), self._held_out_files.fingerprint() if self._held_out_files else self._share)

    def _rows(self, files: FileSet) -> Iterator[tuple[str, int, tuple[Piece, ...]]]:
        for _, file, place, record in files.records():
            row, level = identity(file, place, record)
            yield row, level, self._render(file, place, record) or ()

    def _indexed(self, files: FileSet) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for row, level, pieces in self._rows(files):
            if row in found:
                self.repeated += 1
            else:
                found[row] = level, sum(len(piece.text) for piece in pieces if not piece.special)
        if not found:
            raise UserError(f"{files.key}: {files.name}: holds no row, so that there is nothing to learn")
        return found

    @cached_property
    def index(self) -> dict[str, tuple[int, int]]:
        """{id: (level, characters)} of every row of the files."""
        return self._indexed(self.files)

    @cached_property
    def held_out(self) -> dict[str, tuple[int, int]]:
        """As `index`, of the rows that are held out. Raises UserError where there is but one row."""
        if self._held_out_files is not None:
            return self._indexed(self._held_out_files)
        if len(self.index) < 2:
            raise UserError(f"{self.files.key}: {self.files.name}: one row cannot be split; give more, or held-out rows with data.val_path")
        return {row: self.index[row] for row in held_out_keys(self.index, self._share)}

    @cached_property
    def trainable(self) -> dict[str, tuple[int, int]]:
        """As `index`, of the rows of all levels that are not held out."""
        return {row: found for row, found in self.index.items() if row not in self.held_out}

    @cached_property
    def candidates(self) -> list[str]:
        """Ids of the chosen levels in the order of the permutation. Raises UserError where there is none."""
        ours = [row for row, (level, _) in self.trainable.items() if level in self.choice.levels]
        if not ours:
            raise UserError(f"data.levels: {list(self.choice.levels)}; {self.what_is_there()}; choose among those")
        return sorted(ours, key=lambda row: (digest(self.choice.seed, row), row))

    @cached_property
    def chosen(self) -> list[str]:
        """Ids of the rows to train on. Raises UserError where there are not so many, or not so many tokens."""
        samples, tokens = self.choice.samples, self.choice.tokens
        if tokens is not None:
            return self._until(tokens)
        if samples is not None and samples > len(self.candidates):
            raise UserError(f"data.samples: {samples}; {self.what_is_there()}; lower it, or choose more levels")
        return self.candidates[:samples]

    def _until(self, tokens: int) -> list[str]:
        """The shortest prefix with `tokens` tokens: those of question, answer and marks, before anything is cut to a row."""
        lengths: dict[str, int] = {}
        with progress("counting tokens,", sum(self.index[row][1] for row in self.candidates)) as advance:
            for document, ids, _ in encoded(self.documents(self.candidates), self._tokenizer()):
                lengths[document.key] = len(ids) + 1  # and the mark before it
                advance(self.index[document.key][1])
        for count, total in enumerate(accumulate(lengths[row] for row in self.candidates), 1):
            if total >= tokens:
                return self.candidates[:count]
        total = sum(lengths.values())
        levels = ", ".join(map(str, self.choice.levels))
        raise UserError(f"data.tokens: {tokens}; {self.what_is_there()}, with {total} tokens at level {levels}; lower it")

    def what_is_there(self) -> str:
        """Rows that could be trained on, by level, in words."""
        counts = Counter(level for level, _ in self.trainable.values())
        each = ", ".join(f"{counts[level]} of level {level}" for level in LEVELS)
        return f"{self.files.name} has {each} to train on, and {len(self.held_out)} held out"

    def documents(self, wanted: Iterable[str], held_out: bool = False) -> Iterator[Document]:
        """The documents of some rows, in the order of the files, each once."""
        left = set(wanted)
        files = self._held_out_files if held_out and self._held_out_files is not None else self.files
        for row, _, pieces in self._rows(files):
            if row in left:
                left.remove(row)
                yield Document(row, pieces)


class Part:
    """Some of the rows as a corpus; all of them are trained on, or all held out."""

    weight: float | None = None

    def __init__(self, rows: SynthesisedRows, name: str, held_out: bool, which: Callable[[], Collection[str]], *mark: object) -> None:
        self.name = name
        self._rows, self._held_out, self._which, self._mark = rows, held_out, which, mark

    def fingerprint(self) -> str:
        return digest("synthllm", self._rows.fingerprint(), self._held_out, *self._mark)

    def train(self) -> Iterator[Document]:
        return iter(()) if self._held_out else self._rows.documents(self._which())

    def held_out(self) -> Iterator[Document]:
        return self._rows.documents(self._which(), held_out=True) if self._held_out else iter(())

    def size(self, split: str) -> int:
        if (split == "val") != self._held_out:
            return 0
        index = self._rows.held_out if self._held_out else self._rows.index
        return sum(index[row][1] for row in self._which())


class SynthLLMData(ChatData):
    """Rows of `task=synthesize` as conversations (SynthLLM, arXiv 2503.19551); all else is as in ChatData.

    path: a folder that the task wrote, its final/, a .parquet or .jsonl file, a glob, hub:NAME, or a list of those. levels: one level or
    several. samples: so many rows, nested; tokens: the fewest rows with so many tokens, counted by the run's tokenizer; at most one of
    them. seed: of their order. The same rows are held out whatever is chosen, of all levels, and measured by level too
    (eval/level_2/loss); val_path: held-out rows of their own, none of which is trained on. A BPE tokenizer is trained on all that is not
    held out, whatever is chosen, so that subsets can be compared. Raises UserError for values out of range.
    """

    _parts: tuple[SynthesisedRows, Part, dict[int, Part]]  # (rows, what is trained on, what is held out of each level), while preparing

    def __init__(
        self, path: str | list[str] | None, levels: int | list[int], samples: int | None, tokens: int | None, seed: int,
        tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, val_fraction: float, val_path: str | list[str] | None, loss_on: str,
        pack: bool, encoding_errors: str, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(path, tokenizer, seq_len, batch_size, val_fraction, val_path, loss_on, pack, encoding_errors, num_workers)
        if samples is not None and tokens is not None:
            raise UserError(f"data.samples: {samples} and data.tokens: {tokens} exclude each other; leave one of them null")
        for key, value in (("data.samples", samples), ("data.tokens", tokens)):
            if value is not None:
                at_least(key, value, 1)
        self._path, self._val_path, self._errors = path, val_path, encoding_errors
        self._choice = Choice(checked_levels(levels), samples, tokens, at_least("data.seed", seed, 0))
        self._loss_on, self._share = loss_on, val_fraction
        self._by_level: dict[int, TokenFile] = {}  # held-out rows
        self._facts: dict[str, int] = {}

    def _file_set(self, key: str, path: str | list[str] | None) -> FileSet:
        paths = [path] if isinstance(path, str) else list(path or [])
        errors: Any = self._errors
        files = FileSet(key, Entry(tuple(file for one in paths for file in tables(key, one))), errors, None)
        files.name = ", ".join(paths)
        return files

    def _corpora(self) -> Sequence[Corpus]:
        files = self._file_set("data.path", self._path)  # the folder is looked into here, not when a run is loaded
        held_out = None if self._val_path is None else self._file_set("data.val_path", self._val_path)
        rows = SynthesisedRows(files, held_out, partial(conversation, self._loss_on), self._share, self._choice, lambda: self.tokenizer)
        train = Part(rows, files.name, False, lambda: rows.chosen, self._loss_on, self._choice)
        by_level = {level: Part(rows, files.name, True, partial(_of_level, rows, level), self._loss_on, level) for level in LEVELS}
        self._parts = rows, train, by_level
        return [train, *by_level.values()]

    def prepare(self, cache_dir: Path, tokenizer: Tokenizer | None = None) -> None:
        """As CorpusData; also says what was left out."""
        self._by_level = {}
        super().prepare(cache_dir, tokenizer)
        del self._parts  # an entry for every row of the folder
        facts = self._facts
        if left_out := facts["left_out"] + facts["repeated"]:
            each = ", ".join(f"{facts[f'rows_level_{level}']} of level {level}" for level in LEVELS)
            why = f"{facts['left_out']} not chosen, {facts['repeated']} repeated"
            note(f"data: {facts['rows']} rows to train on ({each}), {facts['tokens']} tokens; {left_out} left out ({why})")

    def _make_tokenizer(self, folder: Path, corpora: Sequence[Corpus], fingerprint: str) -> Any:
        rows, *_ = self._parts
        whole = Part(rows, rows.files.name, False, lambda: rows.trainable, self._loss_on)
        return super()._make_tokenizer(folder, [whole], whole.fingerprint())

    def _token_file(self, folder: Path, corpus: Corpus, fingerprint: str, split: str) -> TokenFile | None:
        _, train, by_level = self._parts
        if (split == "train") != (corpus is train):
            return None
        file = super()._token_file(folder, corpus, fingerprint, split)
        if file is not None and corpus is train:
            self._facts = self._counted(folder, fingerprint) | {"tokens": len(file.tokens) - 1}
        elif file is not None:
            self._by_level[next(level for level, part in by_level.items() if part is corpus)] = file
        return file

    def _counted(self, folder: Path, fingerprint: str) -> dict[str, int]:
        """What was chosen and left out; kept beside the token file, so that a later start need not read the rows."""
        rows, *_ = self._parts
        name = f"rows-{digest(CODE_VERSION, self.tokenizer.fingerprint, fingerprint)}.json"
        try:
            return {key: int(value) for key, value in json.loads((folder / name).read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            chosen, held_out = Counter(rows.index[row][0] for row in rows.chosen), Counter(level for level, _ in rows.held_out.values())
        facts = {"rows": len(rows.chosen)}
        facts |= {f"rows_level_{level}": chosen[level] for level in LEVELS}
        facts |= {f"held_out_level_{level}": held_out[level] for level in LEVELS}
        facts |= {"left_out": len(rows.trainable) - len(rows.chosen), "repeated": rows.repeated}
        with replacing(folder, [name]) as (file,):
            file.write(json.dumps(facts).encode())
        return facts

    def _make_baselines(self, folder: Path, corpora: Sequence[Corpus], fingerprint: str) -> dict[str, float]:  # type: ignore[override]
        # with data.tokens it is the tokenizer that decides which rows are trained on
        return super()._make_baselines(folder, corpora, digest(fingerprint, self.tokenizer.fingerprint))

    def evaluations(self) -> dict[str, Iterable[Batch]]:
        """Return what is held out of each level, `level_1` and so on, where there are several."""
        files = self._by_level if len(self._by_level) > 1 else {}
        return {f"level_{level}": self._held_out_batches(self.seq_len, self.batch_size, files=[file]) for level, file in files.items()}

    def summary(self) -> dict[str, int | float | str]:
        """As CorpusData, with rows to train on and held out by level, their tokens, and rows left out: not chosen, or repeated ids."""
        return {**super().summary(), **self._facts}


def _of_level(rows: SynthesisedRows, level: int) -> list[str]:
    return [row for row, (own, _) in rows.held_out.items() if own == level]
