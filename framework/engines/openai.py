"""Option engine=openai: any server with OpenAI's HTTP interface. What it can do is tried out, never believed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import httpx
import torch
from torch import Tensor

from components.contracts import Completion, Prompt, Request, Result, SamplingParams, Tokenizer, Usage, UserError
from framework.engines.fitting import SAID, TOO_LONG, refusal
from framework.engines.probe import probe
from framework.engines.requests import Breaker, EngineError, RequestEngine, Retry, row_seed, seconds_to_wait

RETRYABLE = (408, 409, 429)  # and everything from 500 on
REFUSING = (400, 413, 422)  # what servers answer to a prompt that is too long, among others
NOT_STREAMED = ("logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids")  # nobody reads them there
NEVER = -100  # the smallest bias of a logit
NEEDS = {"top_k": "top_k", "min_p": "min_p", "logprobs": "alternatives"}  # key of the parameters -> capability, where it is not None
UNSEEDED = "ignores seeds: what it draws is another each time, and methods share no samples"


class OpenAIEngine(RequestEngine):
    """Asks a server over HTTP: vLLM, transformers serve, a fleet behind a proxy, a paid service.

    Token ids go to /completions, a text too, a conversation to /chat/completions. Seeds, several answers to one request, log-probabilities
    and whatever else is tried out with a few tokens before anything is asked; a request that needs what the server cannot do is refused.
    Several answers that a server does not give at once are asked for one by one; of one that ignores seeds a line is said.

    Args:
        tokenizer: of the run whose export the server reads; None: only texts and conversations can be asked, and its stop ids are the
            server's own.
        base_url: such as http://127.0.0.1:8000/v1.
        name: of the model; None: the only one that the server offers.
        api_key_variable: environment variable that holds the key; where it is not set none is sent.
        context_length: most tokens of a prompt and its answer; None: as the server says, where it does.
        concurrency: requests on their way at once.
        request_timeout_s: seconds for one answer.
        retry, breaker: see `RequestEngine`.

    Raises: UserError for a server that does not answer, or has no such model.
    """

    takes = "tokenizer"

    def __init__(
        self, tokenizer: Tokenizer | None, base_url: str, name: str | None, api_key_variable: str, context_length: int | None,
        concurrency: int, request_timeout_s: float, retry: Retry, breaker: Breaker,
    ) -> None:  # fmt: skip
        super().__init__(concurrency, retry, breaker)
        if context_length is not None and context_length < 1:
            raise UserError(f"engine.context_length: {context_length}; at least 1 is allowed")
        self.tokenizer, self.base_url = tokenizer, base_url.rstrip("/")
        key = os.environ.get(api_key_variable)
        self._options: dict[str, Any] = {
            "base_url": f"{self.base_url}/",
            "timeout": httpx.Timeout(request_timeout_s, connect=10.0),
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
        }
        self._client: httpx.AsyncClient | None = None
        self._told = False
        with httpx.Client(**self._options) as client:
            found = probe(client, self.base_url, name, tokenizer, retry)
        self.model_id, self.capabilities = found.name, found.capabilities
        self.context_length = min((most for most in (context_length, found.context_length) if most is not None), default=None)
        self.engine_id = f"openai:{self.base_url}"
        self.tokenizer_id = "" if tokenizer is None else str(getattr(tokenizer, "fingerprint", ""))

    async def begin(self) -> None:
        self._client = httpx.AsyncClient(**self._options)

    async def end(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def close(self) -> None:
        """Nothing is held between calls."""

    async def ask(self, request: Request) -> Result:
        """See the base. An answer with fewer completions than were asked for is completed one by one."""
        self._refuse(request)
        self._mention_seeds(request.params)
        found, usage = await self._post(request, request.n if "n" in self.capabilities else 1, request.params.seed)
        shared = max(0, len(found) - 1)  # a server counts a prompt once; by the contract it counts for each answer, and was read once
        usage = Usage(usage.prompt * (1 + shared), usage.completion, usage.cached + usage.prompt * shared)
        while len(found) < request.n:
            more, used = await self._post(request, 1, row_seed(request.params.seed, len(found)))
            found += more[:1]
            usage = Usage(usage.prompt + used.prompt, usage.completion + used.completion, usage.cached + used.cached)
        return Result(request.id, found[: request.n], usage, {}, self.engine_id)

    def _refuse(self, request: Request) -> None:
        """Raise EngineError for what the server cannot do, or a prompt that cannot fit."""
        params = request.params
        missing = [f"decode.{key}" for key, what in NEEDS.items() if getattr(params, key) is not None and what not in self.capabilities]
        if params.repetition_penalty != 1.0 and "repetition_penalty" not in self.capabilities:
            missing.append("decode.repetition_penalty")
        if params.ignore_eos and "ignore_eos" not in self.capabilities:
            missing.append("ignore_eos")
        if params.stop_ids and "stop_ids" not in self.capabilities:
            missing.append("decode.stop_ids")
        if params.constraint is not None:
            kind = "choice" if params.constraint.choice is not None else "regex"
            missing += [f"decode.{kind}"] if kind not in self.capabilities else []
        if missing:
            raise EngineError("unsupported", f"{self.base_url} does not take {', '.join(missing)}", retryable=False)
        if self.context_length is not None and isinstance(request.prompt, list) and request.prompt and isinstance(request.prompt[0], int):
            tokens = len(request.prompt)
            if tokens + params.max_new_tokens > self.context_length:
                message = refusal(tokens, params.max_new_tokens, self.context_length, f"that {self.base_url} takes")
                raise EngineError(TOO_LONG, message, retryable=False)

    def _mention_seeds(self, params: SamplingParams) -> None:
        """Say once that seeds have no effect, where they should have one."""
        if params.temperature > 0 and "seed" not in self.capabilities and not self._told:
            self._told = True
            print(f"{self.base_url} {UNSEEDED}", file=sys.stderr, flush=True)

    def body(self, prompt: Prompt, params: SamplingParams, n: int, seed: int) -> tuple[str, dict[str, Any]]:
        """Path and JSON of a request; only fields that the server is known to take."""
        able = self.capabilities
        fields: dict[str, Any] = {"model": self.model_id, "max_tokens": params.max_new_tokens, "temperature": params.temperature}
        fields |= {"n": n} if n > 1 else {}
        fields |= {"top_p": params.top_p} if params.top_p is not None else {}
        fields |= {"stop": list(params.stop)} if params.stop else {}
        fields |= {"seed": seed % 2**63} if "seed" in able else {}
        fields |= {key: value for key in ("top_k", "min_p") if (value := getattr(params, key)) is not None}
        fields |= {"repetition_penalty": params.repetition_penalty} if params.repetition_penalty != 1.0 else {}
        fields |= {"min_tokens": params.min_new_tokens} if params.min_new_tokens else {}
        fields |= {"ignore_eos": True} if params.ignore_eos else {}
        stops = [*params.stop_ids, *(self.tokenizer.stop_ids if self.tokenizer is not None and not params.ignore_eos else ())]
        fields |= {"stop_token_ids": stops} if stops and "stop_ids" in able else {}
        unsaid = self.tokenizer.unsaid_ids if self.tokenizer is not None and "logit_bias" in able else ()
        fields |= {"logit_bias": {str(i): NEVER for i in unsaid}} if unsaid else {}
        fields |= {"return_token_ids": True} if "token_ids" in able else {}
        if params.constraint is not None:
            choice, regex = params.constraint.choice, params.constraint.regex
            fields["structured_outputs"] = {"choice": list(choice)} if choice is not None else {"regex": regex}
        talk = is_talk(prompt)
        if "logprobs" in able:
            k = params.logprobs or 0
            fields |= {"logprobs": True, "top_logprobs": k} if talk else {"logprobs": k}
            fields |= {"return_tokens_as_token_ids": True} if k else {}
        if talk:
            return "chat/completions", fields | {"messages": prompt}
        if not isinstance(prompt, str) and "ids" not in able:
            if self.tokenizer is None:
                raise EngineError("unsupported", f"{self.base_url} takes no token ids", retryable=False)
            prompt = self.tokenizer.decode(cast(list[int], prompt))
        return "completions", fields | {"prompt": prompt}

    async def _post(self, request: Request, n: int, seed: int) -> tuple[list[Completion], Usage]:
        path, fields = self.body(request.prompt, request.params, n, seed)
        assert self._client is not None
        try:
            answer = await self._client.post(path, json=fields)
        except httpx.TimeoutException as error:
            raise EngineError("timeout", f"no answer from {self.base_url} in time ({type(error).__name__})", retryable=True) from error
        except httpx.TransportError as error:
            raise EngineError("connection", f"{self.base_url}: {error or type(error).__name__}", retryable=True) from error
        check_status(answer, self.base_url)
        try:
            content = answer.json()
            found = [completion(choice) for choice in content["choices"]]
            spent = usage(content.get("usage") or {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError("bad_answer", f"{self.base_url} answered {answer.text[:200]!r}", retryable=True) from error
        if not found:
            raise EngineError("bad_answer", f"{self.base_url} answered with no completion", retryable=True)
        tried = not is_talk(request.prompt) or request.params.logprobs is not None  # what is asked of conversations was not tried on them
        if tried and "logprobs" in self.capabilities and any(one.text and not one.logprobs for one in found):
            raise EngineError("bad_answer", f"{self.base_url} left out the log-probabilities that it gave before", retryable=True)
        return [cut(one, request.params.stop) for one in found], spent

    def pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """See the contract. Raises UserError when the server fails."""
        with self._waiting() as client:
            self._refuse(Request("", prompt, params))
            self._mention_seeds(params)
            path, fields = self.body(prompt, params, 1, row_seed(params.seed, 0))
            fields = {key: value for key, value in fields.items() if key not in NOT_STREAMED}
            with client.stream("POST", path, json=fields | {"stream": True}) as answer:
                if answer.status_code != 200:
                    answer.read()
                check_status(answer, self.base_url)
                for line in answer.iter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        for choice in json.loads(data).get("choices", []):
                            text = choice.get("text") or (choice.get("delta") or {}).get("content")
                            if text:
                                yield text

    @contextmanager
    def _waiting(self) -> Iterator[httpx.Client]:
        """A client for calls one after the other; what goes wrong is a UserError."""
        try:
            with httpx.Client(**self._options) as client:
                yield client
        except EngineError as error:
            raise UserError(f"engine: {error}") from error
        except httpx.HTTPError as error:
            raise UserError(f"engine: {self.base_url} does not answer ({error or type(error).__name__})") from error

    def score(self, sequences: list[list[int]]) -> list[Tensor]:
        """See the contract. Raises UserError where the server does not give log-probabilities of a prompt."""
        if "score" not in self.capabilities:
            raise UserError(f"engine: {self.base_url} gives no log-probabilities of a prompt; take engine=native or a vLLM server")
        scores = []
        with self._waiting() as client:
            for ids in sequences:
                fields = {"model": self.model_id, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
                answer = client.post("completions", json=fields)
                check_status(answer, self.base_url)
                steps = answer.json()["choices"][0]["prompt_logprobs"][1:]
                scores.append(torch.tensor([step[str(i)]["logprob"] for i, step in zip(ids[1:], steps, strict=True)]))
        return scores


def check_status(answer: httpx.Response, where: str) -> None:
    """Raise EngineError for anything but 200. A prompt that is too long is an error of that kind, in whatever words it is said."""
    code = answer.status_code
    if code == 200:
        return
    try:
        said = answer.json()
        said = said.get("message") or (said.get("error") or {}).get("message") or said.get("detail") or said
    except (ValueError, AttributeError):
        said = answer.text
    wait = seconds_to_wait(answer.headers.get("retry-after", ""))
    long = code in REFUSING and isinstance(said, str) and SAID.search(said) is not None
    kind, message = TOO_LONG if long else f"http_{code}", f"{where} answered {code}: {str(said)[:300]}"
    raise EngineError(kind, message, code in RETRYABLE or code >= 500, wait)


def is_talk(prompt: Prompt) -> bool:
    """Whether it is a conversation."""
    return isinstance(prompt, list) and (not prompt or isinstance(prompt[0], dict))


def completion(choice: dict[str, Any]) -> Completion:
    """One choice of an answer, of either path."""
    message = choice.get("message")
    text = choice["text"] if message is None else message["content"]
    found = choice.get("logprobs") or {}
    steps = found.get("content")  # of a conversation: [{logprob, top_logprobs: [{token, logprob}]}]
    logprobs = found.get("token_logprobs") if steps is None else [step["logprob"] for step in steps]
    tops = found.get("top_logprobs") if steps is None else [{t["token"]: t["logprob"] for t in s["top_logprobs"]} for s in steps]
    reason, why = choice.get("finish_reason"), choice.get("stop_reason")
    return Completion(
        list(choice.get("token_ids") or []), text or "", [float(p) for p in logprobs or []],
        reason if reason in ("stop", "length") else "abort", why if why is not None or reason in ("stop", "length") else reason,
        [by_id(top) for top in tops] if tops and all(by_id(top) for top in tops) else None,
    )  # fmt: skip


def cut(found: Completion, stop: Sequence[str]) -> Completion:
    """The same up to the first stop string, for servers that go past it; its ids and log-probabilities stay what the server said."""
    ends = [(place, one) for one in stop if (place := found.text.find(one)) >= 0]
    if not ends:
        return found
    place, one = min(ends)
    return replace(found, text=found.text[:place], finish_reason="stop", stop_reason=one)


def by_id(top: dict[str, float] | None) -> dict[int, float]:
    """{id: log-probability} of what vLLM writes as token_id:N; {} for anything else."""
    named = {key.removeprefix("token_id:"): value for key, value in (top or {}).items()}
    return {int(key): value for key, value in named.items()} if all(key.isdigit() for key in named) else {}


def usage(said: dict[str, Any]) -> Usage:
    """Tokens as the server counts them."""
    cached = (said.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(int(said.get("prompt_tokens") or 0), int(said.get("completion_tokens") or 0), int(cached))
