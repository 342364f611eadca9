"""Prompt ids made as a run's documents are: text after a document start, or the turns of a conversation."""

from __future__ import annotations

from typing import Any

import torch

from components.contracts import IGNORE, Data, Tokenizer, UserError

DEFAULT_PROMPT_TOKENS = 16


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
