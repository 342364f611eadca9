"""`data=multitask`: instructions of several named tasks, each from files of its own, asked with one prompt template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from components.contracts import UserError
from components.data.chat import LOSS_ON, Message
from components.data.documents import Corpus, Piece, digest
from components.data.errors import choice, did_you_mean, fraction
from components.data.sources import Entry, FileCorpus, FileSet, Record, parse_entries
from components.data.tasks import TaskData
from components.data.templates import PromptTemplate

MIXING = ("proportional", "uniform", "temperature")
KEYS = ("path", "val_path", "weight")
FIELDS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))  # question and answer of a row, under their names
_NAME = re.compile(r"(?!\d+$)\w[\w.-]*")  # a part of metrics' names, and a number alone would be an id


class Question(NamedTuple):
    """prompt: as the model reads it; answer: the row's `answer`, a label, else its whole output."""

    prompt: str
    answer: str


def asked_and_said(template: PromptTemplate, file: str, place: str, record: Record) -> tuple[str, str]:
    """(prompt, answer) of a row with instruction, perhaps input, and output, or with other names of FIELDS; a prompt is an instruction.

    Raises UserError naming the row when it is neither, or when a field is no text.
    """
    if isinstance(record, str):
        raise UserError(f"{file}: plain text holds no examples; give .json, .jsonl or .parquet with instruction and output in each row")
    where = f"{file}, {place}"
    for question, answer in FIELDS:
        if question in record and answer in record:
            break
    else:
        has = ", ".join(map(str, record)) or "no field"
        raise UserError(f"{where} has only {has}; an example needs {', or '.join(' and '.join(names) for names in FIELDS)}")
    given = record.get("input") or ""
    for key, value in ((question, record[question]), (answer, record[answer]), ("input", given)):
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} holds {type(value).__name__}, not text")
    if not record[answer]:
        raise UserError(f"{where}: {answer} is empty, so that nothing in it could be learnt; drop the row")
    return template.render(record[question], given), record[answer]


class TaskCorpus(FileCorpus):
    """Examples of one task; with loss_on "completion" the answers and their end marks are labels, with "all" the prompts too."""

    def __init__(
        self, files: FileSet, val_files: FileSet | None, template: PromptTemplate, loss_on: str, val_fraction: float
    ) -> None:  # fmt: skip
        def render(file: str, place: str, record: Record) -> tuple[Piece, ...]:
            prompt, answer = asked_and_said(template, file, place, record)
            return Piece(prompt, loss=loss_on == "all"), Piece(answer)

        super().__init__(files, val_files, render, val_fraction, tails=False, variant=digest("multitask", loss_on, template))
        self._ask = partial(asked_and_said, template)

    def problems(self, held_out: bool) -> Iterator[tuple[str, str]]:
        """(question, answer) of what is trained on or held out, without the template. Rows with an input are no single question."""
        bare, own = PromptTemplate("{instruction}{input}", "{instruction}"), self._val_files is not None
        for key, file, place, record in (self._val_files if held_out and self._val_files is not None else self._files).records():
            if (own or (key in (self._held_out or ())) == held_out) and not (isinstance(record, dict) and record.get("input")):
                yield asked_and_said(bare, file, place, record)

    def questions(self) -> Iterator[Question]:
        """What is held out, in the order of the files."""
        files = self._files if self._val_files is None else self._val_files
        for key, file, place, record in files.records():
            if self._val_files is not None or key in (self._held_out or ()):
                prompt, answer = self._ask(file, place, record)
                label = record.get("answer") if isinstance(record, dict) else None
                yield Question(prompt, label if isinstance(label, str) else answer)


class MultitaskData(TaskData):
    """Tasks by name: {path, val_path, weight}; a path is a file, folder, glob or hub:NAME, or a list of them. Their order gives the ids.

    Rows of .json (a list), .jsonl, .parquet or a hub data set hold instruction, input (may be empty) and output, or other names of FIELDS.
    Held out of a task is its val_path, else `val_fraction` of its examples, by a hash of their names.
    mixing: how rows (of seq_len tokens) are shared out among tasks that fill n of them in an epoch: in proportion to n (each row once an
    epoch), uniform, or to n^(1 / temperature) (arXiv 1910.10683, sec. 3.5.2), and in each case to `weight` (1 where left out) besides.
    loss_on: completion or all. See CorpusData for the other arguments.
    Raises UserError for no tasks, names and keys that are not allowed, and values out of range.
    """

    def __init__(
        self, tasks: Mapping[str, Any], mixing: str, temperature: float, template: PromptTemplate, tokenizer: Mapping[str, Any],
        seq_len: int, batch_size: int, val_fraction: float, loss_on: str, pack: bool, encoding_errors: str, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        if not tasks:
            raise UserError(
                f"data.tasks: {tasks}; give at least one task: data.tasks='{{NAME: {{path: FILE.json, val_path: OTHER.json}}}}'"
            )
        self.packed, self._template = pack, template
        self._mixing = choice("data.mixing", mixing, MIXING)
        if not temperature > 0:
            raise UserError(f"data.temperature: {temperature}; must be above 0 (1: proportional; the larger, the nearer to uniform)")
        self._temperature = temperature
        errors: Any = choice("data.encoding_errors", encoding_errors, ("strict", "replace"))
        loss_on, share = choice("data.loss_on", loss_on, LOSS_ON), fraction("data.val_fraction", val_fraction)
        self._tasks: list[TaskCorpus] = []
        for name, node in tasks.items():
            key, entry, held_out = _task(name, node)
            val = None if held_out is None else FileSet(f"{key}.val_path", held_out, errors, None)
            self._tasks.append(TaskCorpus(FileSet(f"{key}.path", entry, errors, None, val), val, template, loss_on, share))
        self.task_names = tuple(tasks)
        self.source = f"{len(tasks)} tasks: {', '.join(tasks)}"

    @property
    def chat_template(self) -> str:
        """As `render`, in Jinja."""
        return self._template.chat_template

    def _corpora(self) -> Sequence[Corpus]:
        return self._tasks

    def _stream_weights(self) -> list[float]:
        power = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / self._temperature}[self._mixing]
        return [(task.weight or 1.0) * rows.count**power for task, rows in zip(self._tasks, self._train_rows(), strict=True)]

    def held_out_questions(self) -> dict[str, Iterator[Question]]:
        """The held-out examples of each task, to ask a model by generation. Needs no `prepare`."""
        return {name: task.questions() for name, task in zip(self.task_names, self._tasks, strict=True)}

    def problems(self, split: str) -> list[tuple[str, str]]:
        """(prompt, solution) of every example of `split`, train or val, without the template. Needs no `prepare`."""
        held_out = choice("task.split", split, ("train", "val")) == "val"
        return [one for task in self._tasks for one in task.problems(held_out)]

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that ask the model to answer an instruction, the one message of the user. Raises UserError for anything else."""
        if len(messages) != 1 or messages[0].get("role") != "user":
            raise UserError("a run on data=multitask knows instructions, not conversations; give one message of the user, or a prompt")
        return [self.tokenizer.eot_id, *self.tokenizer.encode(self._template.render(messages[0]["content"]))]


def _task(name: Any, node: Any) -> tuple[str, Entry, Entry | None]:
    """(key, what is trained on, what is held out) of an entry of `data.tasks`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"data.tasks: {name!r} is no name of a task; letters, digits and _ . - are allowed, but no number alone")
    key = f"data.tasks.{name}"
    node = {"path": node} if isinstance(node, str) else node
    if not isinstance(node, Mapping):
        raise UserError(f"{key}: {node!r}; give {{path: FILE, val_path: OTHER}}")
    for word in node:
        if word not in KEYS:
            raise UserError(f"{key}.{word}: unknown key; allowed are {', '.join(KEYS)}{did_you_mean(word, KEYS)}")
    entries = {}
    for word in ("path", "val_path"):
        path = node.get(word)
        if path is None and word == "val_path":
            continue
        if not path or not (isinstance(path, str) or (isinstance(path, Sequence) and all(isinstance(one, str) for one in path))):
            raise UserError(f"{key}.{word}: {path!r}; give a file, folder, glob or hub:NAME, or a list of them")
        (entries[word],) = parse_entries(f"{key}.{word}", path)
    weight = node.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
        raise UserError(f"{key}.weight: {weight!r}; must be a number above 0")
    return key, Entry(entries["path"].paths, weight), entries.get("val_path")
