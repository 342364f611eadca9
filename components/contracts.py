"""What every part of Patchbay agrees on: small data classes and protocols. The framework knows components only through this file.

Shape letters, used in every docstring: B batch, T time (L inside kernels), D model width, H query heads, G key/value heads,
K head size, V vocabulary, N state size, R rank, E experts, C chunk.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from components.errors import UserError as UserError

IGNORE = -100  # label of a position that takes no part in the loss

ROLES = (
    "embedding", "head", "norm", "qkv", "o", "gate_up", "down", "in_proj", "out_proj", "x_proj", "dt", "conv", "ssm", "router", "adapter",
)  # fmt: skip
Role = Literal[
    "embedding", "head", "norm", "qkv", "o", "gate_up", "down", "in_proj", "out_proj", "x_proj", "dt", "conv", "ssm", "router", "adapter"
]  # fmt: skip


@dataclass
class Batch:
    """One micro-batch of token rows. No left padding anywhere; padding at the end of a row is a segment of its own with IGNORE labels."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor | None = None  # (B, T) int64: the token that FOLLOWS each position (already shifted), IGNORE where it does not count
    segment_ids: Tensor | None = None  # (B, T) int32, non-decreasing in a row: which packed document a position belongs to
    position_ids: Tensor | None = None  # (B, T) int64, position inside the document; None: 0..T-1 (plus what a DecodeState has seen)
    task_ids: Tensor | None = None  # (B,) or (B, T) int64
    rope_regime: Tensor | None = None  # (B,) int8: index of each row's regime in RopeSpec.regimes; None: by the length T of the rows
    loss_tokens: int | None = None  # labels != IGNORE in the whole optimizer step: all micro-batches of the accumulation window, all ranks
    index: int | None = None  # position of this batch in its stream, for error messages

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: v.to(device, non_blocking=non_blocking) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass
class ModelOutput:
    """hidden: (B, T, D) after the final norm; feed it to `model.logits` or to the fused loss with `model.head_weight`."""

    hidden: Tensor
    aux_losses: dict[str, Tensor] = field(default_factory=dict)  # scalar losses to add, by name


SWITCHES = ("recompute", "upfront", "always_long", "always_short")


@dataclass(frozen=True)
class RopeRegime:
    """How rows of up to `upto` tokens turn: inv_freq_i = 1 / (factors_i * base^(2i/rotary_dim)); cos and sin times attention_factor."""

    factors: tuple[float, ...] = ()  # lambda_i, rotary_dim/2 values; () means all 1
    attention_factor: float = 1.0
    upto: int | None = None  # longest row in tokens, inclusive; None: no end


@dataclass(frozen=True)
class RopeSpec:
    """All that rotary embedding needs. Most rules have one regime; LongRoPE has two: up to original_len, and beyond."""

    rotary_dim: int  # even; the first rotary_dim of the K dims of a head turn
    base: float = 10000.0
    regimes: tuple[RopeRegime, ...] = (RopeRegime(),)  # `upto` rises, and is None in the last
    original_len: int | None = None  # L0: length in tokens that the model was trained at
    target_len: int | None = None  # length in tokens that the rule extends to
    rule: str = "none"
    switch: Literal["recompute", "upfront"] = "recompute"  # when a decoded row changes regime: as it grows, or never: planned before

    def __post_init__(self) -> None:
        ends = [regime.upto for regime in self.regimes]
        if not ends or ends[-1] is not None or None in ends[:-1] or list(self.bounds) != sorted(set(self.bounds)):
            raise ValueError(f"rope regimes end at {ends}; the ends must rise, and the last is None")

    @property
    def factors(self) -> tuple[float, ...]:
        """Those of the longest rows."""
        return self.regimes[-1].factors

    @property
    def attention_factor(self) -> float:
        """That of the longest rows."""
        return self.regimes[-1].attention_factor

    @property
    def bounds(self) -> tuple[int, ...]:
        """`upto` of every regime but the last."""
        return tuple(regime.upto for regime in self.regimes[:-1] if regime.upto is not None)

    @property
    def plain(self) -> bool:
        """Whether it rescales nothing."""
        return all(not regime.factors and regime.attention_factor == 1.0 for regime in self.regimes)

    def regime_of(self, length: int) -> int:
        """Index of the regime of a row of `length` tokens.

        >>> spec = RopeSpec(4, regimes=(RopeRegime(upto=8), RopeRegime((2.0, 2.0))))
        >>> spec.regime_of(8), spec.regime_of(9)
        (0, 1)
        """
        return sum(length > bound for bound in self.bounds)

    def switched(self, switch: str) -> RopeSpec:
        """The same with another `switch`; always_long and always_short keep the one regime for rows of any length.

        Raises UserError for another word.
        """
        if switch not in SWITCHES:
            raise UserError(f"rope.switch: {switch!r}; allowed are {', '.join(SWITCHES)}")
        if switch in ("recompute", "upfront"):
            return replace(self, switch=cast(Any, switch))
        return replace(self, regimes=(replace(self.regimes[0 if switch == "always_short" else -1], upto=None),))


class RopeRule(Protocol):
    """An option of the group `rope`: turns a model's own numbers into a RopeSpec."""

    def spec(self, rotary_dim: int, base: float, original_len: int) -> RopeSpec: ...


class DecodeState(Protocol):
    """What a model must remember to go on decoding: one object for all models (components/decode_state.py).

    `model(batch, state)` is prefill, chunked prefill and step alike: it reads `input_ids` (B, T), appends T tokens and updates the state.
    Rows may stand at different positions. Size of a windowed or recurrent layer does not depend on length.
    """

    length: Tensor  # (B,) int64, tokens seen so far by each row
    regime: Tensor  # (B,) int8, RoPE regime that each row's cache was filled with

    def fork(self, n: int) -> DecodeState:
        """Copy every row n times (row b becomes rows b*n .. b*n+n-1)."""
        ...

    def select(self, rows: Tensor) -> DecodeState: ...
    def reset(self, rows: Tensor) -> None: ...
    def plan(self, lengths: Tensor) -> None:
        """Say how many tokens (B,) the rows, which are empty, are to hold: it decides their RoPE regime. Unsaid, the first call decides."""
        ...

    def stale_rows(self, tokens: int = 0) -> Tensor:
        """(B,) bool: rows whose cache cannot take `tokens` more, which would change their RoPE regime; they must be read anew."""
        ...

    def save(self) -> dict[str, Any]: ...


@runtime_checkable
class Model(Protocol):
    """An option of the group `model`; also an nn.Module. Its projections are always called as modules, so that adapters can wrap them."""

    vocab_size: int  # rows of the head, >= tokenizer.vocab_size; the rows above are never sampled

    def __call__(self, batch: Batch, state: DecodeState | None = None) -> ModelOutput: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding when tied."""
        ...

    def roles(self) -> dict[str, Role]:
        """Role of every parameter by its name in named_parameters(): read by optimizers, adapters, sharding and accounting."""
        ...

    def fused_splits(self) -> dict[str, list[int]]:
        """Rows of each block of the matrices that are stored fused, by parameter name."""
        ...

    def set_rope(self, spec: RopeSpec) -> None: ...
    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype = torch.float32) -> DecodeState: ...
    def forward_flops(self, seq_len: int) -> float:
        """Matmul, attention and scan FLOPs of one forward, per token, at rows of seq_len tokens; a training step counts three of them."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. Special tokens inside user text are encoded as plain text, never as the special id."""

    vocab_size: int
    eot_id: int  # starts every document, and so ends the one before
    stop_ids: tuple[int, ...]  # what a model says ends at any of them: eot_id, the end of a turn
    unsaid_ids: tuple[int, ...]  # a model never says them: the marks that begin a turn

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def special_id(self, name: str) -> int: ...
    def save(self, folder: Path) -> None: ...


class BatchStream(Protocol):
    """One epoch at a time of micro-batches, whose order is a pure function of (seed, epoch)."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch, then move on to the next."""
        ...

    def state_dict(self) -> dict[str, int]:
        """{epoch, position}: position counts DELIVERED batches, never prefetched ones."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None: ...


class Data(Protocol):
    """An option of the group `data`."""

    tokenizer: Tokenizer  # usable after prepare()
    seq_len: int
    batch_size: int

    def prepare(self, cache_dir: Path, tokenizer: Tokenizer | None = None) -> None:
        """Read, tokenise and cache what is not cached yet (one process at a time). A given tokenizer replaces the configured one."""
        ...

    def train_stream(self, seed: int, accumulate: int = 1, rank: int = 0, world_size: int = 1) -> BatchStream: ...
    def val_batches(self) -> Iterable[Batch]:
        """Every held-out token exactly once as a label; re-iterable; the last batch may be smaller."""
        ...

    @property
    def val_bytes(self) -> int:
        """UTF-8 bytes of all held-out text."""
        ...

    def evaluations(self) -> dict[str, Iterable[Batch]]:
        """Further held-out batches by name, measured once at the end of a run: eval/NAME/loss and eval/NAME/accuracy of their labels."""
        ...

    def baselines(self) -> dict[str, float]:
        """Bits per byte of simple models on the same held-out bytes: {'order0', 'order2', 'xz'}; {} where they make no sense."""
        ...

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What a resumed run must find unchanged: digests of the training and held-out tokens, rows of an epoch."""
        ...

    def summary(self) -> dict[str, int | float | str]:
        """What was read, for the first line of a run: train_tokens, val_tokens, train_bytes, val_bytes, documents, source."""
        ...


class Adapter(Protocol):
    """An option of the group `adapter`. `apply` wraps modules in place, freezes the rest and returns a report."""

    def apply(self, model: nn.Module) -> dict[str, Any]:
        """Returns {'trainable': int, 'total': int, 'modules': {name: parameters}}."""
        ...


@dataclass(frozen=True)
class NamedParameter:
    """A trainable parameter as optimizers see it."""

    name: str
    parameter: nn.Parameter
    role: Role
    splits: tuple[int, ...] = ()  # rows of each block when the matrix is stored fused (qkv, gate_up); () when it is not


class OptimizerFactory(Protocol):
    """An option of the group `optimizer` (`_partial_: true`). A param group has `name`, `kind`, `parameter_names` besides torch's keys."""

    def __call__(self, parameters: list[NamedParameter]) -> torch.optim.Optimizer: ...


class ScheduleFactory(Protocol):
    """An option of the group `schedule` (`_partial_: true`): a factor of the learning rate per optimizer step."""

    def __call__(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler: ...


@dataclass(frozen=True)
class Constraint:
    """What an answer must be; exactly one is set. choice: one of these texts; regex: a text that it matches from end to end."""

    choice: tuple[str, ...] | None = None
    regex: str | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How to decode one request, for every engine. Stops after max_new_tokens, at a stop id, or where a stop string is complete."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: greedy, the lowest id among equals
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0  # 64 bits; of n completions the one with index j draws from (seed, j)
    min_p: float | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()  # they are no part of the text
    stop_ids: tuple[int, ...] = ()  # besides those of the tokenizer
    ignore_eos: bool = False
    logprobs: int | None = None  # so many alternatives at each position; that of the chosen token is always given
    constraint: Constraint | None = None


@dataclass
class Completion:
    """token_ids and logprobs include the stop token, text does not. They are [] where an engine cannot say them.

    Of an error and of a prompt that was passed over (skipped), stop_reason says why.
    """

    token_ids: list[int]
    text: str
    logprobs: list[float]  # of the model's own distribution: temperature 1, nothing cut off
    finish_reason: Literal["stop", "length", "error", "abort", "skipped"]
    stop_reason: str | int | None = None  # the stop string or id that ended it
    alternatives: list[dict[int, float]] | None = None
    prompt_cut: int = 0  # tokens that the prompt lost on its left, since it left no room for an answer


Message = dict[str, str]  # {role, content}
Prompt = list[int] | str | list[Message]  # token ids (they start with the document start), a text, or a conversation
Decoding = SamplingParams | Sequence[SamplingParams]  # one for all prompts, or one each


@dataclass(frozen=True)
class Request:
    """One prompt on its way to an engine, and n answers wanted."""

    id: str
    prompt: Prompt
    params: SamplingParams
    n: int = 1


@dataclass
class Usage:
    """Tokens of a request: of its prompt, once for each answer; written; and of the prompts those that were not read anew."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass
class Result:
    """What became of a request: n completions, or none and why. latency: queued, first_token, total, in seconds."""

    request_id: str
    completions: list[Completion]
    usage: Usage
    latency: dict[str, float]
    engine_id: str
    error: str | None = None


CANCELLED = "cancelled"  # error of a request that was


@dataclass(frozen=True)
class Piece:
    """What a completion has got since its last piece, of Completion's fields. Tokens whose text is held back come with a later piece."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[int, float]] | None = None


OnPiece = Callable[[str, int, Piece], None]


class Engine(Protocol):
    """An option of the group `engine`. Rows never influence each other.

    capabilities: what it can do, of n, seed, logprobs, alternatives, token_ids, score, regex, choice, prefix_cache, pieces, ignore_eos,
    min_p, repetition_penalty; of servers also ids, texts, stop_ids, logit_bias. context_length: tokens of prompt and answer at most; None:
    no end. An engine that works on many requests at once and begins slowly may say so: `window`, how many it wants to be given.
    """

    capabilities: frozenset[str]
    engine_id: str
    model_id: str
    tokenizer_id: str
    context_length: int | None

    def generate(self, prompts: Sequence[Prompt], params: Decoding) -> list[Completion]:
        """One completion a prompt, in order. With one SamplingParams prompt i draws from (seed, i), with a sequence from (seed_i, 0)."""
        ...

    def completions(self, prompts: Sequence[Prompt | None], params: Decoding, first: int = 0) -> Iterator[tuple[int, Completion]]:
        """As `generate`, but (index of the prompt, completion) as they are finished. Nothing comes of None, and nothing else changes.

        first: number of the first prompt, in a part of a larger call; with one SamplingParams prompt i draws from (seed, first + i).
        """
        ...

    def pieces(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The text of one completion as it is written."""
        ...

    def stream(self, requests: AsyncIterable[Request], *, concurrency: int, on_piece: OnPiece | None = None) -> AsyncIterator[Result]:
        """Results in any order, at most `concurrency` requests at a time. One that fails has an error and ends nothing.

        on_piece: called in the event loop with (request id, index of the completion, piece) as it is written, or once with all of it.
        """
        ...

    def cancel(self, request: str) -> None:
        """End a request, by its id, of a `stream` that goes on, as soon as possible; its result has the error CANCELLED."""
        ...

    def score(self, sequences: list[list[int]]) -> list[Tensor]:
        """Log-probability of each token given those before it: one (T-1,) float32 tensor a sequence."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Diagnostics(Protocol):
    """Any component may offer figures worth plotting; one callback logs them."""

    def diagnostics(self) -> dict[str, float]: ...
