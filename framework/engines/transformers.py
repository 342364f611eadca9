"""Option engine=transformers: the run's export in transformers' own `generate`, one static batch after the other."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from components.contracts import (
    CANCELLED,
    Completion,
    Decoding,
    OnPiece,
    Prompt,
    Request,
    Result,
    SamplingParams,
    Tokenizer,
    Usage,
    UserError,
)
from components.decoding.sampling import RowSampling, check_params, sample_token, seen_tokens
from components.decoding.stops import TextStream
from framework.engines.fitting import TOO_LONG, refusal
from framework.engines.requests import told

GATHER_SECONDS = 0.02  # after the first request of a batch
Row = tuple[int, list[int], SamplingParams, int]  # place in the call, ids, parameters, row of the random numbers


class TransformersEngine:
    """Left-padded batches of up to max_batch prompts through `model.generate`.

    Tokens are drawn by our own rule from transformers' logits, so that a row depends on its seed and not on its batch-mates, and says what
    engine=native says where the logits are equal.

    Args:
        folder: a checkpoint that transformers reads, such as the run's export.
        tokenizer: the run's.
        max_batch: rows of a batch; prompts of similar length share one.
        context_length: most tokens of a prompt and its answer; longer requests are refused. None: no end.
        dtype: of the weights.
        device: where the model is put, or auto.

    Raises: UserError where transformers is missing or cannot read the folder.
    """

    takes = "export"
    reader: Literal["transformers", "vllm"] = "transformers"
    capabilities = frozenset(
        {"n", "seed", "logprobs", "token_ids", "score", "top_k", "min_p", "repetition_penalty", "stop_ids", "ignore_eos"}
    )

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, max_batch: int, context_length: int | None, dtype: Literal["float32", "bfloat16"],
        device: str,
    ) -> None:  # fmt: skip
        for key, value in (("max_batch", max_batch), ("context_length", context_length)):
            if value is not None and value < 1:
                raise UserError(f"engine.{key}: {value}; at least 1 is allowed")
        try:
            from transformers import AutoModelForCausalLM, GenerationConfig
        except ImportError as error:
            raise UserError("engine: transformers is not installed; pip install transformers, or take engine=native") from error
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        read: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = read.to(place).eval()
        self.model.generation_config = GenerationConfig()  # what the folder says there, our sampling does already
        self.tokenizer, self.max_batch, self.dtype = tokenizer, max_batch, getattr(torch, dtype)
        self.engine_id, self.model_id = "transformers", Path(folder).name
        self.tokenizer_id = str(getattr(tokenizer, "fingerprint", ""))
        self.context_length = context_length
        self._blocked = torch.arange(self.model.config.vocab_size, device=place) >= tokenizer.vocab_size
        self._blocked[list(tokenizer.unsaid_ids)] = True
        self._generated = 0
        self._cancelled: set[str] = set()

    def generate(self, prompts: Sequence[Prompt], params: Decoding) -> list[Completion]:
        """See the contract."""
        done = dict(self.completions(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def completions(self, prompts: Sequence[Prompt | None], params: Decoding, first: int = 0) -> Iterator[tuple[int, Completion]]:
        """See the contract. Raises UserError for a prompt that is no ids or too long, or parameters that this engine does not have."""
        single = isinstance(params, SamplingParams)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        asked = [(i, prompt, one) for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)) if prompt is not None]
        rows = [(i, self._ids(prompt, one, f"prompt {first + i}"), one, first + i if single else 0) for i, prompt, one in asked]
        for _, _, one, _ in rows:
            self._check(one)
        for batch in batches(rows, self.max_batch):
            yield from zip([row[0] for row in batch], self._batch(batch), strict=True)

    def pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The whole text at once: a static batch has no pieces."""
        yield self.generate([prompt], params)[0].text

    async def stream(self, requests: AsyncIterable[Request], *, concurrency: int, on_piece: OnPiece | None = None) -> AsyncIterator[Result]:
        """See the contract; as many requests as are to run at a time make a round."""
        async for some in gathered(requests, concurrency):
            for request, result in await asyncio.to_thread(self._round, some):
                if request.id in self._cancelled:
                    result = replace(result, completions=[], error=CANCELLED)
                yield told(replace(result, request_id=request.id), on_piece)
            self._cancelled.clear()

    def cancel(self, request: str) -> None:
        """See the contract. transformers' generate cannot be stopped: a batch is written to its end, and the answer dropped."""
        self._cancelled.add(request)

    def _ids(self, prompt: Prompt, params: SamplingParams, name: str) -> list[int]:
        """Raise ValueError for a text, a conversation, nothing, or an id that the model does not have; UserError for too many ids."""
        if isinstance(prompt, str) or not all(isinstance(part, int) for part in prompt):
            raise ValueError("this engine takes token ids; render texts and conversations first")
        ids, size = cast(list[int], prompt), self.model.config.vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < size:
            raise ValueError(
                f"a prompt of {len(ids)} ids up to {max(ids, default=0)}; at least one is needed, and the model knows 0 to {size - 1}"
            )
        if self.context_length is not None and len(ids) + params.max_new_tokens > self.context_length:
            limit = self.context_length
            raise UserError(f"{TOO_LONG}: {name}: {refusal(len(ids), params.max_new_tokens, limit, 'of engine.context_length')}")
        return ids

    def _round(self, requests: list[Request]) -> list[tuple[Request, Result]]:
        began, rows, found = time.monotonic(), list[Row](), dict[int, Result]()
        for place, request in enumerate(requests):
            try:
                self._check(request.params)
                ids = self._ids(request.prompt, request.params, "prompt")
                rows += [(place, ids, request.params, sample) for sample in range(request.n)]
                found[place] = Result(request.id, [], Usage(prompt=len(ids) * request.n), {}, self.engine_id)
            except (UserError, ValueError) as error:
                found[place] = Result(request.id, [], Usage(), {}, self.engine_id, str(error))
        said: dict[tuple[int, int], Completion] = {}
        for batch in batches(rows, self.max_batch):
            said |= zip([(place, sample) for place, _, _, sample in batch], self._batch(batch), strict=True)
        for (place, _), completion in sorted(said.items(), key=lambda item: item[0]):
            found[place].completions.append(completion)
            found[place].usage.completion += len(completion.token_ids)
        for result in found.values():
            result.latency = {"total": time.monotonic() - began}
        return [(request, found[place]) for place, request in enumerate(requests)]

    def _check(self, params: SamplingParams) -> None:
        """Raise UserError for values that are not allowed, and a constraint, which this engine does not have."""
        check_params(params)
        if params.constraint is not None or params.logprobs is not None:
            raise UserError("engine: transformers has no decode.regex, decode.choice and alternatives here; take engine=native or vllm")

    def _batch(self, rows: list[Row]) -> list[Completion]:
        """Complete rows that may stop at the same ids and are as long at most."""
        params, longest = rows[0][2], max(len(ids) for _, ids, _, _ in rows)
        stops = stops_of(params, self.tokenizer)
        ids = torch.tensor([[self.tokenizer.eot_id] * (longest - len(row)) + row for _, row, _, _ in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for _, row, _, _ in rows], device=self.model.device)
        own = [one for _, _, one, _ in rows]
        sampling = RowSampling.of(own, [row for *_, row in rows], [sorted(stops)] * len(rows), self.model.device)
        choose = Chooser(sampling, longest, self._blocked, [row for _, row, _, _ in rows])
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=params.max_new_tokens, logits_processor=[choose],
                eos_token_id=sorted(stops) or None, pad_token_id=self.tokenizer.eot_id,
            )  # fmt: skip
        logprobs = torch.stack(choose.logprobs, 1).tolist()
        return [self._complete(*row, stops) for row in zip(own, out[:, longest:].tolist(), logprobs, strict=True)]

    def _complete(self, params: SamplingParams, said: list[int], logprobs: list[float], stops: set[int]) -> Completion:
        """Cut a row at its first stop id, or at its first stop string, which transformers went past."""
        end = next((place for place, token in enumerate(said) if token in stops), None)
        text = TextStream(cast(Any, self.tokenizer), params.stop)
        text.extend(said if end is None else said[:end])
        text.flush()
        why: str | int | None
        if text.stopped is not None:
            said, why = said[: text.tokens], text.stopped
        else:
            said, why = (said, None) if end is None else (said[: end + 1], said[end])
        self._generated += len(said)
        return Completion(said, text.text, logprobs[: len(said)], "length" if why is None else "stop", why)

    def score(self, sequences: list[list[int]]) -> list[Tensor]:
        """See the contract; one sequence a forward."""
        scores = []
        for sequence in sequences:
            ids = torch.tensor([sequence], device=self.model.device)
            with torch.inference_mode():
                logits = self.model(ids[:, :-1]).logits[0].float()
            scores.append((logits.gather(1, ids[0, 1:, None]).squeeze(1) - logits.logsumexp(-1)).cpu())
        return scores

    def diagnostics(self) -> dict[str, float]:
        """Tokens generated so far."""
        return {"tokens": float(self._generated)}

    def close(self) -> None:
        """Nothing outlives the object."""


class Chooser:
    """A logits processor that leaves one token: the one that our sampling draws. logprobs: of the chosen tokens, (B,) a step."""

    def __init__(self, sampling: RowSampling, start: int, blocked: Tensor, prompts: list[list[int]]) -> None:
        """start: length of the padded prompts; blocked: (V,) bool."""
        self.sampling, self.start, self.blocked = sampling, start, blocked
        self.seen = seen_tokens(prompts, len(blocked), blocked.device) if sampling.penalty is not None else None
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        positions = [input_ids.shape[1] - self.start] * len(input_ids)
        blocked = self.sampling.blocked(self.blocked, positions)
        chosen, logprobs = sample_token(scores.float(), self.sampling, self.sampling.uniforms(positions), blocked, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        self.logprobs.append(logprobs.cpu())
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def stops_of(params: SamplingParams, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a row."""
    return {*params.stop_ids, *(() if params.ignore_eos else tokenizer.stop_ids)}


def batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Batches of up to `size` rows that end alike, those of similar length together."""

    def kind(row: Row) -> tuple[int, tuple[int, ...], bool]:
        return row[2].max_new_tokens, row[2].stop_ids, row[2].ignore_eos

    alike = sorted(rows, key=lambda row: (kind(row), len(row[1])))
    for _, group in itertools.groupby(alike, key=kind):
        while batch := list(itertools.islice(group, size)):
            yield batch


async def gathered(requests: AsyncIterable[Request], size: int) -> AsyncIterator[list[Request]]:
    """Lists of up to `size` requests: those that have come by the time that no other one comes soon."""
    source = aiter(requests)
    coming: asyncio.Future[Any] = asyncio.ensure_future(anext(source, None))  # type: ignore[arg-type]
    try:
        while True:
            some: list[Request] = []
            while len(some) < size:
                done, _ = await asyncio.wait({coming}, timeout=GATHER_SECONDS if some else None)
                if not done:
                    break
                if (request := coming.result()) is None:
                    if some:
                        yield some
                    return
                some.append(request)
                coming = asyncio.ensure_future(anext(source, None))  # type: ignore[arg-type]
            yield some
    finally:
        coming.cancel()
