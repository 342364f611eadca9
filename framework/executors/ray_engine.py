"""The engine that a task sees with executor=ray: requests become Datasets of Ray Data, whose workers answer them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import threading
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from components.contracts import (
    CANCELLED,
    Completion,
    Decoding,
    OnPiece,
    Prompt,
    Request,
    Result,
    SamplingParams,
    Usage,
    UserError,
)
from framework.engines.requests import told
from framework.executors.ray_worker import Kind, Recipe, Worker

PAUSE_SECONDS = 0.2  # a feed that gives nothing for so long waits for answers
BLOCKS_AT_ONCE = 2  # of a worker: the next one fills the slots that the end of the first leaves free
TRIES = 3  # of a block after its first worker died
LOST = "worker_died: the processes that worked on this request died each time; Ray's log files say more"


def pool(size: int, map_batches: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of map_batches for a pool of `size` workers, as this version of Ray spells them; worker processes come back without end."""
    from ray.data import ActorPoolStrategy

    calls: dict[str, Any] = {"max_tasks_in_flight_per_actor": BLOCKS_AT_ONCE}
    further = {}
    if "max_concurrent_calls_per_actor" in inspect.signature(ActorPoolStrategy).parameters:
        calls["max_concurrent_calls_per_actor"] = BLOCKS_AT_ONCE
    else:
        further["max_concurrency"] = BLOCKS_AT_ONCE
    taken = inspect.signature(map_batches).parameters
    if "max_task_retries" in taken or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        further["max_task_retries"] = TRIES
    return {"compute": ActorPoolStrategy(size=size, **calls), **further}


@dataclass(frozen=True)
class Options:
    """The pool: workers with what each takes of the cluster, requests of a block and of a Dataset."""

    workers: int
    cpus: float
    gpus: float
    batch_size: int
    window: int


class RayEngine:
    """The Engine contract over Ray Data. A Dataset has an end and `stream` has none, so requests are run window by window.

    A window is what the feed gives until it ends, gives nothing for PAUSE_SECONDS, or has given `window` requests; the next one is gathered
    while it runs. Each window's pool of workers loads the run anew. A block of `batch_size` requests is one task of Ray: its answers come
    together, and where its worker dies, another answers all of it.

    Args:
        recipe: of the engine that every worker makes.
        options: the pool.
        about: what such an engine says of itself, by attribute.
        close: called at the end.

    In `stream`, `concurrency` bounds each worker; up to two windows of requests are unanswered at a time.
    """

    engine_id: str
    model_id: str
    tokenizer_id: str
    capabilities: frozenset[str]
    context_length: int | None

    def __init__(self, recipe: Recipe, options: Options, about: dict[str, Any], close: Callable[[], None]) -> None:
        vars(self).update(about)
        self.capabilities = frozenset(self.capabilities) - {"pieces"}
        self.recipe, self.options, self.window = recipe, options, options.window
        self._figures: Counter[str] = Counter()
        self._cancelled: set[str] = set()
        self._close: Callable[[], None] | None = close

    def generate(self, prompts: Sequence[Prompt], params: Decoding) -> list[Completion]:
        """See the contract."""
        done = dict(self.completions(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def completions(self, prompts: Sequence[Prompt | None], params: Decoding, first: int = 0) -> Iterator[tuple[int, Completion]]:
        """See the contract; as their blocks are done. Raises UserError for what a worker refuses, or one that dies again and again."""
        single = params if isinstance(params, SamplingParams) else None
        each = [None] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} sampling parameters")
        asks = [(first + index, prompt, own) for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))]
        for place, completion in self._whole("completions", asks, single):
            yield place - first, completion

    def pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The whole text at once."""
        yield self.generate([prompt], params)[0].text

    def score(self, sequences: list[list[int]]) -> list[Tensor]:
        """See the contract."""
        found = dict(self._whole("score", list(enumerate(sequences)), None))
        return [torch.from_numpy(found[place]) for place in range(len(sequences))]

    async def stream(self, requests: AsyncIterable[Request], *, concurrency: int, on_piece: OnPiece | None = None) -> AsyncIterator[Result]:
        """See the contract and above. Raises what a worker's engine raises that gives up, and an exception of `requests` itself."""
        if concurrency < 1:
            raise UserError(f"concurrency: {concurrency}; at least 1 is allowed")
        given: asyncio.Queue[Request] = asyncio.Queue(self.window)

        async def feed() -> None:
            async for request in requests:
                await given.put(request)

        feeder = asyncio.create_task(feed())
        try:
            while asked := await self._gathered(given, feeder):
                left = {request.id: request for request in asked if request.id not in self._cancelled}
                for request in asked:
                    if request.id not in left:
                        yield self._without(request, CANCELLED)
                async for result in self._window(list(left.values()), concurrency):
                    if left.pop(result.request_id, None) is not None:
                        if result.request_id in self._cancelled:
                            result = replace(result, completions=[], error=CANCELLED)
                        yield told(result, on_piece)
                for request in left.values():
                    yield self._without(request, LOST)
            await feeder
        finally:
            self._cancelled.clear()
            feeder.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await feeder

    def cancel(self, request: str) -> None:
        """See the contract. A request that a worker has is answered to its end there, and the answer dropped."""
        self._cancelled.add(request)

    def diagnostics(self) -> dict[str, float]:
        """Sums of what the workers' engines say, as their blocks are done."""
        return {"tokens": 0.0, **self._figures}

    def close(self) -> None:
        """End the cluster where it is ours, with everything on it; leave it where it is not."""
        if self._close is not None:
            close, self._close = self._close, None
            close()

    async def _gathered(self, given: asyncio.Queue[Request], feeder: asyncio.Task[None]) -> list[Request]:
        """The next window; [] at the end of the feed."""
        before = 0
        while not feeder.done() and not given.full():
            await asyncio.wait({feeder}, timeout=PAUSE_SECONDS)
            if given.qsize() == before > 0:
                break
            before = given.qsize()
        if feeder.done() and given.empty():
            feeder.result()
        return [given.get_nowait() for _ in range(given.qsize())]

    async def _window(self, asked: list[Request], concurrency: int) -> AsyncIterator[Result]:
        """The answers of a Dataset, which a thread of its own reads, since that blocks. Left early, the thread ends at the next block."""
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Any]()
        left = threading.Event()

        def tell(one: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and nobody waits
                loop.call_soon_threadsafe(found.put_nowait, one)

        def work() -> None:
            try:
                for one in self._answers("stream", asked, concurrency, None):
                    if left.is_set():
                        break
                    tell(one)
                tell(None)
            except BaseException as error:
                tell(error)

        if not asked:
            return
        threading.Thread(target=work, daemon=True, name="ray-dataset").start()
        try:
            while (one := await found.get()) is not None:
                if isinstance(one, BaseException):
                    raise one
                yield one
        finally:
            left.set()

    def _whole(self, kind: Kind, asks: list[Any], params: SamplingParams | None) -> Iterator[tuple[int, Any]]:
        """Every (place, answer) of a call. Raises UserError where some are missing."""
        for begin in range(0, len(asks), self.window):
            some, count = asks[begin : begin + self.window], 0
            wanted = sum(ask[1] is not None for ask in some)
            if not wanted:
                continue
            for one in self._answers(kind, some, max(1, self.options.batch_size), params):
                count += 1
                yield one
            if count < wanted:
                raise UserError(f"executor: {wanted - count} of {wanted} requests have no answer; {LOST}")

    def _answers(self, kind: Kind, asks: Sequence[Any], concurrency: int, params: SamplingParams | None) -> Iterator[Any]:
        """Run one Dataset; yields answers as their blocks are done, in any order. Raises what a worker says that it met."""
        import ray.data

        if not asks:
            return
        context, options = ray.data.DataContext.get_current(), self.options
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # a block that is lost is seen by its answers, and the others are not its fault
        blocks = -(-len(asks) // options.batch_size)
        rows = ray.data.from_items([{"ask": pickle.dumps(ask)} for ask in asks], override_num_blocks=blocks)
        answers = rows.map_batches(
            Worker,
            fn_constructor_kwargs={"recipe": self.recipe, "kind": kind, "concurrency": concurrency, "params": params},
            batch_size=None,  # a block is a batch
            batch_format="numpy",
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            **pool(min(options.workers, blocks), rows.map_batches),
        )
        for batch in answers.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for said in map(pickle.loads, batch["said"]):
                if isinstance(said, BaseException):
                    raise said
                if isinstance(said, dict):
                    self._figures.update(said)
                else:
                    yield said

    def _without(self, request: Request, error: str) -> Result:
        return Result(request.id, [], Usage(), {}, self.engine_id, error)
