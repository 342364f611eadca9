"""`data=preference`: two answers to a prompt, one preferred, each answer in a row of its own after its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from components.contracts import Batch, UserError
from components.data.base import CorpusData
from components.data.chat import CHAT_TEMPLATE, Message, prompt_ids, turns
from components.data.documents import Corpus, Document, Piece, digest
from components.data.errors import choice, fraction
from components.data.progress import note
from components.data.rows import Rows, Span, make_batch
from components.data.sources import FileCorpus, FileSet, PathSpec, Record, file_sets, parse_entries
from components.data.stream import PackedStream, count_labels
from components.data.token_file import TokenFile

FORMS = ("text", "chat")
TOO_LONG = ("cut", "drop")
TURN = 3  # pieces of a message: its role, its words, its end
COLUMNS = ("chosen", "rejected")
Pieces = tuple[Piece, ...]


def pair(form: str, file: str, place: str, record: Record) -> tuple[Pieces, Pieces]:
    """Render a row's chosen and rejected answer, each after the prompt; only the answer's tokens and its end are labels.

    form text: `prompt`, `chosen` and `rejected` are texts that follow one another. form chat: each may be a text (the user's turn and the
    assistant's) or messages {role, content}; an answer of several messages is the whole conversation, and `prompt` is then not needed.
    Raises UserError naming the row when it is none of this, and when both answers are the same.
    """
    where = f"{file}, {place}" if place else file
    if isinstance(record, str):
        raise UserError(f"{file}: plain text holds no pairs; give .jsonl or .parquet with prompt, chosen and rejected")
    missing = [key for key in COLUMNS if record.get(key) is None]
    if form == "text" and record.get("prompt") is None:
        missing = ["prompt", *missing]
    if missing:
        raise UserError(
            f"{where} has no {', '.join(missing)}, only {', '.join(map(str, record))}; a pair needs prompt, chosen and rejected"
        )
    if record["chosen"] == record["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same, so that nothing is preferred; drop the row")
    if form == "text":
        for key in ("prompt", *COLUMNS):
            if not isinstance(record[key], str):
                raise UserError(f"{where}: {key} holds {type(record[key]).__name__}, not text; conversations need data.form=chat")
        for key in COLUMNS:
            if not (record["prompt"] + record[key]).strip():
                raise UserError(f"{where}: prompt and {key} are both empty; drop the row")
        prompt = Piece(record["prompt"], loss=False)
        return (prompt, Piece(record["chosen"])), (prompt, Piece(record["rejected"]))
    chosen, rejected = (_conversation(where, record, key) for key in COLUMNS)
    if chosen[:-1] != rejected[:-1]:
        raise UserError(f"{where}: chosen and rejected are conversations that differ before their last message; they need one prompt")
    return _turns(chosen, where), _turns(rejected, where)


def _conversation(where: str, record: Mapping[str, Any], key: str) -> list[Message]:
    """The messages that end in the answer `key`."""
    prompt, answer = record.get("prompt"), record[key]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    if len(messages) == 1:
        messages = [*before, *messages]
    last = messages[-1] if messages else None
    if len(messages) < 2 or not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise UserError(f"{where}: {key} must end in an assistant's message after a prompt; it is {answer!r:.60}")
    return messages


def _turns(messages: Sequence[Message], where: str) -> Pieces:
    """The pieces of a conversation of which only the last message counts."""
    pieces = turns(messages, "completion", where)
    return (*(replace(piece, loss=False) for piece in pieces[:-TURN]), *pieces[-TURN:])


class PairCorpus(FileCorpus):
    """Pairs from files, each as two documents: the chosen answer, then the rejected one. All pairs of a prompt are held out or none."""

    def __init__(self, files: FileSet, val_files: FileSet | None, form: str, val_fraction: float) -> None:
        super().__init__(files, val_files, lambda file, place, record: None, val_fraction, tails=False, variant=f"pairs by prompt, {form}")
        self._form = form

    def _documents(self, files: FileSet) -> Iterator[Document]:
        for _, file, place, record in files.records():
            both = pair(self._form, file, place, record)
            prompt = digest(*(piece.text for piece in both[0] if not piece.loss))
            yield from (Document(prompt, pieces) for pieces in both)


class PairRows:
    """The pairs of a token file (Rows): a key is a pair, its two spans the chosen and the rejected answer, which get a row each.

    too_long: cut leaves off the end of an answer that goes beyond a row, drop leaves such a pair out.
    Raises UserError when, after the cut, an answer has no label or both are the same, or when no pair is left.
    """

    def __init__(self, file: TokenFile, seq_len: int, too_long: str) -> None:
        self.file = file
        starts, lengths = np.asarray(file.documents[:-1]), np.diff(file.documents)  # (2P,)
        long: np.ndarray = np.any((lengths > seq_len).reshape(-1, 2), axis=1)  # (P,)
        self.truncated, self.left_out = (int(long.sum()), 0) if too_long == "cut" else (0, int(long.sum()))
        spans = np.stack([starts, np.minimum(lengths, seq_len)], axis=1).reshape(-1, 2, 2)  # (P, answer, (start, length))
        self._spans: list[list[Span]] = [
            [(int(s), int(n)) for s, n in both] for both in spans[~long if too_long == "drop" else slice(None)]
        ]
        self.count = len(self._spans)
        if not self.count:
            raise UserError(f"data.too_long: drop; all {len(long)} pair(s) are longer than data.seq_len={seq_len}; raise that, or cut them")
        labels = [[self._labels(span) for span in both] for both in self._spans]
        alike = [i for i, (a, b) in enumerate(labels) if not len(a) or not len(b) or np.array_equal(a, b)]
        if alike:
            raise UserError(
                f"data.seq_len: {seq_len}; {len(alike)} of {self.count} pairs do not differ within a row: their prompts are too long, or "
                f"their answers begin alike (the longest has {int(lengths.max())} tokens); raise it, or set data.too_long=drop"
            )
        self._counts = np.array([len(a) + len(b) for a, b in labels], np.int64)

    def _labels(self, span: Span) -> np.ndarray:
        start, length = span
        here = slice(start + 1, start + length + 1)
        tokens = np.asarray(self.file.tokens[here])
        return tokens if self.file.mask is None else tokens[np.asarray(self.file.mask[here]) != 0]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.count)

    def spans(self, key: int) -> list[Span]:
        return self._spans[key]

    def label_counts(self, keys: np.ndarray) -> np.ndarray:
        return self._counts[keys]


def pair_rows(chosen: Sequence[tuple[Rows, int]]) -> list[tuple[TokenFile, list[Span]]]:
    """Rows of a batch of B pairs: the B chosen answers, then the B rejected ones in the same order, so that i and B + i are a pair."""
    return [(source.file, [source.spans(key)[answer]]) for answer in (0, 1) for source, key in chosen]


class PairStream(PackedStream):
    """As PackedStream, of pairs: a micro-batch of `batch_size` pairs has twice as many rows, in the order of `pair_rows`."""

    def _rows(self, chosen: list[tuple[Rows, int]]) -> list[tuple[TokenFile, list[Span]]]:
        return pair_rows(chosen)


class HeldOutPairs:
    """Every held-out pair exactly once, in order, re-iterable; rows as in `pair_rows`, and the last batch may be smaller."""

    def __init__(self, sources: Sequence[PairRows], pairs: int, seq_len: int, eot_id: int) -> None:
        self._chosen: list[tuple[Rows, int]] = [(source, key) for source in sources for key in range(source.count)]
        self._pairs, self._seq_len, self._eot_id = pairs, seq_len, eot_id

    def __len__(self) -> int:
        return -(-len(self._chosen) // self._pairs)

    def __iter__(self) -> Iterator[Batch]:
        for index, first in enumerate(range(0, len(self._chosen), self._pairs)):
            batch = make_batch(pair_rows(self._chosen[first : first + self._pairs]), self._seq_len, self._eot_id)
            yield replace(batch, loss_tokens=count_labels(batch), index=index)


class PreferenceData(CorpusData):
    """Pairs of answers from `path` (.jsonl, .parquet or hub:NAME; same forms as for text), for tasks that compare answers.

    form: text (prompt and answer are texts that follow one another) or chat (turns of a conversation, as in data=chat). batch_size: pairs
    of a micro-batch on one rank. too_long: cut or drop, see PairRows. A batch has 2 * batch_size rows, the chosen answers first, then the
    rejected ones in the same order; a prompt's tokens are no labels. Held out are all pairs of some prompts, by a hash of the prompt.
    """

    pairs = True  # rows come in pairs: tasks that do not compare them cannot use them
    stream_type = PairStream

    def __init__(
        self, path: PathSpec | None, tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, form: str, too_long: str,
        val_fraction: float, val_path: PathSpec | None, encoding_errors: str, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        if path is None:
            raise UserError("data.path: missing; give a .jsonl or .parquet file, a folder, glob or hub:NAME (data.path=pairs.jsonl)")
        self.batch_size = 2 * self._drawn  # rows of a micro-batch, as the contract has it
        errors: Any = choice("data.encoding_errors", encoding_errors, ("strict", "replace"))
        share = fraction("data.val_fraction", val_fraction)
        self.form, self._too_long = choice("data.form", form, FORMS), choice("data.too_long", too_long, TOO_LONG)
        self._corpus_list = [
            PairCorpus(files, val_files, self.form, share)
            for files, val_files in file_sets(parse_entries("data.path", path), val_path, errors, None)
        ]
        self._held_out_rows: list[PairRows] = []
        self.source = "; ".join(corpus.name for corpus in self._corpus_list)

    def _corpora(self) -> Sequence[Corpus]:
        return self._corpus_list

    def prepare(self, cache_dir: Any, tokenizer: Any = None) -> None:
        """As CorpusData; also says how many answers were cut or left out."""
        super().prepare(cache_dir, tokenizer)
        self._held_out_rows = self._pair_rows("val")
        facts = self.summary()
        if facts["truncated"] or facts["left_out"]:
            what = f"{facts['truncated']} cut" if self._too_long == "cut" else f"{facts['left_out']} left out"
            note(f"data.seq_len: {self.seq_len}; of {facts['pairs']} pairs {what}, since an answer with its prompt is longer than a row")

    def _pair_rows(self, split: str) -> list[PairRows]:
        return [PairRows(file, self.seq_len, self._too_long) for file in self._files[split]]

    def _train_rows(self) -> list[Rows]:
        if self._rows is None:
            self._rows = list(self._pair_rows("train"))
        return self._rows

    def train_stream(self, seed: int, accumulate: int = 1, rank: int = 0, world_size: int = 1) -> PackedStream:
        """Return the endless stream of micro-batches of one rank. Raises UserError when the pairs fill no micro-batch."""
        count = sum(rows.count for rows in self._train_rows())
        if count < self._drawn * world_size:
            raise UserError(
                f"data.batch_size: {self._drawn} pairs x {world_size} process(es); only {count} pair(s) to train on; lower it, or give more"
            )
        return super().train_stream(seed, accumulate, rank, world_size)

    def val_batches(self) -> Any:
        """Return the held-out batches: every held-out pair exactly once."""
        return HeldOutPairs(self._held_out_rows, self._drawn, self.seq_len, self.tokenizer.eot_id)

    @property
    def val_bytes(self) -> int:
        """0: a preference is no text whose bits could be counted."""
        return 0

    @staticmethod
    def _make_baselines(folder: Any, corpora: Any, fingerprint: str) -> dict[str, float]:
        return {}

    def summary(self) -> dict[str, int | float | str]:
        """As CorpusData, with pairs, val_pairs, and how many pairs were cut (truncated) or left out for their length."""
        train: list[Any] = list(self._train_rows())
        every = [*train, *self._held_out_rows]
        return {
            **super().summary(),
            "val_bytes": 0,
            "pairs": sum(rows.count for rows in every),
            "val_pairs": sum(rows.count for rows in self._held_out_rows),
            "truncated": sum(rows.truncated for rows in every),
            "left_out": sum(rows.left_out for rows in every),
        }

    @property
    def render(self) -> Callable[[Sequence[Message]], list[int]]:
        """As ChatData.render. Raises AttributeError in the form text: such a run knows no turns, and its prompts are texts."""
        if self.form != "chat":
            raise AttributeError("render: data.form=text has no turns")
        return lambda messages: prompt_ids(self.tokenizer, messages)

    @property
    def chat_template(self) -> str | None:
        """As ChatData's in the form chat; None in the form text."""
        return CHAT_TEMPLATE if self.form == "chat" else None
