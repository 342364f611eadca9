"""Decodings of several calls behind the server: a caller asks the model `METHOD:NAME` and gets what it comes to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from components.contracts import Completion, Piece, Prompt, Result, SamplingParams, Usage, UserError
from components.decoding.rounds import FAILED, Ask, Method, Query
from framework.decoding import Open, Render, Stopped, Trace, query_ids, seeded, setting_of
from framework.engines.requests import failed
from framework.server_hub import Heard, Hub


class InRounds:
    """Stands where a `Hub` does: an answer is one of the method, its calls go to the hub beside those of all other callers.

    render: how a text, or the messages of a conversation, becomes the engine's prompt.
    """

    def __init__(self, hub: Hub, method: Method, tokenizer: Any, render: Render) -> None:
        self.hub, self.method, self.tokenizer, self.render = hub, method, tokenizer, render

    async def follow(self, prompt: Prompt, params: SamplingParams, n: int) -> AsyncGenerator[Heard]:
        """Each whole answer as one piece, then the result, whose usage is that of all calls. A caller who stops listening cancels them.

        params: the seed, most tokens and stop strings are those of every call, the rest says how samples are drawn.
        Raises UserError for an answer that failed; a call that failed is the method's to bear, as in a file.
        """
        said: Any = prompt
        (name,) = query_ids([said])
        traces = list[Trace]()
        for index in range(n):  # one after another: the samples of each are asked for together
            traces.append(await self._answer(Query(f"{name}#{index}" if index else name, said), params))
            found = traces[-1].answer.completion
            if found.finish_reason in (*FAILED, "skipped"):
                raise UserError(str(found.stop_reason))
            yield index, Piece(found.text, found.token_ids, found.logprobs)
        calls = [call for trace in traces for call in trace.calls]
        # times n: a reader of a result takes its prompt as read once for each completion (Usage)
        usage = Usage(n * sum(call.prompt_tokens or 0 for call in calls), sum(call.tokens for call in calls))
        yield Result(name, [trace.answer.completion for trace in traces], usage, {}, self.hub.engine.engine_id)

    async def _answer(self, query: Query, params: SamplingParams) -> Trace:
        method = Stopped(self.method, params.stop) if params.stop else self.method
        going = await asyncio.to_thread(self._begin, method, query, params)
        while True:
            asks = zip(going.prompts, going.asks, strict=True)
            found = await asyncio.gather(*(self._call(prompt, ask, params) for prompt, ask in asks))
            if (trace := await asyncio.to_thread(self._go_on, going, found)) is not None:
                return trace

    def _begin(self, method: Method, query: Query, params: SamplingParams) -> Open:
        """In a thread, as all that reads and cuts long texts: it may take a part of a second, in which others would wait."""
        rounds = method.answer(query, setting_of(self.hub.engine, self.tokenizer, self.render, params))
        return Open(0, query, rounds, next(rounds)).ready(self.render)

    def _go_on(self, going: Open, found: list[tuple[Completion, Usage]]) -> Trace | None:
        for place, (completion, usage) in enumerate(found):
            if (answer := going.take(place, completion, usage)) is not None:
                return Trace(0, going.query, answer, going.calls)
        going.ready(self.render)
        return None

    async def _call(self, prompt: Prompt, ask: Ask, params: SamplingParams) -> tuple[Completion, Usage]:
        drawn = ask.params
        if ask.role == "sample":
            drawn = replace(params, seed=drawn.seed, max_new_tokens=drawn.max_new_tokens)
        try:
            async with aclosing(self.hub.follow(prompt, seeded(self.hub.engine, drawn), 1)) as said:
                async for item in said:
                    if isinstance(item, Result):
                        return item.completions[0], item.usage
        except UserError as error:
            return failed(str(error)), Usage()
        raise RuntimeError("a request ended without a result")
