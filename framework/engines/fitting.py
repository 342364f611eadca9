"""Prompts that leave no room for their answer, for every engine: the request fails, its prompt is cut on the left, or it is passed over.

Tokens are counted here, before anything goes out, wherever there are ids or a tokenizer. Where there are none, a server says so itself, and
what it says is read as the same thing (`framework/engines/openai.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, cast, get_args

from components.contracts import (
    Completion,
    Decoding,
    Diagnostics,
    Engine,
    OnPiece,
    Prompt,
    Request,
    Result,
    SamplingParams,
    Tokenizer,
    Usage,
    UserError,
)
from framework.signatures import describe, nearest_literal

Policy = Literal["error", "truncate_left", "skip"]
TOO_LONG = "too_long"  # kind of such an error, and the key that says what is done about it
SAID = re.compile(rf"context[ _-]?(length|size|window)|model length|{TOO_LONG}|(prompt|input) is too long", re.IGNORECASE)  # by servers
UTF8_REST = 3  # bytes of a character after its first, at most


def refusal(tokens: int, new: int, limit: int, whose: str) -> str:
    """Why a prompt of so many tokens cannot have an answer of up to `new`."""
    return (
        f"{tokens} tokens and max_new_tokens={new} are more than the {limit} {whose}; shorten it, or say too_long=truncate_left or "
        "too_long=skip"
    )


def fitted(engine: Engine, policy: str, tokenizer: Tokenizer | None) -> Engine:
    """The engine under a policy; with `error` it is the engine itself, which refuses such a request.

    tokenizer: that of the prompts; None where only a server has it. Raises UserError for another word.
    """
    if policy not in get_args(Policy):
        raise UserError(f"too_long: {policy!r} is not {describe(Policy)}{nearest_literal(policy, Policy)}")
    return engine if policy == "error" else cast(Engine, Fitting(engine, policy, tokenizer))


@dataclasses.dataclass(frozen=True)
class Fit:
    """A prompt as it goes out. cut: tokens that it lost; why: it goes nowhere, and prompt is None."""

    prompt: Prompt | None
    cut: int = 0
    why: str | None = None


class Fitting:
    """An engine whose prompts are cut on their left (truncate_left) or passed over (skip) where they leave no room for max_new_tokens.

    What was done stands in each completion: `prompt_cut`, or the finish_reason `skipped` with the reason as its stop_reason. A document
    start is kept when what follows it is cut. Everything else is the engine's.
    """

    def __init__(self, engine: Engine, policy: str, tokenizer: Tokenizer | None) -> None:
        self.engine, self.policy, self.tokenizer = engine, policy, tokenizer
        self.counts: Counter[str] = Counter()  # prompts_cut, prompts_skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def fit(self, prompt: Prompt, params: SamplingParams) -> Fit:
        """What goes out of a prompt, which is counted."""
        limit, ids = self.engine.context_length, self._ids(prompt)
        room = (limit or 0) - params.max_new_tokens
        if limit is None or ids is None or len(ids) <= room:
            return Fit(prompt)
        if self.policy == "skip" or room < 1:
            return self._skipped(refusal(len(ids), params.max_new_tokens, limit, "that this engine takes"))
        start = ids[:1] if room > 1 and self.tokenizer is not None and ids[0] == self.tokenizer.eot_id else []
        rest = ids[len(ids) - room + len(start) :]
        rest = rest[self._torn(rest, len(rest) if start else len(rest) - 1) :]
        self.counts["prompts_cut"] += 1
        kept = [*start, *rest]
        return Fit(kept if not isinstance(prompt, str) else cast(Tokenizer, self.tokenizer).decode(kept), len(ids) - len(kept))

    def _skipped(self, why: str) -> Fit:
        self.counts["prompts_skipped"] += 1
        return Fit(None, why=why)

    def _ids(self, prompt: Prompt) -> list[int] | None:
        """Token ids of a prompt; None where they are not known here: of a conversation, and of a text without a tokenizer."""
        if isinstance(prompt, str):
            return None if self.tokenizer is None else self.tokenizer.encode(prompt)
        return cast("list[int]", list(prompt)) if all(isinstance(part, int) for part in prompt) else None

    def _torn(self, ids: list[int], most: int) -> int:
        """How many ids at the beginning, of `most`, are the rest of a character that was cut through."""
        if self.tokenizer is None:
            return 0
        heads = [self.tokenizer.decode(ids[i : i + 1 + UTF8_REST]) for i in range(min(UTF8_REST, most))]
        return next((i for i, head in enumerate(heads) if not head.startswith("\ufffd")), len(heads))

    def _marked(self, completion: Completion, cut: int) -> Completion:
        """A completion that says what was done; a server's own refusal is treated as ours."""
        why = str(completion.stop_reason)
        if completion.finish_reason == "error" and why.startswith(f"{TOO_LONG}:") and self.policy == "skip":
            return skipped(str(self._skipped(why).why))
        completion.prompt_cut = cut
        return completion

    def generate(self, prompts: Sequence[Prompt], params: Decoding) -> list[Completion]:
        """See the contract."""
        done = dict(self.completions(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def completions(self, prompts: Sequence[Prompt | None], params: Decoding, first: int = 0) -> Iterator[tuple[int, Completion]]:
        """See the contract."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        fits = [Fit(None) if prompt is None else self.fit(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        yield from ((index, skipped(fit.why)) for index, fit in enumerate(fits) if fit.why is not None)
        for index, completion in self.engine.completions([fit.prompt for fit in fits], params, first):
            yield index, self._marked(completion, fits[index].cut)

    def pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """See the contract; nothing of a prompt that is passed over."""
        if (fit := self.fit(prompt, params)).prompt is not None:
            yield from self.engine.pieces(fit.prompt, params)

    async def stream(self, requests: AsyncIterable[Request], *, concurrency: int, on_piece: OnPiece | None = None) -> AsyncIterator[Result]:
        """See the contract. A request that is passed over has its result at once, whatever the others do."""
        passed: asyncio.Queue[Result] = asyncio.Queue(max(1, concurrency))  # so that long prompts alone do not run ahead of their reader
        out: dict[str, tuple[int, int]] = {}  # of requests on their way: tokens that were cut, and n
        source = self.engine.stream(self._asked(requests, passed, out), concurrency=concurrency, on_piece=on_piece)
        coming: asyncio.Future[Any] = asyncio.ensure_future(anext(source, None))  # type: ignore[call-overload]
        own: asyncio.Future[Any] = asyncio.ensure_future(passed.get())
        try:
            while True:
                await asyncio.wait({coming, own}, return_when=asyncio.FIRST_COMPLETED)
                if own.done():
                    yield own.result()
                    own = asyncio.ensure_future(passed.get())
                elif (result := coming.result()) is None:
                    break
                else:
                    yield self._told(result, *out.pop(result.request_id, (0, 1)))
                    coming = asyncio.ensure_future(anext(source, None))  # type: ignore[call-overload]
            while not passed.empty():
                yield passed.get_nowait()
        finally:
            for task in (coming, own):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            await source.aclose()  # type: ignore[attr-defined]

    async def _asked(
        self, requests: AsyncIterable[Request], passed: asyncio.Queue[Result], out: dict[str, tuple[int, int]]
    ) -> AsyncIterator[Request]:
        """The requests that go out, as they go; results of the others are put into the queue."""
        async for request in requests:
            fit = self.fit(request.prompt, request.params)
            if fit.prompt is None:
                await passed.put(self._passed(request.id, request.n, str(fit.why)))
                continue
            out[request.id] = (fit.cut, request.n)
            yield dataclasses.replace(request, prompt=fit.prompt)

    def _told(self, result: Result, cut: int, n: int) -> Result:
        """A result whose completions say what was done; see `_marked`."""
        if result.error is not None and result.error.startswith(f"{TOO_LONG}:") and self.policy == "skip":
            return self._passed(result.request_id, n, str(self._skipped(result.error).why))
        result.completions = [self._marked(completion, cut) for completion in result.completions]
        return result

    def _passed(self, name: str, n: int, why: str) -> Result:
        return Result(name, [skipped(why) for _ in range(n)], Usage(), {"total": 0.0}, self.engine.engine_id)

    def diagnostics(self) -> dict[str, float]:
        """The engine's, and prompts_cut and prompts_skipped so far."""
        own = self.engine.diagnostics() if isinstance(self.engine, Diagnostics) else {}
        return {**own, "prompts_cut": float(self.counts["prompts_cut"]), "prompts_skipped": float(self.counts["prompts_skipped"])}


def skipped(why: str | None) -> Completion:
    """What stands for the completion of a prompt that was passed over: nothing, and why."""
    return Completion([], "", [], "skipped", stop_reason=why)


def figures(engine: Engine) -> dict[str, float]:
    """How many prompts were cut and passed over by now; {} where the policy is `error`."""
    found = engine.diagnostics() if isinstance(engine, Diagnostics) else {}
    return {key: found[key] for key in ("prompts_cut", "prompts_skipped") if key in found}


def words(counts: Mapping[str, float]) -> str:
    """The same for a reader; '' where all prompts went out as they were."""
    done = {"prompts_cut": "cut on the left", "prompts_skipped": "skipped"}
    told = [f"{counts[key]:,.0f} {what}" for key, what in done.items() if counts.get(key)]
    return f"prompts too long for the engine: {', '.join(told)}" if told else ""
