"""What a server can do, tried out with a few tokens each: several accept a field and ignore it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import httpx

from components.contracts import Tokenizer, UserError

TRIED_TOKENS = 8
WORD = "4711"  # no model says it by chance


@dataclass(frozen=True)
class Found:
    """What was found out about a server."""

    name: str
    context_length: int | None
    capabilities: frozenset[str]


def probe(client: httpx.Client, where: str, name: str | None, tokenizer: Tokenizer | None) -> Found:
    """Ask the server for its models, and try what it can do. client: with the base URL.

    Raises:
        UserError: it does not answer, has no such model, or completes nothing.
    """
    name, context_length = choose_model(client, where, name)
    tried = Tried(client, name)
    plain = tried.ask()
    if plain is None and tried.ask(path="chat/completions") is None:
        raise UserError(f"engine.base_url: {where} completes nothing with the model {name!r}; it answered {tried.last}")
    if plain is None:
        return Found(name, context_length, frozenset({"pieces", "n"} if tried.count(path="chat/completions") == 2 else {"pieces"}))
    able = {"pieces"}
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


def choose_model(client: httpx.Client, where: str, name: str | None) -> tuple[str, int | None]:
    """Name and context length of the model. Raises UserError."""
    try:
        answer = client.get("models")
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


class Tried:
    """Small requests to one model; what fails is None, whatever the reason."""

    def __init__(self, client: httpx.Client, name: str) -> None:
        self._client, self._name, self.last = client, name, "nothing"

    def ask(self, path: str = "completions", **fields: Any) -> dict[str, Any] | None:
        """The answer to a request with these fields besides the plain ones."""
        asked = {"prompt": "1"} if path == "completions" else {"messages": [{"role": "user", "content": "1"}]}
        try:
            answer = self._client.post(path, json={"model": self._name, "max_tokens": 1, "temperature": 0.0, **asked, **fields})
            self.last = f"{answer.status_code}: {answer.text[:200]}"
            content = answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            self.last = str(error) or type(error).__name__
            return None
        return content if isinstance(content, dict) and content.get("choices") else None

    def first(self, **fields: Any) -> dict[str, Any]:
        """The first choice of the answer; {} for none."""
        answer = self.ask(**fields)
        return answer["choices"][0] if answer else {}

    def count(self, path: str = "completions") -> int:
        """How many answers come where two are asked for."""
        answer = self.ask(path=path, n=2, temperature=1.0)
        return len(answer["choices"]) if answer else 0
