"""OpenAI's HTTP interface over an engine. What a caller asks and we do not do is refused, never passed over."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

from fastapi import Depends, FastAPI, HTTPException
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from components.contracts import Completion, Engine, Piece, Prompt, Result, SamplingParams, UserError
from components.decoding.constraints import constraint
from components.decoding.params import check_params
from components.decoding.rounds import Method
from framework.build import Run
from framework.decoding import Render
from framework.generate import run_renderer
from framework.server_forms import Asked, ChatForm, CompletionForm
from framework.server_hub import Answers, Ask, Hub, merged, whole
from framework.server_rounds import InRounds

HUNG_UP = 499  # what servers note where nobody is left to hear it
MOST_TOKENS = 1 << 20  # of an answer, where the engine knows no end


def make_app(hub: Hub, run: Run, name: str, defaults: SamplingParams, key: str | None, method: tuple[str, Method] | None = None) -> FastAPI:
    """The application. defaults: of what a request leaves open. key: that callers must send, None for none.

    method: the name of a model that answers with this decoding of several calls, and the decoding.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(hub.work())
        yield
        work.cancel()

    def allowed(call: Call) -> None:
        if key is not None and not secrets.compare_digest(call.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
            raise HTTPException(401, "the key is missing or wrong; send it as Authorization: Bearer KEY")

    app = FastAPI(title="Patchbay", lifespan=life)
    guarded = [Depends(allowed)]
    render, names = run_renderer(run), [name] if method is None else [name, method[0]]
    compiling = asyncio.Semaphore(1)  # threads of one pool, which others need too
    errors(app)

    async def checked(asked: Asked) -> SamplingParams:
        if asked.structured_outputs is None:
            return params_of(asked)
        async with compiling:  # a pattern can take a second, in which others would wait
            return await asyncio.to_thread(params_of, asked)

    def params_of(asked: Asked) -> SamplingParams:
        if asked.model not in (None, *names):
            raise HTTPException(404, f"model: {asked.model!r} is not here; {' and '.join(map(repr, names))} {'are' if method else 'is'}")
        if method is not None and asked.model == method[0] and (field := asked.beyond_text()):
            raise HTTPException(400, f"{field}: {asked.model!r} gives texts alone; drop it, or ask {name!r}")
        if asked.stream and getattr(asked, "prompt_logprobs", None) is not None:
            raise HTTPException(400, "stream: prompt_logprobs are not streamed; ask for them without stream")
        if (asked.most_tokens() or 0) > (most := hub.engine.context_length or MOST_TOKENS):
            raise HTTPException(400, f"max_tokens: {asked.most_tokens()}; at most {most} are allowed here")
        try:
            params = replace(defaults, **asked.given(), constraint=constraint(asked.regex, asked.choice))
            check_params(params)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        return params

    def ids_of(prompt: Any) -> Any:
        return [run.tokenizer.eot_id, *run.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt

    def answers(asked: Asked, render: Render) -> Answers:
        return hub if method is None or asked.model != method[0] else InRounds(hub, method[1], run.tokenizer, render)

    def seeded(asked: Asked, prompts: Sequence[Prompt], params: SamplingParams) -> list[Ask]:
        """Each prompt draws for itself where the caller names no seed."""
        return [(one, params if asked.seed is not None else replace(params, seed=secrets.randbits(63))) for one in prompts]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **hub.figures()}

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        about = {"object": "model", "created": 0, "owned_by": "patchbay", "max_model_len": hub.engine.context_length}
        return {"object": "list", "data": [{"id": one, **about} for one in names]}

    @app.post("/v1/completions", dependencies=guarded)
    async def complete(asked: CompletionForm, call: Call) -> Any:
        params = await checked(asked)
        if not (prompts := asked.prompts()):
            raise HTTPException(400, "prompt: empty; give a text, token ids, or a list of either")
        asks_once = (to := answers(asked, ids_of)) is hub
        if not asks_once and not all(isinstance(one, str) for one in prompts):
            raise HTTPException(400, f"prompt: token ids; {asked.model!r} takes texts, which its calls go on from")
        try:
            if asks_once:
                prompts = [ids_of(one) for one in prompts]
            scores = (
                await asyncio.to_thread(scored, hub.engine, cast(list[list[int]], prompts)) if asked.prompt_logprobs is not None else None
            )
        except (ValueError, TypeError) as error:
            raise HTTPException(400, f"prompt: {error}") from error
        return await answered(to, Reply("text_completion", asked.model or name, asked, scores), seeded(asked, prompts, params), call)

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(asked: ChatForm, call: Call) -> Any:
        params, messages = await checked(asked), [message.model_dump() for message in asked.messages]
        try:
            prompt: Prompt = render(messages, where="messages")
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        if (to := answers(asked, render)) is not hub:
            prompt = messages  # which its calls begin with
        return await answered(to, Reply("chat.completion", asked.model or name, asked, None), seeded(asked, [prompt], params), call)

    return app


def errors(app: FastAPI) -> None:
    """Errors in OpenAI's form: {"error": {"message", "type", "code"}}."""

    def told(code: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if code < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, code)

    @app.exception_handler(HTTPException)
    async def refused(call: Call, error: HTTPException) -> JSONResponse:
        return told(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(call: Call, error: RequestValidationError) -> JSONResponse:
        found = ("; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors()))[:1000]
        return told(400, found)

    @app.exception_handler(UserError)
    async def failed(call: Call, error: UserError) -> JSONResponse:
        return told(400, str(error))


def scored(engine: Engine, prompts: list[list[int]]) -> list[list[Any]]:
    """Log-probabilities of prompts as vLLM gives them: nothing for the first id, {id: {logprob}} for each after it."""
    found = engine.score(prompts)
    return [
        [None, *({str(i): {"logprob": p}} for i, p in zip(ids[1:], row.tolist(), strict=True))]
        for ids, row in zip(prompts, found, strict=True)
    ]


class Reply:
    """How an answer is written. kind: text_completion or chat.completion; scores: of the prompts."""

    def __init__(self, kind: str, name: str, asked: Asked, scores: list[list[Any]] | None) -> None:
        self.kind, self.name, self.asked, self.scores = kind, name, asked, scores
        self.talk = kind == "chat.completion"
        self.id, self.created = f"{'chatcmpl' if self.talk else 'cmpl'}-{secrets.token_hex(12)}", int(time.time())

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, chunk: bool = False) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.talk else self.kind
        found: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": self.name, "choices": choices}
        return found | ({"usage": usage} if usage is not None else {})

    def choice(self, index: int, found: Completion, prompt: int) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": found.text}} if self.talk else {"text": found.text}
        ids = {"token_ids": found.token_ids} if self.asked.return_token_ids else {}
        scores = {"prompt_logprobs": self.scores[prompt]} if self.scores is not None else {}
        end = {"finish_reason": found.finish_reason, "stop_reason": found.stop_reason}
        return {"index": index, **said, "logprobs": self._logprobs(found), **end, **ids, **scores}

    def piece(self, index: int, found: Piece, reason: str | None = None) -> dict[str, Any]:
        """Of an event. The log-probabilities are those of the piece's own tokens; joined, they are those of the whole."""
        said = {"delta": {"role": "assistant", "content": found.text}} if self.talk else {"text": found.text}
        ids = {"token_ids": found.token_ids} if self.asked.return_token_ids else {}
        return {"index": index, **said, "logprobs": self._logprobs(found) if found.token_ids else None, "finish_reason": reason, **ids}

    def _logprobs(self, found: Completion | Piece) -> dict[str, Any] | None:
        if not self.asked.wants_logprobs:
            return None
        tops = [{f"token_id:{i}": p for i, p in top.items()} for top in found.alternatives or [{} for _ in found.token_ids]]
        names = [f"token_id:{i}" for i in found.token_ids]
        if not self.talk:
            return {"tokens": names, "token_logprobs": found.logprobs, "top_logprobs": tops}
        steps = zip(names, found.logprobs, tops, strict=True)
        return {
            "content": [
                {"token": t, "logprob": p, "top_logprobs": [{"token": k, "logprob": v} for k, v in top.items()]} for t, p, top in steps
            ]
        }


async def answered(answers: Answers, reply: Reply, asks: list[Ask], call: Call) -> Any:
    """The response: one body, or events as the text is written. A caller who hangs up before its end cancels what is asked.

    Raises UserError, before anything is sent, for what the engine refuses.
    """
    n = reply.asked.n
    if reply.asked.stream:  # its response listens for the end of the connection by itself, once it has begun
        told = events(answers, reply, asks)
        first = await unless_hung_up(asyncio.ensure_future(anext(told)), call)
        return Response(status_code=HUNG_UP) if first is None else StreamingResponse(after(first, told), media_type="text/event-stream")
    results = await unless_hung_up(asyncio.ensure_future(whole(answers, asks, n)), call)
    if results is None:
        return Response(status_code=HUNG_UP)
    choices = [
        reply.choice(place * n + index, one, place) for place, result in enumerate(results) for index, one in enumerate(result.completions)
    ]
    return reply.body(choices, usage(results))


async def unless_hung_up(work: asyncio.Future[Any], call: Call) -> Any:
    """What `work` gives; None where the caller has closed the connection before, and the work is cancelled."""
    left: asyncio.Future[Any] = asyncio.ensure_future(hung_up(call))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        left.cancel()


async def hung_up(call: Call) -> None:
    """Until the caller has closed the connection."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


async def after(first: str, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """`first`, then the rest, which is closed in the end."""
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def events(answers: Answers, reply: Reply, asks: list[Ask]) -> AsyncGenerator[str]:
    """Server-sent events: pieces, a last piece with the reason of each completion, the usage where asked for, [DONE].

    Raises UserError for what is refused before there is an event; later it is one.
    """

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    results, n, told = [], reply.asked.n, dict[int, int]()  # tokens of each completion
    try:
        async with aclosing(merged(answers, asks, n)) as said:
            async for place, item in said:
                if isinstance(item, Result):
                    results.append(item)
                    numbered = [(place * n + index, one) for index, one in enumerate(item.completions)]
                    ends = [reply.piece(index, rest_of(one, told.get(index, 0)), one.finish_reason) for index, one in numbered]
                    told |= {index: len(one.token_ids) for index, one in numbered}
                    yield event(reply.body(ends, None, chunk=True))
                else:
                    index = place * n + item[0]
                    told[index] = told.get(index, 0) + len(item[1].token_ids)
                    yield event(reply.body([reply.piece(index, item[1])], None, chunk=True))
    except UserError as error:
        if not results and not told:
            raise
        yield event({"error": {"message": str(error), "type": "invalid_request_error", "code": 400}})
    if reply.asked.stream_options is not None and reply.asked.stream_options.include_usage:
        yield event(reply.body([], usage(results), chunk=True))
    yield "data: [DONE]\n\n"


def rest_of(found: Completion, told: int) -> Piece:
    """The tokens of a completion that no piece had; its text is told already."""
    others = found.alternatives[told:] if found.alternatives is not None else None
    return Piece("", found.token_ids[told:], found.logprobs[told:], others)


def usage(results: list[Result]) -> dict[str, Any]:
    """Tokens of all. A prompt counts once however many answers it gets, as OpenAI counts."""
    read = sum(result.usage.prompt // max(1, len(result.completions)) for result in results)
    said = sum(result.usage.completion for result in results)
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
