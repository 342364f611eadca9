"""An `Exam` without a run: bytes as tokens, a text of words, and an engine that answers from a table or is a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from components.contracts import Completion, SamplingParams
from components.data.tokenizers import bytes_tokenizer
from components.evals.base import Exam

TOKENIZER = bytes_tokenizer()
TEXT = list(b"It was the best of times, it was the worst of times. " * 400)


class Scripted:
    """Answers what `reply(prompt text)` says, and finds every token of a sequence equally likely among 320."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.reply = reply

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        texts = [self.reply(TOKENIZER.decode(prompt)) for prompt in prompts]
        return [Completion(TOKENIZER.encode(text), text, [], "stop") for text in texts]

    def score(self, sequences: list[list[int]]) -> list[torch.Tensor]:
        return [torch.full((len(ids) - 1,), -torch.tensor(320.0).log().item()) for ids in sequences]


def exam(engine: Any = None, trained_length: int = 256, text: list[int] = TEXT, source: Any = None, **changes: Any) -> Exam:
    """text: what the run's data hold; source: a function in its place."""

    def complete(prompts: list[list[int]], tokens: int, stop: Sequence[str]) -> Iterator[tuple[int, Completion]]:
        params = SamplingParams(max_new_tokens=tokens, temperature=0.0, stop=tuple(stop))
        return reversed(list(enumerate(engine.generate(prompts, params))))  # not in order: whoever is finished first

    parts: dict[str, Any] = {
        "engine": engine, "tokenizer": TOKENIZER, "trained_length": trained_length, "limit": None, "frame": ([TOKENIZER.eot_id], []),
        "render": lambda said: [TOKENIZER.eot_id, *TOKENIZER.encode(said)],
        "text": source or (lambda least, most, key: text[:most]), "complete": complete, "another": None,
        "progress": lambda done, total, what: None,
    }  # fmt: skip
    return Exam(**{**parts, **changes})
