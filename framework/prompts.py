"""Prompts: files of them, and their ids made as a run's documents are: text after a document start, or the turns of a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.contracts import IGNORE, Data, Tokenizer, UserError

DEFAULT_PROMPT_TOKENS = 16


@dataclass
class Request:
    """One prompt of a file. id: the file's own, or its place among the prompts from 0. given: a text or messages. where: file and line."""

    id: str | int
    given: str | list[dict[str, str]]
    where: str


class Renderer:
    """Turns what a user gives into prompt ids. Data that render conversations get every text as the user's turn."""

    def __init__(self, tokenizer: Tokenizer, data: Any = None) -> None:
        """data: the run's data option, prepared or not; None where it does not render conversations."""
        self._tokenizer = tokenizer
        self.chat = hasattr(data, "render")
        self._data = data
        if self.chat:
            data.tokenizer = tokenizer

    def __call__(self, given: str | list[dict[str, str]], where: str = "prompt") -> list[int]:
        """Ids of a text, or of messages {role, content}. Raises UserError, beginning with `where`, for what the run cannot read."""
        if not self.chat:
            if isinstance(given, str):
                return [self._tokenizer.eot_id, *self._tokenizer.encode(given)]
            raise UserError(f"{where}: 'messages' need a run that was trained on conversations (data=chat); give a 'prompt' instead")
        try:
            return self._data.render([{"role": "user", "content": given}] if isinstance(given, str) else given)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def held_out_prompt(data: Data, task: str | None = None) -> list[int]:
    """The beginning of the held-out data; of rows that do not count from their start (conversations, probes), all before what counts.

    task: of data with tasks, whose rows.
    """
    batches = data.evaluations().get(task) if task is not None else None
    batch = next(iter(batches or data.val_batches()))
    counts = batch.labels[0] != IGNORE if batch.labels is not None else torch.ones(1)
    first = int(counts.nonzero()[0]) if counts.any() else 0
    return batch.input_ids[0, : first + 1 if first else DEFAULT_PROMPT_TOKENS].tolist()


def read_requests(path: Path) -> list[Request]:
    """Read a JSONL file of {"prompt": text} or {"messages": [{"role", "content"}, ...]}, each with an optional "id".

    Raises:
        UserError: naming the file, the line, and what was found there.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {bad} is not UTF-8 (byte {error.object[error.start]:#04x}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"prompts: {str(path)!r} cannot be read ({error.strerror or error}); give a JSONL file") from error
    requests: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            requests.append(parse_request(line, f"{path}: line {number}", len(requests)))
    if not requests:
        raise UserError(f'{path}: empty; give one JSON object a line, such as {{"prompt": "Once"}}')
    return requests


def parse_request(line: str, where: str, index: int) -> Request:
    """One line of a prompts file."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; give {{"prompt": TEXT}}')
    if ("prompt" in row) == ("messages" in row):
        columns = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where} needs either 'prompt' or 'messages'; its columns are {columns}")
    given = row["prompt"] if "prompt" in row else row["messages"]
    if "prompt" in row and not isinstance(given, str):
        raise UserError(f"{where}: 'prompt' is {given!r}, not text")
    if "messages" in row and not is_conversation(given):
        raise UserError(f"{where}: 'messages' is not a list of {{'role': TEXT, 'content': TEXT}}")
    name = row.get("id", index)
    return Request(name if isinstance(name, str | int) else json.dumps(name), given, where)


def is_conversation(value: Any) -> bool:
    """Is this a list of at least one {role, content}, both text?"""
    turns = value if isinstance(value, list) and value else [None]
    return all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns)
