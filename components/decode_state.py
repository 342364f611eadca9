"""The decode state of every model: what its layers remember (components/layer_state.py), one length and one RoPE regime per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from components.layer_state import KVCache, LayerState, RecurrentState, Step, may_overwrite


class RopeRegimeError(ValueError):
    """A cache filled in one RoPE regime was to be continued in another."""


class DecodeState:
    """One object for all models: `model(batch, state)` appends batch.input_ids (B, T) and updates the state in place.

    Gradients do not flow through it. length: (B,) int64; regime: (B,) int8, RoPE regime that the caches were filled with.
    bounds: longest rows, in tokens, of all RoPE regimes but the last. task_ids: (B,) int64, the adapter's task that each row's caches were
    filled for, written by its hook (components/adapters/base/task_ids.py); None where nothing was said.

    A row that grows past the bound of its regime cannot go on: not only do its keys turn otherwise, all keys and values above the first
    layer come from outputs of the layers below, computed in the other regime. See `plan` and `stale_rows`.
    """

    def __init__(self, layers: list[LayerState], length: Tensor, regime: Tensor, longest: int = 0, bounds: tuple[int, ...] = ()) -> None:
        self.layers = layers
        self.length = length
        self.regime = regime
        self.bounds = bounds
        self.task_ids: Tensor | None = None
        self._longest = longest  # upper bound of length known without reading the device

    @classmethod
    def empty(cls, layers: list[LayerState], batch_size: int, device: torch.device | str, bounds: tuple[int, ...] = ()) -> DecodeState:
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(layers, length, torch.zeros(batch_size, dtype=torch.int8, device=device), bounds=bounds)

    @property
    def batch_size(self) -> int:
        return len(self.length)

    @property
    def size_bytes(self) -> int:
        """Memory of all buffers, in bytes."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors)

    @property
    def fresh(self) -> bool:
        """Whether no row has read a token yet."""
        return self._longest == 0

    @property
    def room_tokens(self) -> int | None:
        """Tokens that a row can come to before a cache must grow; None where none ever does."""
        return min((layer.keys.shape[2] for layer in self.layers if isinstance(layer, KVCache) and layer.window is None), default=None)

    @property
    def constant_size(self) -> bool:
        """Whether nothing depends on the length: no layer grows, and there is one RoPE regime."""
        return not self.bounds and all(not isinstance(layer, KVCache) or layer.window is not None for layer in self.layers)

    def begin(self, batch_size: int, tokens: int) -> Step:
        """Start a call that appends `tokens` tokens to each row.

        Raises:
            ValueError: another number of rows.
            RopeRegimeError: a row that would leave the RoPE regime of its cache.
        """
        if batch_size != self.batch_size:
            raise ValueError(
                f"decode state: input_ids has {batch_size} rows, the state has {self.batch_size}; use state.select or new_state"
            )
        if self.bounds:
            self._take_regime(tokens)
        return Step(self.length, tokens, self._longest, self.regime)

    def plan(self, lengths: Tensor) -> None:
        """Say how many tokens (B,) the rows, all empty, are to hold: it decides their RoPE regime. Unsaid, the first call decides."""
        if not self.fresh:
            raise ValueError("decode state: plan comes before the first token; use reset, or a new state")
        self.regime = self._regime_of(lengths.to(self.length.device))

    def _regime_of(self, lengths: Tensor) -> Tensor:
        bounds = torch.tensor(self.bounds, dtype=torch.int64, device=lengths.device)
        return (lengths[:, None] > bounds).sum(dim=1).to(torch.int8)

    def _take_regime(self, tokens: int) -> None:
        """Empty rows take the regime of a first call; refuse a call that would mix two in one cache."""
        if self._longest == 0 or tokens > 1:  # a step appends to rows that have begun
            empty = self.length == 0
            self.regime = torch.where(empty, torch.maximum(self.regime, self._regime_of(self.length + tokens)), self.regime)
        if self._longest + tokens > self.bounds[0] and bool((stale := self.stale_rows(tokens)).any()):
            rows = stale.nonzero().flatten().tolist()
            raise RopeRegimeError(f"decode state: rows {rows} would outgrow their RoPE regime with {tokens} more tokens; read them anew")

    def finish(self, tokens: int) -> None:
        """Count the tokens of a completed call."""
        if may_overwrite(self.length):
            self.length.add_(tokens)
        else:
            self.length = self.length + tokens
        self.count(tokens)

    def count(self, tokens: int) -> None:
        """The part of `finish` that happens on the host alone; for the tokens of a replayed CUDA graph, whose kernels did the rest."""
        self._longest += tokens

    def fork(self, n: int) -> DecodeState:
        """Copy every row n times: row b becomes rows b*n .. b*n+n-1."""
        return self._map_rows(lambda t: t.repeat_interleave(n, dim=0))

    def select(self, rows: Tensor) -> DecodeState:
        """Copy the given rows, (R,) int64 or (B,) bool, in their order."""
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        chosen = self._map_rows(lambda t: t.index_select(0, index))
        chosen._longest = int(chosen.length.max()) if chosen.batch_size else 0  # the longest row may not be among them
        return chosen

    def room(self, rows: int) -> DecodeState:
        """An empty state of `rows` rows whose buffers have the shapes and dtypes of these."""
        state = self._map_rows(lambda t: t.new_zeros(rows, *t.shape[1:]))
        state._longest, state.task_ids = 0, None
        return state

    def first(self, rows: int, longest: int | None = None) -> DecodeState:
        """The first rows as views: what is written to one state is seen in the other. longest: tokens of the longest of them, if known."""
        return self.view(0, rows, longest)

    def view(self, begin: int, end: int, longest: int | None = None) -> DecodeState:
        """As `first`, for any rows next to each other. No cache may grow in a view; see `resized`."""
        view = self._map_rows(lambda t: t[begin:end])
        view._longest = self._longest if longest is None else longest
        return view

    def put(self, row: int, source: DecodeState) -> None:
        """Let a row be a copy of the one row of `source`, a state of the same model; nothing of what the row was is left."""
        for own, other in zip(self.layers, source.layers, strict=True):
            own.put(row, cast(Any, other), source._longest)
        self.length[row], self.regime[row] = source.length[0], source.regime[0]
        self._longest = max(self._longest, source._longest)

    def resized(self, rows: int, tokens: int) -> DecodeState:
        """A copy with so many rows, and room for so many tokens where a cache has no window; what does not fit is cut, the rest empty."""
        layers: list[LayerState] = [layer.resized(rows, tokens) for layer in self.layers]
        made = DecodeState(layers, self.length.new_zeros(rows), self.regime.new_zeros(rows), self._longest, self.bounds)
        kept = min(rows, self.batch_size)
        made.length[:kept], made.regime[:kept] = self.length[:kept], self.regime[:kept]
        return made

    def overwrite(self, source: DecodeState) -> None:
        """Copy a state of as many rows, and of the same model, into the own buffers, which stay where they are."""
        pairs = [(self.length, source.length), (self.regime, source.regime)]
        for own, other in zip(self.layers, source.layers, strict=True):
            pairs += zip(own.tensors, other.tensors, strict=True)
        for mine, theirs in pairs:
            if mine.shape != theirs.shape:
                raise ValueError(f"decode state: a buffer of {tuple(theirs.shape)} does not fit one of {tuple(mine.shape)}")
            mine.copy_(theirs)
        self._longest, self.task_ids = source._longest, source.task_ids

    def reset(self, rows: Tensor) -> None:
        """Forget the given rows, (R,) int64 or (B,) bool, in place."""
        self.length[rows] = 0
        self.regime[rows] = 0
        for layer in self.layers:
            layer.reset(rows)
        self._longest = int(self.length.max()) if self.batch_size else 0

    def stale_rows(self, tokens: int = 0) -> Tensor:
        """(B,) bool: rows that `tokens` more would bring into another RoPE regime than their cache was filled in."""
        if not self.bounds or self._longest + tokens <= self.bounds[0]:
            return torch.zeros_like(self.regime, dtype=torch.bool)
        return self._regime_of(self.length + tokens) > self.regime

    def save(self) -> dict[str, Any]:
        """Return copies of everything as tensors and plain Python values, fit for torch.save and torch.load(weights_only=True)."""
        layers = [layer.save() for layer in self.layers]
        tasks = None if self.task_ids is None else self.task_ids.clone()
        rows = {"length": self.length.clone(), "regime": self.regime.clone(), "task_ids": tasks}
        return {**rows, "bounds": list(self.bounds), "layers": layers}

    @staticmethod
    def load(saved: dict[str, Any], device: torch.device | str = "cpu") -> DecodeState:
        """Rebuild what `save` returned, as copies on `device`."""
        layers: list[LayerState] = []
        for layer in saved["layers"]:
            kind = KVCache if layer["kind"] == "kv" else RecurrentState
            layers.append(kind.load(layer).map_rows(lambda t: t.clone().to(device)))
        length = saved["length"].clone().to(device)
        longest = int(length.max()) if len(length) else 0
        state = DecodeState(layers, length, saved["regime"].clone().to(device), longest, tuple(saved["bounds"]))
        tasks = saved.get("task_ids")
        state.task_ids = None if tasks is None else tasks.clone().to(device)
        return state

    @staticmethod
    def cat(states: Sequence[DecodeState]) -> DecodeState:
        """Join the rows of states of the same model, in order. Raises ValueError when their layers differ."""
        if not states or len({(s.bounds, *(type(layer) for layer in s.layers)) for s in states}) != 1:
            raise ValueError("decode state: cat needs one or more states of the same model")
        layers = [type(group[0]).cat(group) for group in zip(*(s.layers for s in states), strict=True)]
        length, regime = torch.cat([s.length for s in states]), torch.cat([s.regime for s in states])
        joined = DecodeState(layers, length, regime, max(s._longest for s in states), states[0].bounds)
        tasks = [s.task_ids for s in states if s.task_ids is not None]
        joined.task_ids = torch.cat(tasks) if len(tasks) == len(states) else None
        return joined

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> DecodeState:
        layers = [layer.map_rows(change) for layer in self.layers]
        state = DecodeState(layers, change(self.length), change(self.regime), self._longest, self.bounds)
        state.task_ids = None if self.task_ids is None else change(self.task_ids)
        return state
