"""One engine behind many callers: requests wait in a queue, and what comes back finds who asked."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

from components.contracts import Diagnostics, Engine, Piece, Prompt, Request, Result, SamplingParams, UserError

Heard = tuple[int, Piece] | Result  # index of the completion and its next piece, or the end of all
Ask = tuple[Prompt, SamplingParams]


class Answers(Protocol):
    """What callers listen to: an engine's hub, or what asks one several times (framework/server_rounds.py)."""

    def follow(self, prompt: Prompt, params: SamplingParams, n: int) -> AsyncGenerator[Heard]: ...


class Hub:
    """One engine, and the queues of those who wait for it."""

    def __init__(self, engine: Engine, concurrency: int) -> None:
        self.engine, self.concurrency, self.answered, self.cancelled = engine, concurrency, 0, 0
        self._arrived: asyncio.Queue[Request] = asyncio.Queue()
        self._callers: dict[str, asyncio.Queue[Heard | BaseException]] = {}

    async def work(self) -> None:
        """Answer for ever. An engine that fails is told to all who wait, and begun anew for those who come."""
        while True:
            try:
                async for result in self.engine.stream(self._requests(), concurrency=self.concurrency, on_piece=self._say):
                    self.answered += result.error is None
                    if (caller := self._callers.pop(result.request_id, None)) is not None:
                        caller.put_nowait(result)
            except Exception as error:
                for caller in self._callers.values():
                    caller.put_nowait(error)
                self._callers.clear()

    async def follow(self, prompt: Prompt, params: SamplingParams, n: int) -> AsyncGenerator[Heard]:
        """The pieces of n completions as they are written, then the result; whoever stops listening cancels the request.

        Raises UserError for a request that failed.
        """
        name, said = secrets.token_hex(12), asyncio.Queue[Heard | BaseException]()
        self._callers[name] = said
        self._arrived.put_nowait(Request(name, prompt, params, n))
        try:
            while True:
                item = await said.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Result) and item.error is not None:
                    raise UserError(item.error)
                yield item
                if isinstance(item, Result):
                    return
        finally:
            if self._callers.pop(name, None) is not None:
                self.cancelled += 1
                self.engine.cancel(name)

    def figures(self) -> dict[str, float]:
        """How it stands: requests in work or waiting, answered and cancelled ones, tokens that the engine has generated."""
        tokens = self.engine.diagnostics().get("tokens", 0.0) if isinstance(self.engine, Diagnostics) else 0.0
        return {"requests": len(self._callers), "answered": self.answered, "cancelled": self.cancelled, "tokens": tokens}

    async def _requests(self) -> AsyncIterator[Request]:
        while True:
            if (request := await self._arrived.get()).id in self._callers:  # else its caller has left
                yield request

    def _say(self, request: str, index: int, piece: Piece) -> None:
        if (caller := self._callers.get(request)) is not None:
            caller.put_nowait((index, piece))


async def merged(answers: Answers, asks: list[Ask], n: int) -> AsyncGenerator[tuple[int, Heard]]:
    """(place of the prompt, what is said) of all prompts as it comes. Raises what the first to fail raises; the others are cancelled."""
    heard = asyncio.Queue[tuple[int, Heard | Exception]]()

    async def listen(place: int, ask: Ask) -> None:
        try:
            async with aclosing(answers.follow(*ask, n)) as said:
                async for item in said:
                    heard.put_nowait((place, item))
        except Exception as error:
            heard.put_nowait((place, error))

    tasks, ended = [asyncio.create_task(listen(*one)) for one in enumerate(asks)], 0
    try:
        while ended < len(asks):
            place, item = await heard.get()
            if isinstance(item, Exception):
                raise item
            ended += isinstance(item, Result)
            yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(answers: Answers, asks: list[Ask], n: int) -> list[Result]:
    """The results, in the order of the prompts; raises what `merged` raises."""
    async with aclosing(merged(answers, asks, n)) as said:
        found = {place: item async for place, item in said if isinstance(item, Result)}
    return [found[place] for place in range(len(asks))]
