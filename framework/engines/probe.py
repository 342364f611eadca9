"""What a server can do, tried out with a few tokens each: several accept a field and ignore it.

A server that is busy says nothing about what it can do, so it is asked again, as for any other request; only what it refuses, or
fails at every time, is what it cannot do.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from components.contracts import Tokenizer, UserError
from framework.engines.requests import EngineError, Retry, seconds_to_wait

BUSY = (408, 409, 429, 502, 503, 504)  # the server's state, not its abilities
ODD = 2  # times that something is asked which fails in another way: once may be chance
SAID_SECONDS = 2  # of waiting, from which on it is said
TRIED_TOKENS = 8
WORD = "4711"  # no model says it by chance


@dataclass(frozen=True)
class Found:
    """What was found out about a server."""

    name: str
    context_length: int | None
    capabilities: frozenset[str]


def probe(client: httpx.Client, where: str, name: str | None, tokenizer: Tokenizer | None, retry: Retry) -> Found:
    """Ask the server for its models, and try what it can do. client: with the base URL. retry: while it is busy.

    Raises:
        UserError: it does not answer, has no such model, completes nothing, or is busy to the last attempt.
    """
    name, context_length = choose_model(client, where, name, retry)
    tried = Tried(client, where, name, retry)
    plain = tried.ask()
    if plain is None and tried.ask(path="chat/completions") is None:
        raise UserError(f"engine.base_url: {where} completes nothing with the model {name!r}; it answered {tried.last}")
    if plain is None:
        return Found(name, context_length, frozenset({"pieces", "n"} if tried.count(path="chat/completions") == 2 else {"pieces"}))
    able = {"pieces", "texts"}
    ids = [tokenizer.eot_id] if tokenizer is not None else [1]
    able |= {"ids"} if tried.ask(prompt=ids) else set()
    able |= {"n"} if tried.count() == 2 else set()
    able |= {"logprobs"} if (tried.first(logprobs=0).get("logprobs") or {}).get("token_logprobs") else set()
    able |= {"token_ids"} if tried.first(return_token_ids=True).get("token_ids") else set()
    named = (tried.first(logprobs=1, return_tokens_as_token_ids=True).get("logprobs") or {}).get("top_logprobs") or []
    able |= {"alternatives"} if named and all(key.startswith("token_id:") for step in named for key in step) else set()
    texts = [tried.first(seed=seed, temperature=1.0, max_tokens=TRIED_TOKENS) for seed in (1, 1, 2, 3, 4)]
    said = [(choice.get("text"), str((choice.get("logprobs") or {}).get("token_logprobs"))) for choice in texts]
    able |= {"seed"} if said[0] == said[1] and len(set(said)) > 1 else set()
    able |= {"top_k"} if tried.ask(top_k=1) else set()
    able |= {"min_p"} if tried.ask(min_p=1.0) else set()
    able |= {"repetition_penalty"} if tried.ask(repetition_penalty=1.1) else set()
    able |= {"stop_ids"} if tried.ask(stop_token_ids=ids) else set()
    (letter,) = tokenizer.encode("x")[:1] if tokenizer is not None else [None]
    able |= {"logit_bias"} if letter is not None and tried.first(logit_bias={str(letter): 100}).get("text") == "x" else set()
    answer = tried.ask(ignore_eos=True, max_tokens=TRIED_TOKENS)
    able |= {"ignore_eos"} if answer and (answer.get("usage") or {}).get("completion_tokens") == TRIED_TOKENS else set()
    able |= {"choice"} if tried.first(structured_outputs={"choice": [WORD]}, max_tokens=2 * TRIED_TOKENS).get("text") == WORD else set()
    able |= {"regex"} if tried.first(structured_outputs={"regex": WORD}, max_tokens=2 * TRIED_TOKENS).get("text") == WORD else set()
    able |= {"score"} if tried.first(prompt=[*ids, *ids], prompt_logprobs=0).get("prompt_logprobs") else set()
    return Found(name, context_length, frozenset(able))


def choose_model(client: httpx.Client, where: str, name: str | None, retry: Retry) -> tuple[str, int | None]:
    """Name and context length of the model. Raises UserError."""
    try:
        answer = client.get("models")
        if answer.status_code in BUSY:
            answer = patient(lambda: client.get("models"), where, retry)
        models = answer.json()["data"] if answer.status_code == 200 else []
    except httpx.TransportError as error:
        raise UserError(f"engine.base_url: {where} does not answer ({error or type(error).__name__}); is the server up?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"engine.base_url: {where}/models is no list of models; does the address end with /v1?") from error
    offered = {str(model["id"]): model.get("max_model_len") for model in models}
    if name is None:
        if len(offered) != 1:
            raise UserError(f"engine.name: null, and {where} offers {', '.join(offered) or 'no model by name'}; say which")
        (name,) = offered
    elif offered and name not in offered:
        near = difflib.get_close_matches(name, offered, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"engine.name: {name!r}; {where} offers {', '.join(offered)}{hint}")
    return name, offered.get(name)


def patient(send: Callable[[], httpx.Response], where: str, retry: Retry) -> httpx.Response:
    """The first response of a server that is not busy, asked as often and with such pauses as `retry` says.

    Raises: UserError where it is busy or gone to the last attempt, or lets the time of a request pass; httpx.HTTPError for the rest.
    """
    for attempt in range(retry.max_attempts):
        after = None
        try:
            answer = send()
            if answer.status_code not in BUSY:
                return answer
            said, after = f"answered {answer.status_code}", seconds_to_wait(answer.headers.get("retry-after", ""))
        except httpx.ConnectError as error:
            said = f"does not answer any more ({error or type(error).__name__})"
        except httpx.TimeoutException as error:
            raise UserError(f"engine.request_timeout_s: {where} did not say a few tokens in that time") from error
        if attempt + 1 < retry.max_attempts:
            seconds = retry.wait(attempt, EngineError("busy", said, True, after))
            if seconds >= SAID_SECONDS:
                print(f"{where} {said}; it is asked again in {seconds:.0f} s", file=sys.stderr, flush=True)
            time.sleep(seconds)
    raise UserError(f"engine.base_url: {where} {said}, {retry.max_attempts} time(s); what it can do was not found out; start again later")


class Tried:
    """Small requests to one model; what it refuses is None, whatever the reason. Raises UserError while it cannot be known."""

    def __init__(self, client: httpx.Client, where: str, name: str, retry: Retry) -> None:
        self._client, self._where, self._name, self._retry, self.last = client, where, name, retry, "nothing"

    def ask(self, path: str = "completions", **fields: Any) -> dict[str, Any] | None:
        """The answer to a request with these fields besides the plain ones."""
        asked = {"prompt": "1"} if path == "completions" else {"messages": [{"role": "user", "content": "1"}]}
        body = {"model": self._name, "max_tokens": 1, "temperature": 0.0, **asked, **fields}
        for _ in range(ODD):
            try:
                answer = patient(lambda: self._client.post(path, json=body), self._where, self._retry)
                self.last = f"{answer.status_code}: {answer.text[:200]}"
                content = answer.json() if answer.status_code == 200 else None
            except (httpx.HTTPError, ValueError) as error:
                self.last = str(error) or type(error).__name__
                continue
            if isinstance(content, dict) and content.get("choices"):
                return content
            if 400 <= answer.status_code < 500:
                break
        return None

    def first(self, **fields: Any) -> dict[str, Any]:
        """The first choice of the answer; {} for none."""
        answer = self.ask(**fields)
        return answer["choices"][0] if answer else {}

    def count(self, path: str = "completions") -> int:
        """How many answers come where two are asked for."""
        answer = self.ask(path=path, n=2, temperature=1.0)
        return len(answer["choices"]) if answer else 0
