"""An engine that says what a function tells it to, for tests of what goes round an engine. One byte is one token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from components.contracts import Completion, SamplingParams
from components.decoding.rounds import Query, Said, Setting
from framework.build import build, compose

Reply = Callable[[str, SamplingParams], str | Completion]


class Scripted:
    """`reply` makes a completion of a prompt's text and its parameters. width: calls at once; those of a batch end in reverse order."""

    def __init__(self, reply: Reply, width: int = 16, context_length: int | None = None) -> None:
        self.reply, self.width, self.context_length = reply, width, context_length
        self.rounds: list[list[tuple[str, SamplingParams]]] = []

    def completions(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Iterator[tuple[int, Completion]]:
        calls = [(bytes(prompt).decode(), one) for prompt, one in zip(prompts, params, strict=True)]
        self.rounds.append(calls)
        for first in range(0, len(calls), self.width):
            for index in reversed(range(first, min(first + self.width, len(calls)))):
                yield index, as_completion(self.reply(*calls[index]))


def as_completion(said: str | Completion) -> Completion:
    if isinstance(said, Completion):
        return said
    return Completion(list(said.encode()), said, [-1.0] * len(said.encode()), "stop")


def render(said: Said) -> list[int]:
    """Bytes of a text, or of the lines of a conversation."""
    return list((said if isinstance(said, str) else "".join(f"{turn['role']}: {turn['content']}\n" for turn in said)).encode())


def setting(limit: int | None = None, seed: int = 1, max_new_tokens: int = 64) -> Setting:
    return Setting(
        seed, max_new_tokens, limit, lambda said: len(render(said)), lambda text: list(text.encode()),
        lambda ids: bytes(ids).decode(errors="replace"),
    )  # fmt: skip


@cache
def composed(name: str) -> Any:
    return compose("generate", [f"decode={name}"]).decode


def option(name: str, **changes: Any) -> Any:
    """The option decode=NAME as its YAML has it, with other values; a__b is the key a.b."""
    node = copy.deepcopy(composed(name))
    for key, value in changes.items():
        OmegaConf.update(node, key.replace("__", "."), value)
    return build(node)


def queries(*said: Said) -> list[Query]:
    return [Query(f"q{i}", one) for i, one in enumerate(said)]
