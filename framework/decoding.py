"""Drives options of the group `decode` that ask in rounds (components/decoding/rounds.py): all calls of a round together.

A record of each call is kept, and what an answer cost is counted here, the same way for all of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from components.contracts import Completion, Engine, Prompt, Request, Result, SamplingParams, Usage
from components.decoding.rounds import FAILED, Answer, Ask, Method, Query, Rounds, Said, Setting, Traced, copied, seed_of, with_others
from framework.engines.requests import RequestEngine, failed, row_seed

# Of the notes.
COUNTED = ("n_distinct", "unparsed", "unscored", "tied", "enough", "empty", "cut_off", "failed", "redrawn", "dropped_tokens")
Render = Callable[[Said], Prompt]
Cost = Callable[[int], float]  # FLOPs of a token in a row of so many


class OneCall:
    """A decoding of one call as one of rounds: its answer is the first sample that methods of several calls draw.

    params(max_new_tokens, seed): how it is drawn.
    """

    def __init__(self, params: Callable[[int, int], SamplingParams]) -> None:
        self.params = params

    def answer(self, query: Query, setting: Setting) -> Rounds:
        params = self.params(setting.max_new_tokens, seed_of(setting.seed, query.id, "sample", 0))
        (said,) = yield [Ask("sample", query.said, params)]
        return Answer(said, [said], 0, {})


class Stopped:
    """A decoding whose every call ends before the first of `stop` too, but for calls with a constraint, which says when they end."""

    def __init__(self, method: Method, stop: Sequence[str]) -> None:
        self.method, self.stop = method, tuple(stop)

    def answer(self, query: Query, setting: Setting) -> Rounds:
        rounds = self.method.answer(query, setting)
        asks = next(rounds)
        while True:
            found = yield [ask if ask.params.constraint is not None else self._ending(ask) for ask in asks]
            try:
                asks = rounds.send(found)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    def _ending(self, ask: Ask) -> Ask:
        return replace(ask, params=replace(ask.params, stop=tuple(dict.fromkeys((*ask.params.stop, *self.stop)))))


@dataclass
class Call:
    """One call and what came of it. prompt_tokens: None where nobody knows; shared: the prompt was read for another call of the round.

    tokens: of the completion.
    """

    round: int
    ask: Ask
    completion: Completion
    prompt_tokens: int | None
    shared: bool
    tokens: int

    def record(self, query: Query) -> dict[str, Any]:
        """JSON; `said` is None where it is the query as it stands."""
        params, completion = self.ask.params, self.completion
        return {
            "round": self.round, "role": self.ask.role, "said": None if self.ask.said == query.said else self.ask.said,
            "seed": params.seed, "temperature": params.temperature, "prompt_tokens": self.prompt_tokens, "shared": self.shared,
            "text": completion.text, "tokens": self.tokens, "finish_reason": completion.finish_reason,
            **({"error": completion.stop_reason} if completion.finish_reason in FAILED else {}),
            "prompt_cut": completion.prompt_cut,
        }  # fmt: skip


@dataclass
class Open:
    """A query on its way."""

    index: int
    query: Query
    rounds: Rounds
    asks: list[Ask]
    prompts: list[Prompt] = field(default_factory=list)
    found: dict[int, tuple[Completion, Usage]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    round: int = 1

    def ready(self, render: Render) -> Open:
        """The same, with the prompts of the round."""
        self.prompts = [render(ask.said) for ask in self.asks]
        return self

    def take(self, place: int, completion: Completion, usage: Usage) -> Answer | None:
        """Sort a completion in; the last one of a round starts the next. Returns the answer once there is one.

        usage: what the engine says of it, for prompts and completions that are no token ids.
        """
        self.found[place] = (completion, usage)
        if len(self.found) < len(self.asks):
            return None
        done = [self.found[i][0] for i in range(len(self.asks))]
        for i, (ask, prompt) in enumerate(zip(self.asks, self.prompts, strict=True)):
            own, ids = self.found[i][1], isinstance(prompt, list) and all(isinstance(part, int) for part in prompt)
            read, written = len(prompt) - done[i].prompt_cut if ids else own.prompt or None, len(done[i].token_ids) or own.completion
            if done[i].finish_reason == "skipped":  # nobody was asked
                continue
            self.calls.append(Call(self.round, ask, done[i], read, prompt in self.prompts[:i], written))
        if passed := next((one for one in done if one.finish_reason == "skipped"), None):
            return Answer(passed)
        try:
            self.asks, self.found, self.round = self.rounds.send(done), {}, self.round + 1
        except StopIteration as end:
            found: Answer = end.value
            return found
        return None


@dataclass(frozen=True)
class Trace:
    """A query, its answer, and all calls in their order."""

    index: int
    query: Query
    answer: Answer
    calls: list[Call]

    def usage(self, cost: Cost | None = None) -> dict[str, float]:
        """What the answer cost: see `usage_of`."""
        return usage_of(self.calls, cost)

    def record(self, cost: Cost | None = None) -> dict[str, Any]:
        """The whole of it as JSON."""
        completion = self.answer.completion
        return {
            "id": self.query.id, "said": self.query.said, "text": completion.text, "finish_reason": completion.finish_reason,
            "error": completion.stop_reason if completion.finish_reason in ("error", "skipped") else None, "chosen": self.answer.chosen,
            "prompt_cut": sum(call.completion.prompt_cut for call in self.calls),
            "candidates": [one.text for one in self.answer.candidates], "notes": self.answer.notes, "usage": self.usage(cost),
            "calls": [call.record(self.query) for call in self.calls],
        }  # fmt: skip


def usage_of(calls: Sequence[Call], cost: Cost | None = None) -> dict[str, float]:
    """calls, rounds, completion_tokens; prompt_tokens, shared_tokens of them, which need reading once for several calls of a round, and
    processed_tokens, read and written; flops: of the processed ones. What cannot be known is left out.

    cost: FLOPs of a token in a row of so many.
    """
    written = sum(call.tokens for call in calls)
    found = {"calls": len(calls), "rounds": max((call.round for call in calls), default=0), "completion_tokens": written}
    if all(call.prompt_tokens is not None for call in calls):
        read = [(call.prompt_tokens or 0, call.shared) for call in calls]
        shared = sum(tokens for tokens, again in read if again)
        total = sum(tokens for tokens, _ in read)
        found |= {"prompt_tokens": total, "shared_tokens": shared, "processed_tokens": total - shared + written}
        if cost is not None:
            own = [(0 if again else tokens, tokens, call.tokens) for (tokens, again), call in zip(read, calls, strict=True)]
            return {**found, "flops": math.fsum((fresh + said) * cost(tokens + said) for fresh, tokens, said in own if tokens + said)}
    return dict(found)


def run_queries(method: Method, queries: Iterable[Query], engine: Engine, render: Render, setting: Setting) -> Iterator[Trace]:
    """Answer all queries; traces come as they are finished, and depend on nothing of the other queries.

    All calls that wait are made together: first round 1 of every query, then round 2 of those that have one, and so on. An engine that asks
    a server starts a query's next round as soon as its own is over.
    """
    started = (Open(i, query, rounds, next(rounds)) for i, query in enumerate(queries) for rounds in [method.answer(query, setting)])
    waiting = [one.ready(render) for one in started]
    if getattr(engine, "by_request", False):
        yield from pipelined(waiting, cast(RequestEngine, engine), render)
        return
    while waiting:
        calls = [(one, place) for one in waiting for place in range(len(one.asks))]
        prompts, params = [one.prompts[place] for one, place in calls], [one.asks[place].params for one, place in calls]
        going = []
        for index, completion in completions(engine, prompts, params):
            one, place = calls[index]
            before = one.round
            if (answer := one.take(place, completion, Usage())) is not None:
                yield Trace(one.index, one.query, answer, one.calls)
            elif one.round > before:
                going.append(one.ready(render))
        waiting = sorted(going, key=lambda one: one.index)  # the order of a batch is that of the queries, whoever was first


def pipelined(waiting: Iterable[Open], engine: RequestEngine, render: Render) -> Iterator[Trace]:
    """`run_queries` through the engine's stream: one straggler holds up its own query only."""
    queue: asyncio.Queue[Request] = asyncio.Queue()
    going: dict[int, Open] = {}

    async def requests() -> AsyncIterator[Request]:
        while True:
            yield await queue.get()

    def push(one: Open) -> None:
        going[one.index] = one
        for place, ask in enumerate(one.asks):
            queue.put_nowait(Request(f"{one.index} {place}", one.prompts[place], seeded(engine, ask.params)))

    for one in waiting:
        push(one)
    loop, stream = asyncio.new_event_loop(), engine.stream(requests(), concurrency=engine.concurrency)
    try:
        while going:
            result: Result = loop.run_until_complete(anext(stream))  # type: ignore[arg-type]
            index, place = map(int, result.request_id.split())
            one, before = going[index], going[index].round
            completion = result.completions[0] if result.error is None else failed(result.error)
            if (answer := one.take(place, completion, result.usage)) is not None:
                yield Trace(index, one.query, answer, going.pop(index).calls)
            elif one.round > before:
                push(one.ready(render))
    finally:
        loop.run_until_complete(stream.aclose())  # type: ignore[attr-defined]
        loop.close()


def seeded(engine: object, params: SamplingParams) -> SamplingParams:
    """Parameters of one call in a stream, with the seed that `completions` would give it."""
    return replace(params, seed=row_seed(params.seed, 0)) if getattr(engine, "by_request", False) else params


def completions(engine: Engine, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[tuple[int, Completion]]:
    """(index, completion) as they are finished where the engine can say so, else all at the end."""
    yield from engine.completions(prompts, params) if hasattr(engine, "completions") else enumerate(engine.generate(prompts, params))


def query_ids(prompts: Sequence[Said | Sequence[int]]) -> list[str]:
    """Names that depend on what is asked alone, so that a query has the same samples in every run; equal ones are numbered."""
    names, seen = [], dict[str, int]()
    for prompt in prompts:
        name = hashlib.blake2b(repr(prompt).encode(), digest_size=8).hexdigest()
        names.append(name if name not in seen else f"{name}#{seen[name]}")
        seen[name] = seen.get(name, 0) + 1
    return names


def traced(
    method: Method, said: Sequence[Said], engine: Engine, render: Render, setting: Setting, cost: Cost | None
) -> Iterator[tuple[int, Traced]]:
    """As `Engine.completions` for texts or conversations, each completion with its candidates and its record."""
    queries = with_others([Query(name, one) for name, one in zip(query_ids(said), said, strict=True)])
    for trace in run_queries(method, queries, engine, render, setting):
        yield trace.index, copied(trace.answer.completion, trace.record(cost), trace.answer.candidates)


def setting_of(engine: Engine, tokenizer: Any, render: Render, params: SamplingParams) -> Setting:
    """What a method may know. tokenizer: None where only a server has it, and prompts are measured in bytes."""
    limit = getattr(engine, "context_length", None)
    if tokenizer is not None:
        return Setting(params.seed, params.max_new_tokens, limit, lambda said: len(render(said)), tokenizer.encode, tokenizer.decode)

    def encode(text: str) -> list[int]:
        return list(text.encode())

    def size(said: Said) -> int:
        return len(encode(said)) if isinstance(said, str) else sum(len(encode(turn["content"])) for turn in said)

    return Setting(params.seed, params.max_new_tokens, limit, size, encode, lambda ids: bytes(ids).decode(errors="replace"))


def totals(traces: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums over the records of all answers: decode/KEY of each key of `usage_of`, and of notes that are counts, flags or lists."""
    figures: dict[str, float] = {}
    for record in traces:
        notes = {key: counted(key, record["notes"][key]) for key in COUNTED if key in record["notes"]}
        for key, value in {**record["usage"], **notes}.items():
            figures[f"decode/{key}"] = figures.get(f"decode/{key}", 0.0) + value
    return figures


def counted(key: str, note: Any) -> float:
    """How much a note adds to a sum: itself, the places in it, or, of dropped tokens, all of them."""
    if not isinstance(note, list):
        return float(note)
    return sum(counted(key, one) for one in note) if key == "dropped_tokens" else float(len(note))
