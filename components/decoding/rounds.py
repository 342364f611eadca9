"""What options of the group `decode` share that ask a model several times for one answer: they yield rounds of calls, a driver makes them.

A method has `answer(query, setting)`, a generator: it yields the calls of a round, gets their completions back in the same order, and
returns an `Answer`. It asks for nothing in another way, so that whoever drives it decides what runs together, counts, and keeps a record.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np

from components.contracts import Completion, Message, SamplingParams, UserError
from components.data.errors import at_least

Said = str | list[Message]  # a text, or a conversation
FAILED = ("error", "abort")  # finish reasons of what is no answer


@dataclass(frozen=True)
class Query:
    """What is asked. id: names it for the random numbers, so it is the same for every method; other: another query, for a control."""

    id: str | int
    said: Said
    other: Query | None = None

    @property
    def text(self) -> str:
        """The words of the last turn."""
        return self.said if isinstance(self.said, str) else self.said[-1]["content"]

    def reworded(self, text: str) -> Said:
        """The same conversation with other words in its last turn."""
        return text if isinstance(self.said, str) else [*self.said[:-1], {**self.said[-1], "content": text}]


@dataclass(frozen=True)
class Ask:
    """One call of a model. role: what it is for, such as sample or aggregate."""

    role: str
    said: Said
    params: SamplingParams


@dataclass(frozen=True)
class Setting:
    """What a method may know of where it runs.

    seed: of the whole run. max_new_tokens: of each call. limit: most tokens of prompt and answer, None for no end. count: tokens of a
    prompt as the engine gets it. encode, decode: of the engine's tokenizer; bytes where it is not known, which are never fewer.
    """

    seed: int
    max_new_tokens: int
    limit: int | None
    count: Callable[[Said], int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    def tail(self, text: str, tokens: int) -> str:
        """The end of a text, in so many tokens; a character whose first bytes are cut off is left out."""
        ids = self.encode(text)
        return text if len(ids) <= tokens else self.decode(ids[len(ids) - tokens :]).lstrip("\ufffd")


@dataclass
class Answer:
    """What a method comes to. chosen: which candidate it is, None for a new one. notes: what a reader must know of how, as JSON."""

    completion: Completion
    candidates: list[Completion] = field(default_factory=list)
    chosen: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Traced(Completion):
    """A final answer together with the candidates that it was made from and a record of all calls, as JSON."""

    candidates: list[Completion] = field(default_factory=list)
    trace: dict[str, Any] = field(default_factory=dict)


Rounds = Generator[list[Ask], list[Completion], Answer]


class Method(Protocol):
    """An option of the group `decode` that asks in rounds."""

    def answer(self, query: Query, setting: Setting) -> Rounds: ...


class Sampler(Protocol):
    """An option of the group `decode` that answers in one call."""

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams: ...


class Candidates:
    """Base of methods that begin with n samples: the same ones for every method at the same seed, and for n + 1 the same first n."""

    def __init__(self, n: int, sampler: Sampler, least: int = 1) -> None:
        self.n, self.sampler, self.least = at_least("decode.n", n, least), sampler, least

    def with_samples(self, n: int) -> Self:
        """The same method with n samples, n >= `least`; they begin with those of fewer."""
        other = copy.copy(self)
        other.n = n
        return other

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams:
        """How a candidate is drawn."""
        return self.sampler.params(max_new_tokens, seed)

    def sampled(self, query: Query, setting: Setting, indices: Sequence[int] | None = None) -> list[Ask]:
        """Calls for the candidates with these indices, None for the n of them."""
        seeds = [seed_of(setting.seed, query.id, "sample", i) for i in (range(self.n) if indices is None else indices)]
        return [Ask("sample", query.said, self.params(setting.max_new_tokens, seed)) for seed in seeds]


def seed_of(seed: int, query: str | int, role: str, index: int = 0) -> int:
    """The seed of a call: 63 bits that depend on the run's seed, the query, what the call is for, and which of these it is, and on no more.

    >>> seed_of(1, "a", "sample", 0) == seed_of(1, "a", "sample", 0) != seed_of(1, "a", "sample", 1)
    True
    """
    said = json.dumps([seed, query, role, index]).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little") >> 1


def arranged(count: int, order: str, setting: Setting, query: Query) -> list[int]:
    """In which order candidates are shown: as they came (given), or a permutation of the query's own (shuffle)."""
    if order == "given":
        return list(range(count))
    return np.random.default_rng(seed_of(setting.seed, query.id, "order")).permutation(count).tolist()


def no_room(notes: dict[str, Any], candidates: list[Completion]) -> Answer:
    """The answer where the query alone leaves no room for what should follow it: none, said as an error."""
    return Answer(Completion([], "", [], "error", stop_reason="no room for the candidates in the context"), candidates, None, notes)


def described(candidates: Sequence[Completion]) -> dict[str, Any]:
    """Notes on candidates: how many are different, and which are empty, cut off at max_new_tokens, or failed."""
    return {
        "n_distinct": len({one.text for one in candidates}),
        "empty": [i for i, one in enumerate(candidates) if not one.text.strip()],
        "cut_off": [i for i, one in enumerate(candidates) if one.finish_reason == "length"],
        "failed": [i for i, one in enumerate(candidates) if one.finish_reason in FAILED],
    }


def copied(completion: Completion, trace: dict[str, Any], candidates: list[Completion]) -> Traced:
    """A completion with its record."""
    return Traced(**{**vars(completion), "candidates": candidates, "trace": trace})


def each_with_other(queries: Iterable[Query]) -> Iterator[Query]:
    """Each query with the next one that says something else as its `other`, the first of them after the last; None where there is none."""
    first: Query | None = None
    second: Query | None = None  # the first that says something else than `first`
    waiting: list[Query] = []  # they say the same
    for query in queries:
        first = first or query
        second = second or (query if query.said != first.said else None)
        if waiting and waiting[0].said != query.said:
            yield from (replace(one, other=query) for one in waiting)
            waiting = []
        waiting.append(query)
    for one in waiting:
        yield replace(one, other=first if first is not None and first.said != one.said else second)


def with_others(queries: Iterable[Query]) -> list[Query]:
    """The same, all at once."""
    return list(each_with_other(queries))


def other_of(query: Query) -> Query:
    """Raises UserError where there is none."""
    if query.other is None:
        raise UserError("decode.control: foreign shows candidates of another query, and all queries are the same; give at least two")
    return query.other
