"""Decodings of several calls behind the server: a caller asks the model `METHOD:NAME` and gets what it comes to."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from components.contracts import Completion, Piece, Prompt, Result, SamplingParams, Usage, UserError
from components.decoding.rounds import Method, Query
from framework.decoding import Open, Render, Stopped, Trace, query_ids, seeded, setting_of
from framework.server_hub import Heard, Hub, whole


class InRounds:
    """Stands where a `Hub` does: an answer is one of the method, its calls go to the hub beside those of all other callers.

    start, render: how a text, or the messages of a conversation, becomes the engine's prompt.
    """

    def __init__(self, hub: Hub, method: Method, tokenizer: Any, render: Render) -> None:
        self.hub, self.method, self.tokenizer, self.render = hub, method, tokenizer, render

    async def follow(self, prompt: Prompt, params: SamplingParams, n: int) -> AsyncGenerator[Heard]:
        """Each whole answer as one piece, then the result, whose usage is that of all calls. Of params only the seed, max_new_tokens and
        the stop strings count. A caller who stops listening cancels the calls. Raises UserError for a call that failed.
        """
        said: Any = prompt
        (name,) = query_ids([said])
        traces = []
        for index in range(n):  # one after another: the samples of each are already asked for together
            traces.append(await self._answer(Query(f"{name}#{index}" if index else name, said), params))
            found = traces[-1].answer.completion
            if found.finish_reason in ("error", "skipped"):
                raise UserError(str(found.stop_reason))
            yield index, Piece(found.text, found.token_ids, found.logprobs)
        calls = [call for trace in traces for call in trace.calls]
        usage = Usage(n * sum(call.prompt_tokens or 0 for call in calls), sum(call.tokens for call in calls))
        completions: list[Completion] = [trace.answer.completion for trace in traces]
        yield Result(name, completions, usage, {}, self.hub.engine.engine_id)

    async def _answer(self, query: Query, params: SamplingParams) -> Trace:
        method = Stopped(self.method, params.stop) if params.stop else self.method
        rounds = method.answer(query, setting_of(self.hub.engine, self.tokenizer, self.render, params))
        going = Open(0, query, rounds, next(rounds)).ready(self.render)
        while True:
            asks = zip(going.prompts, going.asks, strict=True)
            for place, result in enumerate(
                await whole(self.hub, [(prompt, seeded(self.hub.engine, ask.params)) for prompt, ask in asks], 1)
            ):
                if (answer := going.take(place, result.completions[0], result.usage)) is not None:
                    return Trace(0, query, answer, going.calls)
            going.ready(self.render)
