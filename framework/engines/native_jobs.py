"""Requests on their way through the native engine's stream (framework/engines/native.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Callable
from typing import Any

from components.contracts import OnPiece, Request, Result, Tokenizer, Usage, UserError
from components.decoding.batching import Batcher, Reading, Row


class Job:
    """A request on its way through `NativeEngine.stream`."""

    def __init__(self, request: Request) -> None:
        self.request, self.arrived = request, time.perf_counter()
        self.rows: list[Row] = []
        self.reading: Reading | None = None
        self.shown: dict[Row, int] = {}  # characters that were told

    def begin(self, batcher: Batcher, row_of: Callable[[int], Row], spoken: bool) -> None:
        """Let its rows wait for their turn. row_of: makes that of a draw. spoken: `speak` will be called. Raises what `generate` raises."""
        request = self.request
        if request.n < 1:
            raise UserError(f"n: {request.n}; at least 1 is allowed")
        rows = [row_of(draw) for draw in range(request.n)]
        for row in rows:
            row.spoken = spoken
        self.reading, self.rows = batcher.add(rows[0].ids, rows), rows

    def speak(self, row: Row, on_piece: OnPiece) -> None:
        """Tell what a row has written since the last time."""
        if row.finish_reason is not None and row.text is not None:
            row.text.flush()
        text, shown = row.text_so_far, self.shown.get(row, 0)
        if len(text) > shown:
            on_piece(self.request.id, self.rows.index(row), text[shown:])
            self.shown[row] = len(text)

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


async def feed(requests: AsyncIterable[Request], arrived: asyncio.Queue[Any], free: asyncio.Semaphore, under_way: dict[str, bool]) -> None:
    """Put requests into the queue as there is room, and their ids into `under_way`; at their end None, or the exception that ended them."""
    try:
        await free.acquire()
        async for request in requests:
            under_way[request.id] = False
            arrived.put_nowait(request)
            await free.acquire()
        arrived.put_nowait(None)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        arrived.put_nowait(error)
