"""What callers of the server may ask: OpenAI's fields, and vLLM's names for the rest. Anything else is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Constraints(Form):
    choice: list[str] | None = None
    regex: str | None = None


class StreamOptions(Form):
    include_usage: bool = False


class Asked(Form):
    """Fields that both forms share. null is the same as a field that is not there."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: Constraints | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # tokens are always written so
    user: str | None = None  # who asks; nothing is done with it
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @property
    def regex(self) -> str | None:
        return self.structured_outputs.regex if self.structured_outputs is not None else None

    @property
    def choice(self) -> list[str] | None:
        return self.structured_outputs.choice if self.structured_outputs is not None else None

    @property
    def wants_logprobs(self) -> bool:
        raise NotImplementedError

    def most_tokens(self) -> int | None:
        return self.max_tokens

    def beyond_text(self) -> str | None:
        """A field that asks for more than a text, or for one of a form; None for none."""
        wanted = {"structured_outputs": self.structured_outputs, "prompt_logprobs": getattr(self, "prompt_logprobs", None)}
        wanted |= {"top_logprobs" if hasattr(self, "top_logprobs") else "logprobs": self.alternatives()}
        return next((field for field, value in wanted.items() if value is not None), None)

    def alternatives(self) -> int | None:
        raise NotImplementedError

    def given(self) -> dict[str, Any]:
        """The parameters that the caller set, by our names."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        found = {
            "max_new_tokens": self.most_tokens(), "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "min_p": self.min_p, "repetition_penalty": self.repetition_penalty, "seed": self.seed, "min_new_tokens": self.min_tokens,
            "stop": tuple(stop) if stop is not None else None, "ignore_eos": self.ignore_eos, "logprobs": self.alternatives(),
            "stop_ids": tuple(self.stop_token_ids) if self.stop_token_ids is not None else None,
        }  # fmt: skip
        return {key: value for key, value in found.items() if value is not None}


class CompletionForm(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Literal[0] | None = None  # of the prompt's own tokens
    echo: Literal[False] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several; a list of ids is one."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    def alternatives(self) -> int | None:
        return self.logprobs or None


class Said(Form):
    role: str
    content: str
    name: str | None = Field(default=None, exclude=True)


class ChatForm(Asked):
    messages: Annotated[list[Said], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: int | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def alternatives(self) -> int | None:
        return self.top_logprobs or None
