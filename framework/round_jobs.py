"""Large generation jobs whose answers take several calls each (framework/decoding.py): every call is a row that survives a crash.

A second store, `calls` in the folder of the answers, holds the calls. Started again, the rounds of a query are played through once more:
calls that are kept are answered from there, by their names, and the engine gets the others alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from components.contracts import Completion, Engine, Request, Result, Usage
from components.decoding.rounds import Answer, Method, Query, Setting
from components.store import Meter, Store, request_id, stored
from framework.decoding import Cost, Open, Render, Trace, seeded
from framework.jobs import SKIPPED, UNANSWERED, Job, carry_out, stop_signals, twins, why_unusable

CALLS = "calls"  # folder of their store


@dataclass(kw_only=True)
class RoundJob(Job):
    """A job of queries; `requests` are made as their rounds come. At most `window` queries are open at a time, so few calls are.

    queries: (index, query) in input order; the id of a query is that of its row. row_of: what is stored of a query and its record.
    """

    calls: Store
    queries: Iterable[tuple[int, Query]]
    method: Method
    render: Render
    setting: Setting
    engine: Engine
    cost: Cost | None
    row_of: Callable[[Query, dict[str, Any]], Mapping[str, Any]]
    window: int
    reused: int = 0  # calls that were not asked again
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows of calls of queries without an answer
    open: dict[str, Open] = field(default_factory=dict)
    ready: deque[tuple[str, Open, int]] = field(default_factory=deque)  # name of a call, its query, its place in the round
    asked: dict[str, tuple[Open, int]] = field(default_factory=dict)
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.kept = {name: row for name, _, row in self.calls.rows() if row["query"] not in self.store}

    @property
    def stores(self) -> tuple[Store, ...]:
        return (self.calls, self.store)

    async def feed(self) -> AsyncIterator[Request]:
        """Calls that no row answers, those of open queries first, until a signal comes."""
        source = enumerate(self.queries)
        while self.signals.received is None:
            if self.ready:
                name, one, place = self.ready.popleft()
                if one.query.id in self.open:  # else another of its calls failed
                    request = Request(name, one.prompts[place], seeded(self.engine, one.asks[place].params))
                    self.in_flight[name], self.asked[name] = (one.index, request), (one, place)
                    yield request
            elif len(self.open) < self.window and (following := next(source, None)) is not None:
                number, (index, query) = following
                self.begin(index, query)
                if number % SKIPPED == 0:
                    await asyncio.sleep(0)
            elif self.open:
                self.more.clear()
                await self.more.wait()
            else:
                return

    def begin(self, index: int, query: Query) -> None:
        """Open a query, unless it is done or given up."""
        if query.id in self.open:
            raise twins(self.open[str(query.id)].index, index)
        if self.wants(str(query.id)):
            rounds = self.method.answer(query, self.setting)
            one = self.open[str(query.id)] = Open(index, query, rounds, next(rounds))
            self.go_on(one.ready(self.render))

    def go_on(self, one: Open) -> None:
        """Answer the calls of a round from what is kept, and of the next ones while all are; the others wait to be asked."""
        while True:
            before = one.round
            for place, name in enumerate(names(one)):
                if (row := self.kept.pop(name, None)) is None:
                    self.ready.append((name, one, place))
                    continue
                self.reused += 1
                if (answer := one.take(place, *spoken(row))) is not None:
                    self.close(one, answer)
                    return
            if one.round == before:
                return
            one.ready(self.render)

    def take(self, result: Result) -> None:
        """Keep a call, and go on with its query. One that failed ends its query for this time."""
        index, request = self.in_flight.pop(result.request_id, (-1, None))
        if request is None:
            self.meter.errors["unasked"] += 1
            return
        one, place = self.asked.pop(request.id)
        error = why_unusable(request, result)
        if error is not None:
            self.give_up(one, error)
            return
        row = stored(call_row(one, place, result))  # what a later start would read is what this one goes on with
        self.calls.append(request.id, index, row)
        if one.query.id not in self.open:
            return
        before = one.round
        if (answer := one.take(place, *spoken(row))) is not None:
            self.close(one, answer)
        elif one.round > before:
            self.go_on(one.ready(self.render))
        self.more.set()

    def close(self, one: Open, answer: Answer) -> None:
        """Keep an answer."""
        final = answer.completion
        if final.finish_reason in ("error", "abort"):
            self.give_up(one, f"{final.finish_reason}: {final.stop_reason}")
            return
        record = Trace(one.index, one.query, answer, one.calls).record(self.cost)
        self.store.append(str(one.query.id), one.index, self.row_of(one.query, record))
        self.meter.answered(record["usage"].get("prompt_tokens", 0), record["usage"]["completion_tokens"], None)
        del self.open[str(one.query.id)]

    def give_up(self, one: Open, error: str) -> None:
        """Note why a query has no answer this time; its other calls stay."""
        if self.open.pop(str(one.query.id), None) is not None:
            self.fail(str(one.query.id), one.index, error)
        self.more.set()

    def unanswered(self) -> None:
        for one, _ in self.asked.values():
            self.give_up(one, UNANSWERED)
        self.in_flight.clear()
        self.asked.clear()


def names(one: Open) -> list[str]:
    """Ids of the calls of a query's round: what is asked, with which parameters, for which query, and when in its rounds."""
    return [
        request_id(query=one.query.id, round=one.round, place=place, role=ask.role, said=ask.said, params=dataclasses.asdict(ask.params))
        for place, ask in enumerate(one.asks)
    ]


def call_row(one: Open, place: int, result: Result) -> dict[str, Any]:
    """What is kept of a call: all that a method or a record may want to know of it."""
    (completion,) = result.completions
    ask = one.asks[place]
    return {
        "query": one.query.id, "round": one.round, "role": ask.role, "said": None if ask.said == one.query.said else ask.said,
        "prompt_tokens": result.usage.prompt, "completion_tokens": result.usage.completion, "completion": dataclasses.asdict(completion),
    }  # fmt: skip


def spoken(row: Mapping[str, Any]) -> tuple[Completion, Usage]:
    """The completion of a row, and its tokens."""
    found = dict(row["completion"])
    if found["alternatives"] is not None:  # JSON has no numbers for keys
        found["alternatives"] = [{int(token): value for token, value in step.items()} for step in found["alternatives"]]
    return Completion(**found), Usage(row["prompt_tokens"], row["completion_tokens"])


def run_round_job(
    queries: Iterable[tuple[int, Query]],
    method: Method,
    engine: Engine,
    answers: Store,
    calls: Store,
    *,
    render: Render,
    setting: Setting,
    cost: Cost | None,
    row: Callable[[Query, dict[str, Any]], Mapping[str, Any]],
    total: int,
    concurrency: int,
    max_attempts: int,
    grace_s: float,
    progress_s: float,
) -> tuple[dict[str, Any], int]:
    """`run_job` for queries that are answered in several calls; returns the last record, and how many calls were reused.

    An answer depends on its query alone, so that the final files are the same bytes however often the job was stopped, and wherever:
    between two rounds of a query too. row: what is stored of a query and its record (see `Trace.record`); the rest as in `run_job`.

    Raises: as `run_job`.
    """
    signals = stop_signals(grace_s)
    job = RoundJob(
        answers, Meter(total, len(answers)), signals, grace_s, max_attempts, calls=calls, queries=queries, method=method, render=render,
        setting=setting, engine=engine, cost=cost, row_of=row,
        window=getattr(engine, "window", concurrency),  # open queries
    )  # fmt: skip
    return carry_out(job, engine, concurrency, progress_s), job.reused
