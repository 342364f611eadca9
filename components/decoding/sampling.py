"""Pure functions from logits to tokens. Randomness is counter-based: no generator, no state, nothing shared between rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.contracts import SamplingParams
from components.decoding.params import check_params as check_params
from kernels.next_token import greedy, logprobs

GOLDEN = 0x9E3779B97F4A7C15  # increment of splitmix64, 2^64 / golden ratio
MASK = (1 << 64) - 1
NARROW, WIDER = 128, 16  # how many likely tokens top-p looks at first, and how many times more where they were too few


def mix64(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit counters (Steele, Lea & Flood 2014, the output function of splitmix64). x: uint64 array; returns the same shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_keys(seeds: Sequence[int], rows: Sequence[int]) -> np.ndarray:
    """Mix seeds and rows, B counters each, into keys (B,) uint64 from which `draw` makes the random numbers of a row."""
    golden = np.uint64(GOLDEN)
    state = mix64(np.array([(seed + GOLDEN) & MASK for seed in seeds], dtype=np.uint64))
    return mix64(state + (np.asarray(rows, dtype=np.uint64) + np.uint64(1)) * golden)


def draw(keys: np.ndarray, positions: Sequence[int] | np.ndarray) -> Tensor:
    """The random number of each row at a position. positions: B counters. Returns (B,) float64 on the CPU, multiples of 2^-52 in [0, 1)."""
    state = mix64(keys + (np.asarray(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    # 52 bits, not 53: then u * total < total in float64 for every total, and the search below never runs off the end
    return torch.from_numpy((state >> np.uint64(12)).astype(np.float64) * 2.0**-52)


def uniforms(seed: int | Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Random numbers that depend on (seed, row, position) alone, so that what else is in the batch never changes a row.

    seed: one for all rows, or B; rows, positions: B non-negative counters. Returns (B,) float64 on the CPU, multiples of 2^-52 in [0, 1).
    """
    return draw(row_keys([seed] * len(rows) if isinstance(seed, int) else seed, rows), positions)


class _Kind(NamedTuple):
    """How a row is drawn, by its own parameters alone. width: tokens to look at, 0 for all in the order of their ids."""

    greedy: bool
    width: int
    top_k: bool
    top_p: bool
    min_p: bool


@dataclass(frozen=True)
class _Group:
    """The rows of one kind. index: (b,) int64, None for all rows. The others are (b, 1)."""

    kind: _Kind
    index: Tensor | None
    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float64
    min_p: Tensor  # float64, 0 is off

    def select(self, rows: Tensor, width: int) -> _Group:
        """Those at `rows` (b,) bool, looking at `width` tokens. A single row that stands for all stays as it is."""
        parts = (part if len(part) == 1 else part[rows] for part in (self.temperature, self.top_k, self.top_p, self.min_p))
        return _Group(self.kind._replace(width=width), None, *parts)


@dataclass(frozen=True)
class RowSampling:
    """How each of B rows is sampled, as tensors: made when rows join or leave, used at every step between.

    penalty: (B, 1) float32, None where no row has one; minimum: tokens that a row says before it may stop; stops: ids that would stop it.
    A single row may stand for any number of rows.
    """

    groups: tuple[_Group, ...]
    keys: np.ndarray  # (B,) uint64
    penalty: Tensor | None
    minimum: np.ndarray  # (B,) int64
    stops: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        rows: Sequence[int] = (),
        stops: Sequence[Sequence[int]] = (),
        device: torch.device | str = "cpu",
    ) -> RowSampling:
        """Gather B checked params. rows: the second counter of each, 0 where not given; stops: ids that end each row."""
        kinds: dict[_Kind, list[int]] = {}
        for index, own in enumerate(params):
            kinds.setdefault(_kind(own), []).append(index)
        groups = tuple(_group(kind, [params[i] for i in at], at if len(kinds) > 1 else None, device) for kind, at in kinds.items())
        penalty = None
        if any(own.repetition_penalty != 1 for own in params):
            penalty = torch.tensor([[own.repetition_penalty] for own in params], dtype=torch.float32, device=device)
        drawn = any(not kind.greedy for kind in kinds)
        keys = row_keys([own.seed for own in params], rows or [0] * len(params)) if drawn else np.zeros(len(params), dtype=np.uint64)
        minimum = np.array([own.min_new_tokens for own in params], dtype=np.int64)
        return cls(groups, keys, penalty, minimum, tuple(tuple(ids) for ids in stops))

    @property
    def greedy(self) -> bool:
        """Whether no row is drawn."""
        return all(group.kind.greedy for group in self.groups)

    def uniforms(self, positions: Sequence[int] | np.ndarray) -> Tensor:
        """Draws (B,) float64 of the rows, each at its own position: the number of tokens that it has said; zeros if all are greedy."""
        return torch.zeros(len(self.keys), dtype=torch.float64) if self.greedy else draw(self.keys, positions)

    def blocked(self, blocked: Tensor, positions: Sequence[int] | np.ndarray) -> Tensor:
        """Add the stop ids of the rows that may not stop yet. blocked: (V,) or (B, V) bool. Returns it as it is where there are none."""
        if not self.stops or not self.minimum.any():
            return blocked
        early = np.flatnonzero(np.asarray(positions) < self.minimum)
        if not len(early):
            return blocked
        blocked = blocked.expand(len(self.keys), -1).clone()
        for row in early:
            blocked[row, list(self.stops[row])] = True
        return blocked


def seen_tokens(sequences: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """(B, V) bool: the tokens of each sequence, prompt and answer; what a repetition penalty looks at."""
    seen = torch.zeros(len(sequences), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(sequences):
        seen[row, torch.tensor(list(ids), dtype=torch.int64, device=device)] = True
    return seen


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make seen tokens less likely: positive logits are divided by the penalty, negative ones multiplied (CTRL, Keskar et al. 2019).

    logits: (B, V) float32; seen: (B, V) bool; penalty: (B, 1) float32. Returns (B, V).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_token(
    logits: Tensor,
    params: SamplingParams | RowSampling,
    uniform: Tensor,
    blocked: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one token a row: the most likely at temperature 0, else by inverse CDF after temperature, top-k, top-p, then min-p.

    Before these come the repetition penalty and what is blocked. A row's choice depends on nothing of the other rows.

    logits: (B, V) float32. params: one for all rows, or gathered of each. uniform: (B,) float64 in [0, 1), see `uniforms`.
    blocked: (V,) or (B, V) bool, tokens that are never chosen. seen: (B, V) bool, needed for a penalty, see `seen_tokens`.
    Returns ids (B,) int64 and logprobs (B,) float32: log-probability under the model's own distribution (all V rows, temperature 1, nothing
    cut off), so that it equals what `Engine.score` gives for the same token.
    Note: tokens that tie with the k-th largest logit are all kept; a cut among equals would depend on the sorting algorithm.
    """
    rows = params if isinstance(params, RowSampling) else RowSampling.of([params], device=logits.device)
    if rows.greedy and rows.penalty is None:
        return greedy(logits, blocked)
    changed = logits
    if rows.penalty is not None:
        if seen is None:
            raise ValueError("sample_token: a row has a repetition penalty; say which tokens were seen")
        changed = penalise(changed, seen, rows.penalty)
    if blocked is not None:
        changed = changed.masked_fill(blocked, -torch.inf)
    ids = _choose(changed, rows, uniform)
    return ids, logprobs(logits, ids[:, None]).squeeze(1)


def alternatives(logits: Tensor, counts: Sequence[int | None]) -> list[dict[int, float] | None]:
    """The most likely tokens of each row with their log-probabilities under the model's own distribution, most likely first.

    logits: (B, V) float32; counts: how many of each row, None for no dict.
    """
    most = min(max((count or 0 for count in counts), default=0), logits.shape[-1])
    _, ids = _largest(logits, most)
    found = zip(counts, ids.tolist(), logprobs(logits, ids).tolist(), strict=True)
    return [None if count is None else dict(zip(own[:count], said[:count], strict=True)) for count, own, said in found]


def _kind(params: SamplingParams) -> _Kind:
    if params.temperature == 0:
        return _Kind(True, 0, False, False, False)
    top_p, min_p = params.top_p is not None and params.top_p < 1, bool(params.min_p)
    if params.top_k is not None:
        # A power of two above k: rows of similar k share a group, and whether the k-th has equals is seen in most cases.
        return _Kind(False, 1 << max(5, params.top_k.bit_length()), True, top_p, min_p)
    return _Kind(False, NARROW if top_p else 0, False, top_p, min_p)


def _group(kind: _Kind, params: list[SamplingParams], index: list[int] | None, device: torch.device | str) -> _Group:
    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    if kind.greedy:
        return _Group(kind, None if index is None else torch.tensor(index, device=device), *[torch.empty(0)] * 4)
    limits = torch.finfo(torch.float32)  # a temperature beyond them would be 0 or infinite, and 0/0 no number
    return _Group(
        kind,
        None if index is None else torch.tensor(index, device=device),
        column([min(max(own.temperature, limits.tiny), limits.max) for own in params], torch.float32),
        column([min(own.top_k or 0, MASK >> 1) for own in params], torch.int64),
        column([1.0 if own.top_p is None else own.top_p for own in params], torch.float64),
        column([own.min_p or 0.0 for own in params], torch.float64),
    )


def _choose(logits: Tensor, rows: RowSampling, uniform: Tensor) -> Tensor:
    """Ids (B,) int64, group by group: the path that a row takes is decided by its own parameters."""
    if len(rows.groups) == 1:
        group = rows.groups[0]
        return logits.argmax(dim=-1) if group.kind.greedy else _draw(logits, group, uniform.to(logits.device))
    uniform = uniform.to(logits.device)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for group in rows.groups:
        own = logits[group.index]
        ids[group.index] = own.argmax(dim=-1) if group.kind.greedy else _draw(own, group, uniform[group.index])
    return ids


def _draw(logits: Tensor, group: _Group, uniform: Tensor) -> Tensor:
    """Sample (b,) ids by inverse CDF. logits (b, V) may hold -inf. Subtracting the maximum first keeps tiny temperatures finite."""
    kind, width = group.kind, min(group.kind.width, logits.shape[-1])
    order: Tensor | None = None
    enough: Tensor | None = None  # (b,) bool: what is kept lies within the tokens looked at
    if kind.top_k:
        values, order = _largest(logits, width)
        kth = values.gather(1, (group.top_k.expand(len(values), 1) - 1).clamp(max=width - 1))  # (b, 1)
        enough = (values[:, -1:] < kth) | kth.isneginf()  # fewer tokens than k are possible: what is left out has no mass
        probabilities = _softmax(values.masked_fill(values < kth, -torch.inf), group.temperature)
    else:
        probabilities = _softmax(logits, group.temperature)
        if width:
            probabilities, order = _largest(probabilities, width)
    if kind.top_p:
        before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities  # mass of the more likely tokens
        cut = before >= group.top_p  # the first token always stays
        if not kind.top_k:
            least = probabilities.masked_fill(cut, torch.inf).amin(dim=-1, keepdim=True)
            enough = (probabilities[:, -1:] < least) | (probabilities[:, -1:] == 0)
        probabilities = probabilities.masked_fill(cut, 0)
    if kind.min_p:
        probabilities = probabilities.masked_fill(probabilities < group.min_p * probabilities.amax(dim=-1, keepdim=True), 0)
    if order is not None and not kind.top_p:  # back to the order of the ids
        order, back = order.sort(dim=-1)
        probabilities = probabilities.gather(1, back)
    cdf = probabilities.cumsum(dim=-1, dtype=torch.float64)  # (b, V)
    picked = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)  # (b, 1); right: skips tokens of no mass
    picked = picked.clamp(max=cdf.shape[-1] - 1)  # only where logits are not finite
    ids = (picked if order is None else order.gather(1, picked)).squeeze(1)
    if enough is not None and width < logits.shape[-1]:
        short = ~enough.squeeze(1)
        if short.any():
            ids[short] = _draw(logits[short], group.select(short, width * WIDER), uniform[short])
    return ids


def _softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


def _largest(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row (b, V) and their ids, in falling order, equals by rising id. Which of equals are left out is open."""
    if width >= values.shape[-1]:
        return values.sort(dim=-1, descending=True, stable=True)
    ids = values.topk(width, dim=-1).indices.sort(dim=-1).values
    values, order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)
