"""Large generation jobs: requests that a store lacks go to an engine, answers to the store, whatever stops the process in between."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from components.contracts import Diagnostics, Engine, Request, Result, UserError
from components.store import Meter, Store
from framework.engines.fitting import TOO_LONG, figures
from framework.runtime import Interrupted, StopSignals

TICK_SECONDS = 0.1  # how often signals, the clock of the store and the record are looked at
SKIPPED = 1000  # finished requests passed over before others get their turn
UNANSWERED = "unanswered: the engine ended without a word on this request"


@dataclass
class Job:
    """The state of a job whose requests are known from the start. in_flight: index and request by id, at most a few more than the window.

    requests: (index, request) in input order. row: what is stored of an answer.
    """

    store: Store
    meter: Meter
    signals: StopSignals
    grace_s: float
    max_attempts: int
    requests: Iterable[tuple[int, Request]] = ()
    row: Callable[[Request, Result], Mapping[str, Any]] = field(default_factory=lambda: answer_row)
    in_flight: dict[str, tuple[int, Request]] = field(default_factory=dict)
    given_up: int = 0

    async def feed(self) -> AsyncIterator[Request]:
        """Requests that are not done and have attempts left, until a signal comes."""
        for number, (index, request) in enumerate(self.requests):
            if self.signals.received is not None:
                return
            if number % SKIPPED == 0:
                await asyncio.sleep(0)
            if request.id in self.in_flight:
                raise twins(self.in_flight[request.id][0], index)
            if not self.wants(request.id):
                continue
            self.in_flight[request.id] = (index, request)
            yield request

    def wants(self, identity: str) -> bool:
        """Whether an answer is still to be had; one with no attempts left is counted."""
        if identity in self.store:
            return False
        if self.store.attempts(identity) >= self.max_attempts:
            self.given_up += 1
            return False
        return True

    def take(self, result: Result) -> None:
        """Put an answer into the store, or note why there is none. An answer that nobody waits for is counted and left."""
        index, request = self.in_flight.pop(result.request_id, (-1, None))
        if request is None:
            self.meter.errors["unasked"] += 1
            return
        error = why_unusable(request, result)
        if error is not None:
            self.fail(request.id, index, error)
            return
        self.store.append(request.id, index, self.row(request, result))
        self.meter.answered(result.usage.prompt, result.usage.completion, result.latency.get("total"))

    def fail(self, identity: str, index: int, error: str) -> None:
        """Note an error. A prompt that is too long costs no attempt: it is the setting that has to change."""
        kind = error.split(":")[0]
        self.meter.errors[kind] += 1
        self.store.error(identity, index, error, self.store.attempts(identity) + (kind != TOO_LONG))

    def unanswered(self) -> None:
        """Note those in flight as failed: the engine has ended."""
        for identity, (index, _) in self.in_flight.items():
            self.fail(identity, index, UNANSWERED)
        self.in_flight.clear()

    @property
    def stores(self) -> tuple[Store, ...]:
        """All that is written."""
        return (self.store,)

    def record(self, engine: Engine) -> dict[str, Any]:
        """The record of now."""
        self.meter.in_flight = len(self.in_flight)
        if isinstance(engine, Diagnostics):
            self.meter.retries = int(engine.diagnostics().get("retries", 0))
        return {**self.meter.record(), "given_up": self.given_up, "failed": self.store.failed, **figures(engine)}


def say(line: str) -> None:
    """For the reader, on stderr."""
    print(line, file=sys.stderr, flush=True)


def twins(first: int, second: int) -> UserError:
    """Two requests have one name."""
    return UserError(f"prompts: requests {first} and {second} (from 0) are the same; give each an id of its own (replica=...)")


def why_unusable(request: Request, result: Result) -> str | None:
    """'kind: message' when a result is no answer to the request, else None."""
    if result.error is not None:
        return result.error
    if len(result.completions) != request.n:
        return f"wrong_n: {len(result.completions)} completions instead of {request.n}"
    bad = [one for one in result.completions if one.finish_reason in ("error", "abort")]
    return f"{bad[0].finish_reason}: {bad[0].stop_reason}" if bad else None


def answer_row(request: Request, result: Result) -> dict[str, Any]:
    """A row that depends on the request and its answer alone, not on when or how it came: prompt, text, finish_reason, tokens, logprob.

    prompt_cut: tokens that the prompt lost on its left; one that was passed over has the finish_reason skipped.
    With n = 1 plain values, otherwise text, finish_reason, token_ids and logprob are lists of n.
    """
    found: dict[str, list[Any]] = {
        "text": [one.text for one in result.completions],
        "finish_reason": [one.finish_reason for one in result.completions],
        "token_ids": [one.token_ids for one in result.completions],
        "logprob": [sum(one.logprobs) if one.logprobs else None for one in result.completions],
    }
    values = {name: each[0] if request.n == 1 else each for name, each in found.items()}
    cut = max((one.prompt_cut for one in result.completions), default=0)
    tokens = {"prompt_tokens": result.usage.prompt, "completion_tokens": result.usage.completion, "prompt_cut": cut}
    return {"prompt": request.prompt, **values, **tokens}


def run_job(
    requests: Iterable[tuple[int, Request]],
    engine: Engine,
    store: Store,
    *,
    concurrency: int,
    max_attempts: int,
    grace_s: float,
    progress_s: float,
    row: Callable[[Request, Result], Mapping[str, Any]] = answer_row,
    report: Callable[[dict[str, Any]], None] | None = None,
    total: int | None = None,
    before: int | None = None,
) -> dict[str, Any]:
    """Ask the engine everything that the store lacks; returns the last record of progress.json (see Meter.record).

    requests: (index, request) in input order, read as there is room; ids are those of `request_id`. concurrency: requests on their way at
    once. max_attempts: failures of a request over all runs, after which it is given up. grace_s: seconds that a signal leaves for what is
    asked already. progress_s: seconds between records, which `report` gets too. row: what is stored of an answer; it must not depend on
    time, or a killed job ends in other bytes. total: requests, where `requests` has no length. before: how many of them are done, where
    the store has rows of others too.

    Raises:
        UserError: the engine gave up, or answers cannot be saved.
        Interrupted: SIGINT or SIGTERM; what was answered is saved.
    """
    if total is None and isinstance(requests, Sized):
        total = len(requests)
    job = Job(store, Meter(total, len(store) if before is None else before), stop_signals(grace_s), grace_s, max_attempts, requests, row)
    return carry_out(job, engine, concurrency, progress_s, report)


def stop_signals(grace_s: float) -> StopSignals:
    """What listens to SIGINT and SIGTERM, and says what happens next."""
    return StopSignals(f"waiting at most {grace_s:g} s for what is asked, then saving")


def carry_out(
    job: Job, engine: Engine, concurrency: int, progress_s: float, report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run a job to its end, or to a signal; see `run_job`."""
    with job.signals.guarded(), Shown(job, engine, progress_s, report) as shown:
        if threading.current_thread() is threading.main_thread():
            job.signals.install()
        try:
            asyncio.run(drive(job, engine, concurrency, shown))
        finally:
            for store in job.stores:
                if not store.broken:
                    store.commit()
        record = shown.write()
    if job.signals.received is not None:
        store, total = job.store, job.meter.total
        of = "" if total is None else f" of {total:,}"
        raise Interrupted(job.signals.received, f"stopped; {len(store):,}{of} answers are in {store.folder}; go on with the same command")
    return record


async def drive(job: Job, engine: Engine, concurrency: int, shown: Shown) -> None:
    """Pump results into the store until there are no more, or a signal came and its grace is over."""

    async def pump() -> None:
        async for result in engine.stream(job.feed(), concurrency=concurrency):
            job.take(result)

    task, deadline = asyncio.create_task(pump()), math.inf
    while not task.done():
        await asyncio.wait({task}, timeout=TICK_SECONDS)
        if task.done():
            break
        for store in job.stores:
            store.tick()
        shown.tick()
        if job.signals.received is not None:
            deadline = min(deadline, time.monotonic() + job.grace_s)
            if time.monotonic() >= deadline or not job.in_flight:
                task.cancel()
                break
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if job.signals.received is None:
        job.unanswered()


class Shown:
    """What a job says of itself: a bar on a terminal, and every `seconds` progress.json and `report`."""

    def __init__(self, job: Job, engine: Engine, seconds: float, report: Callable[[dict[str, Any]], None] | None) -> None:
        self.job, self.engine, self.seconds, self.report = job, engine, seconds, report
        self._next = time.monotonic()

    def __enter__(self) -> Shown:
        from framework.generate import progress_bar  # generate.py may hold tasks that run jobs

        self._bar = progress_bar(Console(stderr=True, highlight=False))
        self._bar.start()
        self._task = self._bar.add_task("answers", total=self.job.meter.total, completed=self.job.meter.before, rate="")
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def tick(self) -> None:
        """Move the bar, and write when it is time."""
        self._bar.update(self._task, completed=self.job.meter.before + self.job.meter.rows)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self.seconds
            self.write()

    def write(self) -> dict[str, Any]:
        """Make the record and hand it to progress.json, the bar and `report`. Raises UserError."""
        record = self.job.record(self.engine)
        self.job.store.progress(record)
        self._bar.update(self._task, rate=f"{record['rows_per_second']:.1f} a second, {sum(record['errors'].values())} errors")
        if self.report is not None:
            self.report(record)
        return record
