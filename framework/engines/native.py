"""Option engine=native: our own decoding loop. Rows join and leave the running batch one by one and never influence each other."""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from components.contracts import Batch, Completion, DecodeState, Model, RopeSpec, SamplingParams, Tokenizer, UserError
from components.data.tokenizers import StreamDecoder
from components.decoding.graph_step import StaticSteps
from components.decoding.sampling import check_params, sample_token, uniforms

log = logging.getLogger(__name__)

HEAD_ELEMENTS = 1 << 22  # logits held at once while scoring: 16 MiB of float32, however long the sequence and large the vocabulary


@dataclass
class Row:
    """One prompt on its way. `index` names it for the random numbers; `ids` starts with the prompt; `limit`: most tokens it may come to."""

    index: int
    ids: list[int]
    prompt_length: int
    limit: int
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]


class NativeEngine:
    """Continuous batching over a live model, on its device: prefill, then one step for all rows at a time, always from the cache.

    Finished rows leave at once and waiting prompts take their places. What a row says depends on its prompt, the seed and its index in
    the list of prompts, not on the other rows or on max_batch. `token_ids` and `logprobs` of a completion include the stop token, `text`
    does not.

    Args:
        model: called in eval mode without gradients; its mode is restored after every step, so a model in training can be passed.
        tokenizer: its `stop_ids` stop a row; its `unsaid_ids`, and rows of the head above its vocabulary, are never sampled.
        max_batch: rows decoded together; more prompts wait.
        prefill_chunk: prompt tokens per forward; bounds the memory of long prompts.
        dtype: float32, or bfloat16 autocast.
        static_steps: decode in buffers that never move (components/decoding/graph_step.py), where the model's state is of constant size.
            auto: on a CUDA device, as a replayed CUDA graph; always: elsewhere too, without a graph; never.

    Example:
        >>> engine = NativeEngine(run.model, run.tokenizer)  # doctest: +SKIP
        >>> engine.generate([[run.tokenizer.eot_id]], SamplingParams(max_new_tokens=8))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        max_batch: int = 16,
        prefill_chunk: int = 1024,
        dtype: Literal["float32", "bfloat16"] = "float32",
        static_steps: Literal["auto", "always", "never"] = "never",
    ) -> None:
        for key, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UserError(f"engine.{key}: {value}; at least 1 is allowed")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_chunk, self.dtype = max_batch, prefill_chunk, getattr(torch, dtype)
        self.device = next(_module(model).parameters()).device
        self.stop_ids = set(tokenizer.stop_ids)
        self._blocked = torch.arange(model.vocab_size, device=self.device) >= tokenizer.vocab_size  # (V,)
        self._blocked[list(tokenizer.unsaid_ids)] = True
        self._static = static_steps == "always" or (static_steps == "auto" and self.device.type == "cuda")
        self._warned = False
        self._generated = 0

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Complete every prompt (token ids that start with the document start). Returns completions in the order of the prompts.

        Raises:
            UserError: a parameter out of range, or a model whose logits are not finite.
            ValueError: an empty prompt or an id outside the model's vocabulary.
        """
        done = dict(self.completions(prompts, params))
        return [done[index] for index in range(len(prompts))]

    def completions(self, prompts: list[list[int]], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """As `generate`, but yields (index of the prompt, completion) as soon as each is finished."""
        for rows in self._decode(prompts, params):
            for row in rows:
                if row.finish_reason is not None:
                    yield row.index, self._complete(row)

    def pieces(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        """Yield the text of one completion piece by piece; a character is held back until all of its bytes are there."""
        decoder = StreamDecoder(cast(Any, self.tokenizer))
        for (row,) in self._decode([prompt], params):
            if row.finish_reason != "stop" and (piece := decoder.push(row.ids[-1])):
                yield piece
        if piece := decoder.flush():
            yield piece

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
        """Nothing outlives the object."""

    def _decode(self, prompts: list[list[int]], params: SamplingParams) -> Iterator[list[Row]]:
        """Yield, after every round, the rows that got a token in it; a row with a finish_reason does not come again."""
        check_params(params)
        self._check_ids(prompts)
        longest = max(map(len, prompts), default=0) + params.max_new_tokens
        self._warn_if_longer_than_trained(longest)
        waiting = deque(Row(index, list(prompt), len(prompt), len(prompt) + params.max_new_tokens) for index, prompt in enumerate(prompts))
        active: list[Row] = []
        state: DecodeState | None = None
        static = StaticSteps(self.model, self.dtype) if self._static else None  # not kept: it holds where the weights lie now
        while waiting or active:
            if waiting and len(active) < self.max_batch:
                fresh = [waiting.popleft() for _ in range(min(len(waiting), self.max_batch - len(active)))]
                with self._quiet():
                    fresh, logits, fresh_state = self._prefill(fresh, longest)
                    self._append(fresh, logits, params)
                yield fresh
                with self._quiet():
                    fresh, kept = _unfinished(fresh, fresh_state)
                    active, state = active + fresh, _join([s for s in (state, kept) if s is not None])
            if active and state is not None:
                with self._quiet():
                    logits, state = self._step(active, state, longest, static)
                    self._append(active, logits, params)
                yield active
                with self._quiet():
                    active, state = _unfinished(active, state)

    def _prefill(self, rows: list[Row], longest: int) -> tuple[list[Row], Tensor, DecodeState]:
        """Read the ids of every row into a new state. Rows of one length share a forward, equal rows are read once.

        Returns the rows in the order of the state, logits (B, V) after their last token, and the state with room for `longest` tokens.
        """
        lengths: dict[tuple[int, int], list[Row]] = {}
        for row in rows:
            lengths.setdefault((len(row.ids), row.limit), []).append(row)
        parts, states = [], []
        for group in lengths.values():
            distinct = list({tuple(row.ids): None for row in group})
            state = self.model.new_state(len(distinct), longest, self.dtype)
            self._plan(state, [group[0].limit if self._switch == "upfront" else len(ids) for ids in distinct])
            hidden = self._read(torch.tensor(distinct, device=self.device), state, max(1, self.prefill_chunk // len(distinct)))
            if len(distinct) < len(group):
                source = torch.tensor([distinct.index(tuple(row.ids)) for row in group], device=self.device)
                hidden, state = hidden[source], state.select(source)
            parts.append(self.model.logits(hidden).float())
            states.append(state)
        ordered = [row for group in lengths.values() for row in group]
        return ordered, torch.cat(parts), _join(states)

    @property
    def _switch(self) -> str:
        return getattr(getattr(self.model, "rope_spec", None), "switch", "recompute")

    def _plan(self, state: DecodeState, lengths: list[int]) -> None:
        """Before the first chunk, which does not know how long the row will be."""
        state.plan(torch.tensor(lengths, device=self.device))

    def _read(self, ids: Tensor, state: DecodeState, chunk: int) -> Tensor:
        """Feed ids (B, T) to the state, `chunk` tokens at a time. Returns the hidden state (B, D) after the last."""
        for piece in ids.split(chunk, dim=1):
            hidden = self.model(Batch(piece), state).hidden[:, -1]
        return hidden

    def _step(self, rows: list[Row], state: DecodeState, longest: int, static: StaticSteps | None) -> tuple[Tensor, DecodeState]:
        """Feed each row its last token. Returns logits (B, V) and the state; a row that leaves its RoPE regime is read anew."""
        stale = state.stale_rows(1)
        if stale.any():
            return self._step_apart(rows, state, longest, stale.tolist())
        last = torch.tensor([[row.ids[-1]] for row in rows], device=self.device)
        if static is not None and self._can_be_static(state):
            return static(last, cast(Any, state))
        return self.model.logits(self.model(Batch(last), state).hidden[:, -1]).float(), state

    def _step_apart(self, rows: list[Row], state: DecodeState, longest: int, stale: list[bool]) -> tuple[Tensor, DecodeState]:
        """As `_step`, where the cache of some rows is of no use any more. One row at a time: it happens once in the life of a row."""
        logits, states = [], []
        for index, row in enumerate(rows):
            if stale[index]:
                _, found, after = self._prefill([row], longest)
            else:
                found, after = self._step([row], state.select(torch.tensor([index], device=self.device)), longest, None)
            logits.append(found)
            states.append(after)
        return torch.cat(logits), _join(states)

    def _can_be_static(self, state: DecodeState) -> bool:
        """Whether the state keeps its size; if not, say so once and decode step by step."""
        if getattr(state, "constant_size", False):
            return True
        if self._static:
            self._static = False
            name = type(self.model).__name__
            log.warning("engine.static_steps: the decode state of %s grows with the length; its steps run without CUDA graphs", name)
        return False

    def _append(self, rows: list[Row], logits: Tensor, params: SamplingParams) -> None:
        """Sample one token for every row and say which rows are finished by it."""
        draws = uniforms(params.seed, [row.index for row in rows], [len(row.new_ids) for row in rows])
        ids, logprobs = sample_token(logits, params, draws, self._blocked)
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise UserError(f"ckpt: not finite logits after {len(row.ids)} tokens; its training diverged, take an earlier checkpoint")
            self._generated += 1
            row.ids.append(token)
            row.logprobs.append(logprob)
            if token in self.stop_ids:
                row.finish_reason = "stop"
            elif len(row.new_ids) == params.max_new_tokens:
                row.finish_reason = "length"

    def _complete(self, row: Row) -> Completion:
        shown = row.new_ids[:-1] if row.finish_reason == "stop" else row.new_ids
        return Completion(row.new_ids, self.tokenizer.decode(shown), row.logprobs, row.finish_reason or "length")

    def _score_group(self, group: list[int], sequences: list[list[int]], scores: list[Tensor]) -> None:
        """Score sequences of similar length in one forward; no token sees the padding on its right."""
        width = max(len(sequences[index]) for index in group) - 1
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        following = torch.zeros_like(ids)
        for row, index in enumerate(group):
            sequence = torch.tensor(sequences[index])
            ids[row, : len(sequence) - 1], following[row, : len(sequence) - 1] = sequence[:-1], sequence[1:]
        with self._quiet():
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
        with self._quiet():
            state = self.model.new_state(1, len(sequence), self.dtype)
            self._plan(state, [len(sequence) - 1])
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

    def _check_ids(self, sequences: list[list[int]]) -> None:
        for index, ids in enumerate(sequences):
            if not ids:
                raise ValueError(f"sequence {index} is empty; start it with the tokenizer's eot_id, as every document does")
            if min(ids) < 0 or max(ids) >= self.model.vocab_size:
                raise ValueError(f"sequence {index} holds id {max(ids)}; the model knows 0 to {self.model.vocab_size - 1}")

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

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Eval mode without gradients around one step, never around a `yield` to the caller: its mode would leak there."""
        training = [module for module in _module(self.model).modules() if module.training] if _module(self.model).training else []
        # Tensors made in inference mode cannot take part in a later backward, and a model in training may cache some (RoPE tables).
        without_gradients = torch.no_grad() if training else torch.inference_mode()
        for module in training:
            module.training = False
        try:
            with without_gradients, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield
        finally:
            for module in training:
                module.training = True


def _unfinished(rows: list[Row], state: DecodeState) -> tuple[list[Row], DecodeState | None]:
    """Leave out the finished rows; no state where no row is left."""
    kept = [index for index, row in enumerate(rows) if row.finish_reason is None]
    if len(kept) == len(rows):
        return rows, state
    if not kept:
        return [], None
    return [rows[index] for index in kept], state.select(torch.tensor(kept, device=state.length.device))


def _join(states: list[Any]) -> Any:
    """One state with the rows of all; None for none."""
    if len(states) < 2:
        return states[0] if states else None
    return type(states[0]).cat(states)


def _module(model: Model) -> nn.Module:
    return cast(nn.Module, model)  # the contract says so, a Protocol cannot
