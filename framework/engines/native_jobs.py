"""Requests on their way through the native engine's stream (framework/engines/native.py)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Callable
from typing import Any

from components.contracts import OnPiece, Piece, Request, Result, Tokenizer, Usage, UserError
from components.decoding.batching import Batcher, Reading, Row
from components.decoding.constraints import Machine

log = logging.getLogger(__name__)


class Job:
    """A request on its way through `NativeEngine.stream`."""

    def __init__(self, request: Request) -> None:
        self.request, self.arrived = request, time.perf_counter()
        self.rows: list[Row] = []
        self.reading: Reading | None = None
        self.machine: Machine | None = None
        self.refused: Exception | None = None
        self.shown: dict[Row, tuple[int, int]] = {}  # characters and tokens that were told

    def compile(self, machine_of: Callable[[Request], Machine | None]) -> None:
        """Make what its answers are held to. It may take a second, in a thread beside the event loop; `begin` raises what goes wrong."""
        try:
            self.machine = machine_of(self.request)
        except Exception as error:
            self.refused = error

    def begin(self, batcher: Batcher, row_of: Callable[[int], Row], spoken: bool) -> None:
        """Let its rows wait for their turn. row_of: makes that of a draw. spoken: `speak` will be called. Raises what `generate` raises."""
        request = self.request
        if self.refused is not None:
            raise self.refused
        if request.n < 1:
            raise UserError(f"n: {request.n}; at least 1 is allowed")
        rows = [row_of(draw) for draw in range(request.n)]
        for row in rows:
            row.spoken = spoken
        self.reading, self.rows = batcher.add(rows[0].ids, rows, self.machine), rows

    def speak(self, row: Row, on_piece: OnPiece) -> None:
        """Tell what a row has written since the last time."""
        if row.finish_reason is not None and row.text is not None:
            row.text.flush()
        text, (shown, told) = row.text_so_far, self.shown.get(row, (0, 0))
        if len(text) > shown:
            others = row.alternatives[told:] if row.alternatives is not None else None
            piece = Piece(text[shown:], row.ids[row.prompt_length + told :], row.logprobs[told:], others)
            on_piece(self.request.id, self.rows.index(row), piece)
            self.shown[row] = len(text), row.said

    def result(self, tokenizer: Tokenizer, engine_id: str, error: str | None = None) -> Result:
        """What became of it."""
        now, rows, reading = time.perf_counter(), self.rows, self.reading
        error = error or next((row.error for row in rows if row.error is not None), None)
        began = reading.began if reading is not None and reading.began else now
        spoke = min((row.first_token for row in rows if row.first_token), default=now)
        latency = {"queued": began - self.arrived, "first_token": spoke - self.arrived, "total": now - self.arrived}
        read = rows[0].prompt_length if rows else 0
        usage = Usage(read * len(rows), sum(row.said for row in rows), read * (len(rows) - 1) if rows else 0)
        completions = [] if error is not None else [row.completion(tokenizer) for row in rows]
        return Result(self.request.id, completions, usage, latency, engine_id, error)


def said_of(error: Exception) -> str:
    """What the caller is told of a request that could not be begun; what is no mistake of the caller's is logged."""
    if isinstance(error, UserError | ValueError):
        return str(error)
    log.error("a request could not be begun", exc_info=error)
    return f"{type(error).__name__}: {error}"


async def feed(
    requests: AsyncIterable[Request],
    arrived: asyncio.Queue[Any],
    free: asyncio.Semaphore,
    under_way: dict[str, bool],
    machine_of: Callable[[Request], Machine | None],
) -> None:
    """Put requests into the queue as there is room, as jobs, and their ids into `under_way`; at their end None, or what ended them.

    Those with a constraint come when it is compiled, and hold up nobody until then.
    """
    compiling: set[asyncio.Task[None]] = set()

    async def later(job: Job) -> None:
        await asyncio.to_thread(job.compile, machine_of)
        arrived.put_nowait(job)

    try:
        await free.acquire()
        async for request in requests:
            job, under_way[request.id] = Job(request), False
            if request.params.constraint is None:
                arrived.put_nowait(job)
            else:
                compiling.add(task := asyncio.create_task(later(job)))
                task.add_done_callback(compiling.discard)
            await free.acquire()
        await asyncio.gather(*compiling)
        arrived.put_nowait(None)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        arrived.put_nowait(error)
    finally:
        for task in compiling:
            task.cancel()
