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

from components.contracts import Completion, Decoding, Prompt, Request, Result, SamplingParams, Tokenizer, Usage, UserError
from components.decoding.sampling import check_params, sample_token, uniforms

Row = tuple[int, list[int], SamplingParams, int]  # place in the call, ids, parameters, row of the random numbers


class TransformersEngine:
    """Left-padded batches of up to max_batch prompts through `model.generate`.

    Tokens are drawn by our own rule from transformers' logits, so that a row depends on its seed and not on its batch-mates, and says what
    engine=native says where the logits are equal.

    Args:
        folder: a checkpoint that transformers reads, such as the run's export.
        tokenizer: the run's.
        max_batch: rows of a batch; prompts of similar length share one.
        dtype: of the weights.
        device: where the model is put, or auto.

    Raises: UserError where transformers is missing or cannot read the folder.
    """

    takes = "export"
    reader: Literal["transformers", "vllm"] = "transformers"
    capabilities = frozenset({"n", "seed", "logprobs", "token_ids", "score"})

    def __init__(self, folder: Path, tokenizer: Tokenizer, max_batch: int, dtype: Literal["float32", "bfloat16"], device: str) -> None:
        if max_batch < 1:
            raise UserError(f"engine.max_batch: {max_batch}; at least 1 is allowed")
        try:
            from transformers import AutoModelForCausalLM, GenerationConfig
        except ImportError as error:
            raise UserError("engine: transformers is not installed; pip install transformers, or take engine=native") from error
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        read: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = read.to(place).eval()
        self.model.generation_config = GenerationConfig()  # what the folder says there, our sampling does already
        self.tokenizer, self.max_batch = tokenizer, max_batch
        self.engine_id, self.model_id = "transformers", Path(folder).name
        self.tokenizer_id = str(getattr(tokenizer, "fingerprint", ""))
        self.context_length: int | None = None  # nothing ends it
        self._blocked = torch.arange(self.model.config.vocab_size, device=place) >= tokenizer.vocab_size
        self._blocked[list(tokenizer.unsaid_ids)] = True
        self._generated = 0

    def generate(self, prompts: Sequence[Prompt], params: Decoding) -> list[Completion]:
        """See the contract."""
        done = dict(self.completions(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def completions(self, prompts: Sequence[Prompt], params: Decoding) -> Iterator[tuple[int, Completion]]:
        """See the contract. Raises UserError for a prompt that is no ids, or parameters that this engine does not have."""
        if isinstance(params, SamplingParams):
            rows = [(index, self._ids(prompt), params, index) for index, prompt in enumerate(prompts)]
        else:
            rows = [(index, self._ids(prompt), one, 0) for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))]
        for _, _, one, _ in rows:
            check_params(one)
        alike = sorted(rows, key=lambda row: (repr(replace(row[2], seed=0)), len(row[1])))
        for _, group in itertools.groupby(alike, key=lambda row: replace(row[2], seed=0)):
            for batch in batched(group, self.max_batch):
                yield from zip([row[0] for row in batch], self._batch(batch), strict=True)

    def pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The whole text at once: a static batch has no pieces."""
        yield self.generate([prompt], params)[0].text

    async def stream(self, requests: AsyncIterable[Request], *, concurrency: int) -> AsyncIterator[Result]:
        """See the contract; as many requests as are to run at a time make a round."""
        async for some in gathered(requests, concurrency):
            for request, result in await asyncio.to_thread(self._round, some):
                yield replace(result, request_id=request.id)

    def _ids(self, prompt: Prompt) -> list[int]:
        """Raise ValueError for a text, a conversation, nothing, or an id that the model does not have."""
        if isinstance(prompt, str) or not all(isinstance(part, int) for part in prompt):
            raise ValueError("this engine takes token ids; render texts and conversations first")
        ids, size = cast(list[int], prompt), self.model.config.vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < size:
            raise ValueError(
                f"a prompt of {len(ids)} ids up to {max(ids, default=0)}; at least one is needed, and the model knows 0 to {size - 1}"
            )
        return ids

    def _round(self, requests: list[Request]) -> list[tuple[Request, Result]]:
        began, rows, found = time.monotonic(), list[Row](), dict[int, Result]()
        for place, request in enumerate(requests):
            try:
                check_params(request.params)
                ids = self._ids(request.prompt)
                rows += [(place, ids, request.params, sample) for sample in range(request.n)]
                found[place] = Result(request.id, [], Usage(prompt=len(ids)), {}, self.engine_id)
            except (UserError, ValueError) as error:
                found[place] = Result(request.id, [], Usage(), {}, self.engine_id, str(error))
        alike = sorted(rows, key=lambda row: (repr(replace(row[2], seed=0)), len(row[1]), row[0], row[3]))
        for _, group in itertools.groupby(alike, key=lambda row: replace(row[2], seed=0)):
            for batch in batched(group, self.max_batch):
                for (place, *_), completion in zip(batch, self._batch(batch), strict=True):
                    found[place].completions.append(completion)
                    found[place].usage.completion += len(completion.token_ids)
        for result in found.values():
            result.latency = {"total": time.monotonic() - began}
        return [(request, found[place]) for place, request in enumerate(requests)]

    def _batch(self, rows: list[Row]) -> list[Completion]:
        """Complete rows with the same parameters but for their seeds."""
        params, longest = rows[0][2], max(len(ids) for _, ids, _, _ in rows)
        stops = {*params.stop_ids, *(() if params.ignore_eos else self.tokenizer.stop_ids)}
        ids = torch.tensor([[self.tokenizer.eot_id] * (longest - len(row)) + row for _, row, _, _ in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for _, row, _, _ in rows], device=self.model.device)
        choose = Chooser([(one.seed, row) for _, _, one, row in rows], params, longest, self._blocked)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=params.max_new_tokens, logits_processor=[choose],
                eos_token_id=sorted(stops) or None, pad_token_id=self.tokenizer.eot_id,
                min_new_tokens=params.min_new_tokens or None,
            )  # fmt: skip
        logprobs = torch.stack(choose.logprobs, 1).tolist()
        return [self._complete(said, known, stops) for said, known in zip(out[:, longest:].tolist(), logprobs, strict=True)]

    def _complete(self, said: list[int], logprobs: list[float], stops: set[int]) -> Completion:
        end = next((place for place, token in enumerate(said) if token in stops), None)
        said = said if end is None else said[: end + 1]
        self._generated += len(said)
        text = self.tokenizer.decode(said if end is None else said[:-1])
        reason = "length" if end is None else "stop"
        return Completion(said, text, logprobs[: len(said)], cast(Any, reason), None if end is None else said[-1])

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

    def __init__(self, draws: list[tuple[int, int]], params: SamplingParams, start: int, blocked: Tensor) -> None:
        """draws: (seed, row) of each row's random numbers; start: length of the padded prompts."""
        self.draws, self.params, self.start, self.blocked = draws, params, start, blocked
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.start
        drawn = torch.cat([uniforms(seed, [row], [position]) for seed, row in self.draws])
        chosen, logprobs = sample_token(scores.float(), self.params, drawn, self.blocked)
        self.logprobs.append(logprobs.cpu())
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def batched(rows: Any, size: int) -> Iterator[list[Row]]:
    """Lists of up to `size` rows."""
    source = iter(rows)
    while some := list(itertools.islice(source, size)):
        yield some


async def gathered(requests: AsyncIterable[Request], size: int) -> AsyncIterator[list[Request]]:
    """Lists of up to `size` requests."""
    some: list[Request] = []
    async for request in requests:
        some.append(request)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
