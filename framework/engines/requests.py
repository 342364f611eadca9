"""What engines share that answer request by request: a bounded window, retries, a circuit breaker, and the calls that wait."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np

from components.contracts import CANCELLED, Completion, Decoding, OnPiece, Piece, Prompt, Request, Result, SamplingParams, Usage, UserError
from components.decoding.sampling import mix64

HOPELESS = ("http_401", "http_403", "http_404")  # the key or the model: the fault of no request in particular
THREAD = "engine-requests"  # of the loop behind calls that wait
SEED_BITS = 63  # servers take a signed 64-bit seed


class EngineError(Exception):
    """A request that got no answer. kind: a word for the counters; retry_after: seconds that the server asks to wait."""

    def __init__(self, kind: str, message: str, retryable: bool, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.retryable, self.retry_after = kind, retryable, retry_after


@dataclasses.dataclass(frozen=True)
class Retry:
    """Exponential waiting with full jitter: before attempt k + 1 uniform in 0 .. min(cap_s, base_s 2^k), or as long as the server says.

    max_attempts: of one request, the first included. base_s, cap_s: seconds.
    """

    max_attempts: int
    base_s: float
    cap_s: float

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.base_s < 0 or self.cap_s < 0:
            raise UserError(f"engine.retry: {dataclasses.asdict(self)}; max_attempts is at least 1, base_s and cap_s are not below 0")

    def wait(self, attempt: int, error: EngineError) -> float:
        """Seconds before the attempt after `attempt` (from 0)."""
        drawn = random.uniform(0, min(self.cap_s, self.base_s * 2**attempt))
        return max(drawn, error.retry_after or 0)


class Breaker:
    """Stops asking a server that fails nearly everything: pauses, and after `pauses` of them in a row without one answer gives up.

    window: attempts looked at; share: of them that may fail; pause_s: seconds.
    """

    def __init__(self, window: int, share: float, pause_s: float, pauses: int) -> None:
        if window < 1 or not 0 < share <= 1 or pause_s < 0 or pauses < 0:
            raise UserError("engine.breaker: window is at least 1, share above 0 and up to 1, pause_s and pauses not below 0")
        self.share, self.pause_s, self.pauses = share, pause_s, pauses
        self._kinds: deque[str] = deque(maxlen=window)  # '' for an answer
        self._until, self._paused = 0.0, 0

    def record(self, kind: str) -> None:
        """Count an attempt. Raises UserError, which ends the whole job, when nothing but failures came after the last pause too."""
        self._kinds.append(kind)
        if not kind:
            self._paused = 0
        failed = sum(map(bool, self._kinds))
        if len(self._kinds) < (self._kinds.maxlen or 0) or failed <= self.share * len(self._kinds):
            return
        kinds = ", ".join(f"{name} {count}" for name, count in Counter(filter(None, self._kinds)).most_common())
        if self._paused == self.pauses:
            raise UserError(
                f"engine: {failed} of the last {len(self._kinds)} requests failed ({kinds}), also after {self.pauses} pauses of "
                f"{self.pause_s:g} s; what is finished is kept: start the same command again when the server is well"
            )
        self._paused += 1
        self._until = time.monotonic() + self.pause_s
        self._kinds.clear()

    async def wait(self) -> None:
        """Until the pause is over."""
        while (left := self._until - time.monotonic()) > 0:
            await asyncio.sleep(left)


def seconds_to_wait(after: str) -> float | None:
    """What a header Retry-After says, a number of seconds or an HTTP date (RFC 9110, 10.2.3); None for nothing and for what is neither.

    >>> seconds_to_wait("1.5"), seconds_to_wait("Thu, 01 Jan 1970 00:00:00 GMT"), seconds_to_wait("soon")
    (1.5, 0.0, None)
    """
    if after.replace(".", "", 1).isdigit():
        return float(after)
    try:
        until = parsedate_to_datetime(after)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def told(result: Result, on_piece: OnPiece | None) -> Result:
    """The result, whose texts were said to `on_piece` first."""
    for index, completion in enumerate(result.completions if on_piece is not None else ()):
        if completion.text:
            piece = Piece(completion.text, completion.token_ids, completion.logprobs, completion.alternatives)
            on_piece(result.request_id, index, piece)  # type: ignore[misc]
    return result


def row_seed(seed: int, row: int) -> int:
    """The seed of row `row` of a call with one seed: 63 bits that depend on both alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = mix64(np.array([seed % 2**64], dtype=np.uint64) + golden)
        return int(mix64(state + (np.array([row], dtype=np.uint64) + np.uint64(1)) * golden)[0]) >> (64 - SEED_BITS)


def as_requests(prompts: Sequence[Prompt | None], params: Decoding, first: int = 0) -> list[Request]:
    """The prompts of a call as requests named 0, 1, ..., each with the seed that it has by the contract, where `first` is explained.

    None of a prompt that is None.
    """
    if isinstance(params, SamplingParams):
        each = [dataclasses.replace(params, seed=row_seed(params.seed, first + index)) for index in range(len(prompts))]
    else:
        each = [dataclasses.replace(one, seed=row_seed(one.seed, 0)) for one in params]
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(each)} sampling parameters")
    both = enumerate(zip(prompts, each, strict=True))
    return [Request(str(index), prompt, one) for index, (prompt, one) in both if prompt is not None]


def failed(error: str) -> Completion:
    """What stands for the completion of a request without an answer: nothing, and why."""
    return Completion([], "", [], "error", stop_reason=error)


async def each_of(requests: Iterable[Request]) -> AsyncIterator[Request]:
    """The same, for `stream`."""
    for request in requests:
        yield request


class RequestEngine:
    """Base of engines that answer one request at a time. A subclass has `ask`, which may run many times at once.

    concurrency: requests on their way at once in `generate`. retry, breaker: what is done about failures.
    """

    by_request = True  # each request is on its own: what follows from its answer need not wait for the others
    capabilities: frozenset[str] = frozenset()
    engine_id = model_id = tokenizer_id = ""
    context_length: int | None = None

    def __init__(self, concurrency: int, retry: Retry, breaker: Breaker) -> None:
        if concurrency < 1:
            raise UserError(f"engine.concurrency: {concurrency}; at least 1 is allowed")
        self.concurrency, self.retry, self.breaker = concurrency, retry, breaker
        self.counts: Counter[str] = Counter()  # retries, and errors by kind
        self._on_the_way: dict[str, asyncio.Task[Result]] = {}

    async def ask(self, request: Request) -> Result:
        """One attempt. Raises EngineError."""
        raise NotImplementedError

    async def recover(self, error: EngineError) -> None:
        """Called before a request is tried again."""

    async def begin(self) -> None:
        """Called in the loop before the first request."""

    async def end(self) -> None:
        """Called in the loop after the last one."""

    async def stream(self, requests: AsyncIterable[Request], *, concurrency: int, on_piece: OnPiece | None = None) -> AsyncIterator[Result]:
        """See the contract. Raises UserError when the breaker gives up; requests are read as there is room for them."""
        await self.begin()
        source, running = aiter(requests), set[asyncio.Task[Any]]()
        reading: asyncio.Task[Any] | None = asyncio.ensure_future(anext(source, None))  # type: ignore[arg-type]
        try:
            while running or reading is not None:
                waiting = running | ({reading} if reading is not None and len(running) < concurrency else set())
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {reading}:
                    running.discard(task)
                    yield told(task.result(), on_piece)
                if reading in done:
                    request = reading.result()  # type: ignore[union-attr]
                    if request is not None:
                        running.add(asyncio.create_task(self._cancellable(request)))
                    reading = asyncio.ensure_future(anext(source, None)) if request is not None else None  # type: ignore[arg-type]
        finally:
            for task in (*running, *([reading] if reading is not None else [])):
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self.end()

    def cancel(self, request: str) -> None:
        """See the contract; the connection is closed, which is how a server learns of it. Call it in the loop of the stream."""
        if (task := self._on_the_way.get(request)) is not None:
            task.cancel()

    async def _cancellable(self, request: Request) -> Result:
        """The answer, or the error CANCELLED; where the stream itself ends, the end."""
        began = time.monotonic()
        task = self._on_the_way[request.id] = asyncio.ensure_future(self._answer(request))
        try:
            await asyncio.wait({task})
            if task.cancelled():
                return Result(request.id, [], Usage(), {"total": time.monotonic() - began}, self.engine_id, CANCELLED)
            return task.result()
        finally:
            del self._on_the_way[request.id]
            task.cancel()

    async def _answer(self, request: Request) -> Result:
        """Attempts until there is an answer, an error that no attempt mends, or no attempt left."""
        began = time.monotonic()
        for attempt in range(self.retry.max_attempts):
            await self.breaker.wait()
            sent = time.monotonic()
            try:
                result = await self.ask(request)
            except EngineError as error:
                self.counts[error.kind] += 1
                if error.kind in HOPELESS:
                    raise UserError(f"engine: {error}; every request would end so. What is finished is kept") from error
                if not error.retryable:
                    self.breaker.record("")  # the server is well
                    return self._failure(request, error, began)
                self.breaker.record(error.kind)
                if attempt + 1 == self.retry.max_attempts:
                    return self._failure(request, error, began)
                self.counts["retries"] += 1
                await asyncio.sleep(self.retry.wait(attempt, error))
                await self.recover(error)
                continue
            self.breaker.record("")
            result.latency = {"queued": sent - began, **result.latency, "total": time.monotonic() - began}
            self.counts["tokens"] += result.usage.completion
            return result
        raise AssertionError("an attempt returns or raises")

    def _failure(self, request: Request, error: EngineError, began: float) -> Result:
        return Result(request.id, [], Usage(), {"total": time.monotonic() - began}, self.engine_id, f"{error.kind}: {error}")

    def completions(self, prompts: Sequence[Prompt | None], params: Decoding, first: int = 0) -> Iterator[tuple[int, Completion]]:
        """See the contract. An answer that could not be had has the finish_reason error, and stop_reason says why."""
        for result in self._results(as_requests(prompts, params, first)):
            yield int(result.request_id), result.completions[0] if result.error is None else failed(result.error)

    def generate(self, prompts: Sequence[Prompt], params: Decoding) -> list[Completion]:
        """See the contract."""
        done = dict(self.completions(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def diagnostics(self) -> dict[str, float]:
        """Tokens generated, retries, and errors by kind."""
        return {"tokens": 0.0, **{key: float(count) for key, count in self.counts.items()}}

    def _results(self, requests: list[Request]) -> Iterator[Result]:
        """`stream` from a thread with a loop of its own. Leaving early cancels what is on its way."""
        found: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()

        async def pump() -> None:
            async for result in self.stream(each_of(requests), concurrency=self.concurrency):
                found.put(result)

        def work() -> None:
            try:
                loop.run_until_complete(task)
                found.put(None)
            except BaseException as error:
                found.put(error)

        task = loop.create_task(pump())
        thread = threading.Thread(target=work, daemon=True, name=THREAD)
        thread.start()
        try:
            while (item := found.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if thread.is_alive():
                loop.call_soon_threadsafe(task.cancel)
            thread.join()
            loop.close()
