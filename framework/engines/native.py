"""Option engine=native: our own decoding loop over a live model (components/decoding/batching.py), for every model of the project."""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from components.contracts import (
    CANCELLED,
    Batch,
    Completion,
    Decoding,
    Model,
    OnPiece,
    Prompt,
    Request,
    Result,
    RopeSpec,
    SamplingParams,
    Tokenizer,
    UserError,
)
from components.decoding.batching import Batcher, Row, never_said, rope_switch, stops_of
from components.decoding.constraints import Constraints, Machine
from components.decoding.forward import Forward
from components.decoding.sampling import check_params
from framework.engines.fitting import TOO_LONG, refusal
from framework.engines.native_jobs import Job, feed, said_of

log = logging.getLogger(__name__)

HEAD_ELEMENTS = 1 << 22  # logits held at once while scoring: 16 MiB of float32, however long the sequence and large the vocabulary


class NativeEngine:
    """Continuous batching over a live model, on its device: prefill, then one step for all rows at a time, always from the cache.

    Finished rows leave at once and waiting prompts take their places. What a row says depends on its prompt, its parameters and its
    random numbers alone. `token_ids` and `logprobs` of a completion include the stop token, `text` does not. Prompts are token ids.

    Args:
        model: called in eval mode without gradients; its mode is restored after every step, so a model in training can be passed.
        tokenizer: its `stop_ids` stop a row; its `unsaid_ids`, and rows of the head above its vocabulary, are never sampled.
        max_batch: rows decoded together; more prompts wait.
        prefill_chunk: prompt tokens between two steps of the running rows, and a forward at most.
        kv_tokens: most tokens in the caches of all rows, rows times the longest that one can come to; prompts that are being read have at
            most as many again. None: no bound but max_batch.
        context_length: most tokens of a prompt and its answer; longer requests are refused. None: no end.
        dtype: float32, or bfloat16 autocast.
        packed: during a generation on a CPU in float32, hold the weights in a faster layout too (components/decoding/forward.py).
        static_steps: decode in buffers that never move (components/decoding/graph_step.py), where the model's state is of constant size.
            auto: on a CUDA device, as a replayed CUDA graph; always: elsewhere too, without a graph; never.

    Example:
        >>> engine = NativeEngine(run.model, run.tokenizer)  # doctest: +SKIP
        >>> engine.generate([[run.tokenizer.eot_id]], SamplingParams(max_new_tokens=8))  # doctest: +SKIP
    """

    capabilities = frozenset(
        {"n", "seed", "logprobs", "alternatives", "token_ids", "score", "regex", "choice", "pieces", "ignore_eos", "min_p"}
        | {"repetition_penalty"}
    )

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        max_batch: int = 32,
        prefill_chunk: int = 256,
        kv_tokens: int | None = None,
        context_length: int | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        packed: bool = True,
        static_steps: Literal["auto", "always", "never"] = "never",
    ) -> None:
        for key, value in (
            ("max_batch", max_batch),
            ("prefill_chunk", prefill_chunk),
            ("kv_tokens", kv_tokens),
            ("context_length", context_length),
        ):
            if value is not None and value < 1:
                raise UserError(f"engine.{key}: {value}; at least 1 is allowed")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_chunk, self.dtype = max_batch, prefill_chunk, getattr(torch, dtype)
        self.kv_tokens, self.packed = kv_tokens, packed
        self.context_length = min((most for most in (context_length, kv_tokens) if most is not None), default=None)
        self.engine_id = "native"
        self.model_id = type(model).__name__
        self.tokenizer_id = f"{type(tokenizer).__name__}-{tokenizer.vocab_size}"
        self._forward = Forward(model, self.dtype)
        self.device = self._forward.device
        self.stop_ids = set(tokenizer.stop_ids)
        self._blocked = never_said(model.vocab_size, tokenizer, self.device)
        self._constraints = Constraints(cast(Any, tokenizer), model.vocab_size, self.device)
        self._static = static_steps == "always" or (static_steps == "auto" and self.device.type == "cuda")
        self._lock = threading.Lock()  # one step of the model at a time: its mode is changed during one
        self._warned = False
        self._generated = 0
        self._under_way: dict[str, bool] = {}  # requests of a stream, and whether each was cancelled

    def generate(self, prompts: Sequence[Prompt], params: Decoding) -> list[Completion]:
        """Complete every prompt (token ids that start with the document start). Returns completions in the order of the prompts.

        Raises:
            UserError: a parameter out of range, a row that is too long, or a model whose logits are not finite.
            ValueError: a prompt that is empty or not of ids, or an id outside the model's vocabulary.
        """
        done = dict(self.completions(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def completions(self, prompts: Sequence[Prompt | None], params: Decoding, first: int = 0) -> Iterator[tuple[int, Completion]]:
        """As `generate`, but yields (index of the prompt, completion) as soon as each is finished. None and first: see the contract."""
        single = isinstance(params, SamplingParams)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(each)} sampling parameters; give one for all, or one each")
        index_of = {
            self._row(prompt, own, first + index if single else 0, f"prompt {first + index}"): index
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
            if prompt is not None
        }
        for said in self._decode(list(index_of)):
            for row in said:
                if row.finish_reason is not None:
                    yield index_of[row], row.completion(self.tokenizer)

    def pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """Yield the text of one completion piece by piece; a character is held back until all of its bytes are there."""
        row, shown = self._row(prompt, params, 0, "prompt"), 0
        row.spoken = True
        for _ in self._decode([row]):
            text = row.completion(self.tokenizer).text if row.finish_reason is not None else row.text_so_far
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)

    async def stream(self, requests: AsyncIterable[Request], *, concurrency: int, on_piece: OnPiece | None = None) -> AsyncIterator[Result]:
        """Results as they are finished. Requests arrive while others are decoded, at most `concurrency` at a time are unanswered.

        The model works in a thread of its own, so that the event loop goes on. A request that cannot be answered has an error and ends
        nothing; an exception of `requests` itself is raised. What an answer is held to is compiled beside the others. usage.prompt counts
        the prompt once for each of n completions, usage.cached those times that it was not read.
        """
        if concurrency < 1:
            raise UserError(f"concurrency: {concurrency}; at least 1 is allowed")
        batcher, jobs = self._batcher(), dict[Row, Job]()
        arrived: asyncio.Queue[Job | BaseException | None] = asyncio.Queue()
        free = asyncio.Semaphore(concurrency)
        feeder = asyncio.create_task(feed(requests, arrived, free, self._under_way, self._machine))
        loop, more = asyncio.get_running_loop(), True

        def over(job: Job, error: str | None = None) -> Result:
            free.release()
            self._under_way.pop(job.request.id, None)
            return job.result(self.tokenizer, self.engine_id, error)

        with ThreadPoolExecutor(1, "native-engine") as thread:
            try:
                while more or batcher.busy:
                    while not arrived.empty() or (more and not batcher.busy):
                        job = await arrived.get()
                        if isinstance(job, BaseException):
                            raise job
                        if job is None:
                            more = False
                            continue
                        try:
                            checked = partial(Row, cast(Any, job.request.prompt), job.request.params) if job.machine is not None else None
                            job.begin(batcher, checked or self._rows_of(job.request), spoken=on_piece is not None)
                            jobs.update(dict.fromkeys(job.rows, job))
                        except Exception as error:  # whatever it is, it is of this request alone
                            yield over(job, said_of(error))
                    for job in [one for one in dict.fromkeys(jobs.values()) if self._under_way.get(one.request.id)]:
                        batcher.drop(job.rows)
                        jobs = {row: other for row, other in jobs.items() if other is not job}
                        yield over(job, CANCELLED)
                    if not batcher.busy:
                        continue
                    try:
                        said = await loop.run_in_executor(thread, self._round, batcher)
                    except Exception as error:  # of no request in particular: all that are under way fail, those to come may not
                        log.exception("a decoding step failed")
                        batcher, failed = self._batcher(), list(dict.fromkeys(jobs.values()))
                        jobs.clear()
                        for job in failed:
                            yield over(job, f"{type(error).__name__}: {error}")
                        continue
                    for row in said:
                        if on_piece is not None:
                            jobs[row].speak(row, on_piece)
                        if row.finish_reason is None:
                            continue
                        job = jobs.pop(row)
                        if not any(other in jobs for other in job.rows):  # several rows may finish in one round
                            yield over(job)
            finally:
                self._under_way.clear()
                feeder.cancel()
                with suppress(asyncio.CancelledError):
                    await feeder

    def cancel(self, request: str) -> None:
        """See the contract; one that is not under way is none."""
        if request in self._under_way:
            self._under_way[request] = True

    def score(self, sequences: list[list[int]]) -> list[Tensor]:
        """Log-probability of each token given those before it: one (T-1,) float32 CPU tensor a sequence.

        Short sequences share a forward; one that is longer than prefill_chunk goes through the cache in chunks.

        Raises:
            ValueError: an empty sequence or an id outside the model's vocabulary.
        """
        self._check_ids(sequences)
        scores: list[Tensor] = [torch.zeros(0)] * len(sequences)
        group: list[int] = []
        for index in sorted((i for i, ids in enumerate(sequences) if len(ids) > 1), key=lambda i: len(sequences[i])):
            length = len(sequences[index])
            if length - 1 > self.prefill_chunk:
                scores[index] = self._score_long(sequences[index])
                continue
            if group and (len(group) == self.max_batch or length * (len(group) + 1) > self.prefill_chunk):
                self._score_group(group, sequences, scores)
                group = []
            group.append(index)
        if group:
            self._score_group(group, sequences, scores)
        return scores

    def diagnostics(self) -> dict[str, float]:
        """Tokens generated so far."""
        return {"tokens": float(self._generated)}

    def close(self) -> None:
        """Nothing is held between generations."""

    def _row(self, prompt: Prompt, params: SamplingParams, draw: int, name: str) -> Row:
        """A row to decode; raises what `generate` says it does."""
        check_params(params)
        if unknown := [token for token in params.stop_ids if token >= self.model.vocab_size]:
            raise UserError(f"decode.stop_ids: {unknown[0]}; the model knows 0 to {self.model.vocab_size - 1}")
        if not isinstance(prompt, list | tuple) or not all(isinstance(token, int) for token in prompt):
            raise ValueError(f"{name} is not a list of token ids; engine=native takes nothing else, encode it with the tokenizer")
        ids = cast("list[int]", list(prompt))
        self._check_ids([ids], name)
        length = len(ids) + params.max_new_tokens
        if self.context_length is not None and length > self.context_length:
            limits = "of engine.context_length and engine.kv_tokens"
            raise UserError(f"{TOO_LONG}: {name}: {refusal(len(ids), params.max_new_tokens, self.context_length, limits)}")
        self._warn_if_longer_than_trained(length)
        return Row(ids, params, draw)

    def _rows_of(self, request: Request) -> Callable[[int], Row]:
        return partial(self._row, request.prompt, request.params, name="prompt")

    def _machine(self, request: Request) -> Machine | None:
        """Compile what its answers are held to, in any thread. Raises what `generate` raises."""
        params = self._rows_of(request)(0).params
        return None if params.constraint is None else self._constraints.machine(params.constraint, stops_of(params, self.stop_ids))

    def _batcher(self) -> Batcher:
        forward = Forward(self.model, self.dtype, self.packed)  # not kept: the weights may change from one generation to the next
        static = self._static and self._can_be_static()
        limits = (self.max_batch, self.prefill_chunk, self.kv_tokens)
        return Batcher(forward, self.tokenizer, self.stop_ids, self._blocked, self._constraints, *limits, static)

    def _round(self, batcher: Batcher) -> list[Row]:
        with self._lock:
            before = batcher.generated
            said = batcher.round()
            self._generated += batcher.generated - before
        return said

    def _decode(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Yield, after every round, the rows that got a token in it. Equal prompts are read once."""
        if not rows:
            return
        spec: RopeSpec | None = getattr(self.model, "rope_spec", None)
        planned = spec if spec is not None and rope_switch(self.model) == "upfront" else None
        equal: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            equal.setdefault((planned and planned.regime_of(row.limit), *row.ids), []).append(row)
        batcher = self._batcher()
        for group in equal.values():
            batcher.add(group[0].ids, group)
        while batcher.busy:
            said = self._round(batcher)
            for row in said:
                if row.error is not None:
                    raise UserError(row.error)
            yield said

    def _can_be_static(self) -> bool:
        """Whether the state keeps its size; if not, say so once and decode step by step."""
        if getattr(self.model.new_state(1, 1), "constant_size", False):
            return True
        self._static = False
        name = type(self.model).__name__
        log.warning("engine.static_steps: the decode state of %s grows with the length; its steps run without CUDA graphs", name)
        return False

    def _score_group(self, group: list[int], sequences: list[list[int]], scores: list[Tensor]) -> None:
        """Score sequences of similar length in one forward; no token sees the padding on its right."""
        width = max(len(sequences[index]) for index in group) - 1
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        following = torch.zeros_like(ids)
        for row, index in enumerate(group):
            sequence = torch.tensor(sequences[index])
            ids[row, : len(sequence) - 1], following[row, : len(sequence) - 1] = sequence[:-1], sequence[1:]
        with self._lock, self._forward.quiet():
            hidden = self.model(Batch(ids, rope_regime=self._regimes(len(sequences[index]) - 1 for index in group)).to(self.device)).hidden
            found = self._logprobs(hidden.flatten(0, 1), following.flatten().to(self.device)).view(ids.shape)
        for row, index in enumerate(group):
            scores[index] = found[row, : len(sequences[index]) - 1].cpu()

    def _regimes(self, lengths: Iterable[int]) -> Tensor | None:
        """(B,) int8: the RoPE regime of each row by its own length, however far it is padded; None where there is one."""
        spec: RopeSpec | None = getattr(self.model, "rope_spec", None)
        if spec is None or not spec.bounds:
            return None
        return torch.tensor([spec.regime_of(length) for length in lengths], dtype=torch.int8)

    def _score_long(self, sequence: list[int]) -> Tensor:
        """Score one sequence through the cache, prefill_chunk tokens at a time."""
        ids = torch.tensor([sequence], device=self.device)
        with self._lock, self._forward.quiet():
            state = self.model.new_state(1, len(sequence), self.dtype)
            state.plan(torch.tensor([len(sequence) - 1], device=self.device))
            pieces = zip(ids[:, :-1].split(self.prefill_chunk, 1), ids[:, 1:].split(self.prefill_chunk, 1), strict=True)
            return torch.cat([self._logprobs(self.model(Batch(piece), state).hidden[0], after[0]) for piece, after in pieces]).cpu()

    def _logprobs(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Log-probability (M,) float32 of ids (M,) after hidden (M, D); at most HEAD_ELEMENTS logits exist at a time."""
        rows = max(1, HEAD_ELEMENTS // self.model.vocab_size)
        found = []
        for part, wanted in zip(hidden.split(rows), ids.split(rows), strict=True):
            logits = self.model.logits(part).float()  # (m, V)
            found.append(logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(dim=-1))
        return torch.cat(found)

    def _check_ids(self, sequences: list[list[int]], name: str = "") -> None:
        for index, ids in enumerate(sequences):
            called = name or f"sequence {index}"
            if not ids:
                raise ValueError(f"{called} is empty; start it with the tokenizer's eot_id, as every document does")
            if min(ids) < 0 or max(ids) >= self.model.vocab_size:
                wrong = max(ids) if max(ids) >= self.model.vocab_size else min(ids)
                raise ValueError(f"{called} holds id {wrong}; the model knows 0 to {self.model.vocab_size - 1}")

    def _warn_if_longer_than_trained(self, length: int) -> None:
        """Once an engine, not once a prompt. Silent where every distance that a query meets is one that was trained."""
        limit, window = (getattr(self.model, name, None) for name in ("max_length", "window"))
        if limit is None or length <= limit or self._warned:
            return
        # Without positions not even a window helps: such attention gets worse beyond the trained length (arXiv 2406.07522, table 3, NoPE).
        # A window of 0 is that of a model without attention.
        blind = getattr(self.model, "rope_spec", True) is None
        if window == 0 or (window is not None and window <= limit and not blind):
            return
        self._warned = True
        why = ", and without positions (model.position=none)" if blind else ""
        warnings.warn(f"up to {length} tokens, but the model was trained at {limit}{why}; quality may drop beyond that", stacklevel=3)
