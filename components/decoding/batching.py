"""Continuous batching over slots: rows join and leave a running batch one by one and never influence each other.

A prompt is read alone in a state of its own, in pieces that depend on nothing but its length, so that its cache is the same whatever else
is decoded; several are read in turn, a piece each. Its row is then copied into one slot for each completion that is wanted. The rows that
are decoded are always the first slots: where one leaves, the next to join takes its place, or else the last row.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from components.contracts import Batch, Completion, SamplingParams, Tokenizer
from components.decode_state import DecodeState
from components.decoding.constraints import BEGIN, Constraints, Machine, blocked_rows
from components.decoding.forward import Forward
from components.decoding.graph_step import StaticSteps
from components.decoding.sampling import RowSampling, alternatives, sample_token, seen_tokens
from components.decoding.stops import TextStream, needs_text

_FIRST_TOKENS = 128  # room of a slot at first; it doubles


@dataclass(eq=False)
class Row:
    """One completion on its way. draw: the second counter of its random numbers; `ids` starts with the prompt.

    spoken: whether its text is wanted as it is written. held: what its constraint allows, and how far in it the row is.
    error: why it cannot go on. first_token: when that came, by time.perf_counter.
    """

    ids: list[int]
    params: SamplingParams
    draw: int = 0
    spoken: bool = False
    prompt_length: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] | None = None
    finish_reason: Literal["stop", "length", "error"] | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    text: TextStream | None = None
    stops: frozenset[int] = frozenset()
    held: tuple[Machine, int] | None = None
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.ids, self.prompt_length = list(self.ids), len(self.ids)

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def said(self) -> int:
        """Tokens so far."""
        return len(self.logprobs)

    @property
    def limit(self) -> int:
        """Most tokens that prompt and answer can come to."""
        return self.prompt_length + self.params.max_new_tokens

    @property
    def text_so_far(self) -> str:
        """What can be shown; "" where it is not spoken."""
        return "" if self.text is None else self.text.text

    def completion(self, tokenizer: Tokenizer) -> Completion:
        """What it has become; call it once, when it is finished."""
        if self.text is not None:
            self.text.flush()
            text = self.text.text
        else:
            text = tokenizer.decode(self.new_ids[:-1] if isinstance(self.stop_reason, int) else self.new_ids)
        return Completion(self.new_ids, text, self.logprobs, self.finish_reason or "abort", self.stop_reason, self.alternatives)


@dataclass(eq=False)
class Reading:
    """A prompt that waits or is being read, and the rows that go on from it. began: when its first piece was read."""

    ids: list[int]
    rows: deque[Row]
    state: DecodeState | None = None
    logits: Tensor | None = None  # (1, V), after the last of ids
    read: int = 0
    began: float = 0.0


class Batcher:
    """Decodes rows together, a `round` at a time: at most `prefill_chunk` tokens of waiting prompts, then one token for every row.

    Args:
        forward: the model.
        tokenizer: for texts.
        stop_ids: end a row, unless it ignores them.
        blocked: (V,) bool, tokens that are never sampled, see `never_said`.
        constraints: of the same tokenizer; they outlive a batch.
        max_batch: rows decoded together; more wait, and the longest-waiting is let in first.
        prefill_chunk: prompt tokens a round, and a forward at most.
        kv_tokens: most tokens in the slots, rows times the longest that one of them can come to, and as many again in the states of
            prompts that are being read; None: no bound. A row that is longer alone gets what it needs.
        static: decode in buffers that never move (components/decoding/graph_step.py); the model's state must be of constant size.
    """

    def __init__(
        self,
        forward: Forward,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        blocked: Tensor,
        constraints: Constraints,
        max_batch: int,
        prefill_chunk: int,
        kv_tokens: int | None = None,
        static: bool = False,
    ) -> None:
        self.forward, self.tokenizer = forward, tokenizer
        self.max_batch, self.prefill_chunk, self.kv_tokens = max_batch, prefill_chunk, kv_tokens
        self.waiting: deque[Reading] = deque()
        self.reading: deque[Reading] = deque()  # in turn; the places of their rows are kept
        self.rows: list[Row | None] = []  # by slot
        self.slots: DecodeState | None = None
        self.generated = 0  # tokens so far
        self.blocked, self.stop_ids = blocked, frozenset(stop_ids)
        self._constraints = constraints
        self._static = StaticSteps(forward.model, forward.dtype) if static else None
        self._live: _Live | None = None  # None where rows came or went since the last step

    @property
    def busy(self) -> bool:
        """Whether a round would do anything."""
        return bool(self.waiting or self.reading) or any(row is not None for row in self.rows)

    def add(self, ids: Sequence[int], rows: Sequence[Row], machine: Machine | None = None) -> Reading:
        """Let rows, whose ids these are, wait for their turn; the prompt is read once for all of them.

        machine: of the constraint that all of them have, where it is made already.

        Raises: UserError for a constraint that is none, or that the tokenizer has no tokens for; and what else the parameters of a row
            bring about, here rather than in a step, which would end all.
        """
        for row in rows:
            row.stops = stops_of(row.params, self.stop_ids)
            row.text = TextStream(cast(Any, self.tokenizer), row.params.stop) if row.spoken or needs_text(row.params) else None
            if row.params.constraint is not None:
                row.held = machine or self._constraints.machine(row.params.constraint, row.stops), BEGIN
        for row in {id(row.params): row for row in rows}.values():
            _Live.of([row], None, self).sampling.blocked(self.blocked, [0])
        reading = Reading(list(ids), deque(rows))
        self.waiting.append(reading)
        return reading

    def drop(self, rows: Iterable[Row]) -> None:
        """Forget rows, between two rounds: whether they wait or are decoded, their places are free."""
        gone = set(rows)
        self.rows, self._live = [None if row in gone else row for row in self.rows], None
        for reading in (*self.waiting, *self.reading):
            reading.rows = deque(row for row in reading.rows if row not in gone)
        self.waiting, self.reading = (deque(one for one in queue if one.rows) for queue in (self.waiting, self.reading))

    def round(self) -> list[Row]:
        """Go on by one step. Returns the rows that got a token, or two if they joined; those with a finish_reason do not come again."""
        with self.forward.quiet():
            said = self._read()
            if any(row is not None for row in self.rows):
                said += self._step()
        return list(dict.fromkeys(said))

    def _read(self) -> list[Row]:
        """Read on in the prompts, in turn; rows whose prompt is at its end say their first token and take a slot."""
        budget, joining = self.prefill_chunk, list[tuple[Row, Reading]]()
        while True:
            while self.waiting and self._has_room(joining, self.waiting[0].rows[0]):
                self.reading.append(self.waiting.popleft())
            if not self.reading:
                break
            reading = self.reading[0]
            piece = min(self.prefill_chunk, len(reading.ids) - reading.read)
            if piece > budget:
                break
            self._read_piece(reading, piece)
            budget -= piece
            self.reading.popleft()
            if reading.read < len(reading.ids):
                self.reading.append(reading)
                continue
            joining.append((reading.rows.popleft(), reading))  # its place was kept
            while reading.rows and self._has_room(joining, reading.rows[0]):
                joining.append((reading.rows.popleft(), reading))
            if reading.rows:
                self.waiting.appendleft(reading)
        if not joining:
            return []
        rows = [row for row, _ in joining]
        self._say(rows, torch.cat([cast(Tensor, reading.logits) for _, reading in joining]), _Live.of(rows, None, self))
        for row, reading in joining:
            if row.finish_reason is None:
                self._join(row, cast(DecodeState, reading.state))
        return rows

    def _read_piece(self, reading: Reading, piece: int) -> None:
        model, row = self.forward.model, reading.rows[0]
        if reading.state is None:
            reading.began = time.perf_counter()
            reading.state = cast(DecodeState, model.new_state(1, max(row.limit for row in reading.rows), self.forward.dtype))
            planned = row.limit if rope_switch(model) == "upfront" else len(reading.ids)
            reading.state.plan(torch.tensor([planned], device=self.forward.device))
        if piece:
            ids = torch.tensor([reading.ids[reading.read : reading.read + piece]], device=self.forward.device)
            hidden = model(Batch(ids), reading.state).hidden[:, -1]
            reading.read += piece
            if reading.read == len(reading.ids):
                reading.logits = self.forward.logits(hidden)

    def _has_room(self, joining: list[tuple[Row, Reading]], row: Row) -> bool:
        rows = [other for other in self.rows if other is not None] + [other for other, _ in joining]
        for reading in self.reading:
            rows += reading.rows
        if not rows:
            return True
        longest = max(row.limit, *(other.limit for other in rows))
        return len(rows) < self.max_batch and (self.kv_tokens is None or (len(rows) + 1) * longest <= self.kv_tokens)

    def _join(self, row: Row, state: DecodeState) -> None:
        """Give the row a slot that holds what `state` does."""
        self._reserve(state, len(self.rows) + (None not in self.rows), len(row.ids), row)
        slot = self.rows.index(None) if None in self.rows else len(self.rows)
        if slot == len(self.rows):
            self.rows.append(None)
        cast(DecodeState, self.slots).put(slot, state)
        self.rows[slot], self._live = row, None

    def _reserve(self, like: DecodeState, rows: int, tokens: int, joining: Row | None = None) -> None:
        """Have slots for so many rows and tokens. Both double, so that rows are copied a few times only; holes may be closed."""
        have_rows, have_tokens = (0, 0) if self.slots is None else (self.slots.batch_size, self.slots.room_tokens)
        have_tokens = have_tokens if like.room_tokens is not None else None
        if rows <= have_rows and (have_tokens is None or tokens <= have_tokens):
            return
        if rows > have_rows:
            rows = 1 << (self.max_batch - 1).bit_length() if self._static is not None else min(self.max_batch, max(rows, 2 * have_rows))
        if have_tokens is not None:
            tokens = have_tokens if tokens <= have_tokens else max(tokens, 2 * have_tokens, _FIRST_TOKENS)
        rows = max(rows, have_rows)
        if have_tokens is not None and self.kv_tokens is not None and rows * tokens > self.kv_tokens:
            rows, tokens = self._within(self.kv_tokens, rows, tokens, joining)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # tensors that may be changed in either mode: the model's may change between rounds
            source = like.resized(0, 0) if self.slots is None else self.slots
            self.slots, self._live = source.resized(rows, tokens), None

    def _within(self, most: int, rows: int, tokens: int, joining: Row | None) -> tuple[int, int]:
        """Fewer rows of fewer tokens: enough for all that is decoded, of which `_has_room` says that it is within `most`."""
        with torch.inference_mode(False), torch.no_grad():
            self._close_holes()
        live = [row for row in (*self.rows, joining) if row is not None]
        tokens = min(tokens, max(row.limit for row in live))
        return max(len(live), min(rows, most // tokens)), tokens

    def _step(self) -> list[Row]:
        """One token for every row in a slot."""
        live = self._live_rows()
        if live is None:
            return []
        last = torch.tensor([[row.ids[-1]] for row in live.rows], device=self.forward.device)
        if self._static is not None:
            logits = self._static(last, cast(DecodeState, self.slots))
        else:
            logits = self.forward.logits(self.forward.model(Batch(last), live.state).hidden[:, -1])
        self._say(live.rows, logits, live)
        for slot, row in enumerate(live.rows):
            if row.finish_reason is not None:
                self.rows[slot], self._live = None, None
        return live.rows

    def _live_rows(self) -> _Live | None:
        """The rows to step, in the first slots; those whose cache is of no use any more (RoPE) go to be read anew, before all others."""
        longest = max(len(row.ids) for row in self.rows if row is not None)
        slots = cast(DecodeState, self.slots)
        self._reserve(slots, 0, longest)
        if self._live is None:
            self._close_holes()
            with torch.inference_mode(False), torch.no_grad():
                state = cast(DecodeState, self.slots).first(len(self.rows), longest - 1)
            self._live = _Live.of(cast(list[Row], list(self.rows)), state, self)
        stale = self._live.state.stale_rows(1) if self._live.state is not None and slots.bounds else None
        if stale is not None and stale.any():
            for slot in stale.nonzero().flatten().tolist():
                row = cast(Row, self.rows[slot])
                self.rows[slot] = None
                self.reading.appendleft(Reading(list(row.ids), deque([row])))
            self._live = None
            return self._live_rows() if any(row is not None for row in self.rows) else None
        return self._live

    def _close_holes(self) -> None:
        while None in self.rows:
            row = self.rows.pop()
            if row is not None:
                hole = self.rows.index(None)
                slots = cast(DecodeState, self.slots)
                slots.put(hole, slots.view(len(self.rows), len(self.rows) + 1, len(row.ids) - 1))
                self.rows[hole] = row

    def _say(self, rows: list[Row], logits: Tensor, live: _Live) -> None:
        """Sample one token for every row and say which rows are finished by it."""
        said = [row.said for row in rows]
        held = blocked_rows(self.blocked, [row.held for row in rows])
        blocked = live.sampling.blocked(held, said)
        ids, logprobs = sample_token(logits, live.sampling, live.sampling.uniforms(said), blocked, live.seen)
        if live.seen is not None:
            live.seen.scatter_(1, ids[:, None], True)
        others = alternatives(logits, live.counts) if live.counts else None
        for index, (row, token, logprob) in enumerate(zip(rows, ids.tolist(), logprobs.tolist(), strict=True)):
            if not math.isfinite(logprob):
                row.finish_reason = "error"
                row.error = f"ckpt: not finite logits after {len(row.ids)} tokens; its training diverged, take an earlier checkpoint"
                continue
            if row.said == 0:
                row.first_token = time.perf_counter()
            self.generated += 1
            row.ids.append(token)
            row.logprobs.append(logprob)
            if others is not None and others[index] is not None:
                row.alternatives = [*(row.alternatives or []), cast(dict[int, float], others[index])]
            if token in row.stops:
                row.finish_reason, row.stop_reason = "stop", token
                continue
            if row.text is not None:
                row.text.push(token)
            if row.text is not None and row.text.stopped is not None:
                row.finish_reason, row.stop_reason = "stop", row.text.stopped
            elif row.held is not None and self._at_end(row, token):
                row.finish_reason = "stop"
            elif row.said == row.params.max_new_tokens:
                row.finish_reason = "length"

    def _at_end(self, row: Row, token: int) -> bool:
        """Go on in the row's constraint; whether nothing may follow, not even a stop id."""
        machine, state = cast("tuple[Machine, int]", row.held)
        state = machine.advance(state, token)
        row.held = machine, state
        return bool((machine.blocked(state) | self.blocked).all())


@dataclass(eq=False)
class _Live:
    """Rows that are sampled together, and what of it stays from step to step. seen: (B, V) bool, None where no row has a penalty."""

    rows: list[Row]
    state: DecodeState | None
    sampling: RowSampling
    seen: Tensor | None
    counts: list[int | None] | None  # of alternatives

    @classmethod
    def of(cls, rows: list[Row], state: DecodeState | None, batcher: Batcher) -> _Live:
        params, device = [row.params for row in rows], batcher.forward.device
        sampling = RowSampling.of(params, [row.draw for row in rows], [tuple(row.stops) for row in rows], device)
        seen = None
        if sampling.penalty is not None:
            seen = seen_tokens([row.ids for row in rows], batcher.forward.model.vocab_size, device)
        counts = [own.logprobs for own in params] if any(own.logprobs is not None for own in params) else None
        return cls(rows, state, sampling, seen, counts)


def stops_of(params: SamplingParams, stop_ids: Iterable[int]) -> frozenset[int]:
    """The ids that end a row, where `stop_ids` are those of the tokenizer."""
    return frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(stop_ids))


def rope_switch(model: Any) -> str:
    """When a row of the model changes its RoPE regime, see `RopeSpec`."""
    return getattr(getattr(model, "rope_spec", None), "switch", "recompute")


def never_said(vocab_size: int, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> Tensor:
    """(V,) bool: the tokenizer's `unsaid_ids`, and rows of the head above its vocabulary."""
    blocked = torch.arange(vocab_size, device=device) >= tokenizer.vocab_size
    blocked[list(tokenizer.unsaid_ids)] = True
    return blocked
