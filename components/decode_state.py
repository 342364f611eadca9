"""The decode state of every model: full or ring key/value caches, convolution and state-space memory, one length per row.

Positions of the cached keys are not stored: position p lives in slot p mod S, so the rows' lengths alone say what each slot holds.
Where no gradient is recorded every buffer is updated in place: decoding on and on moves no tensor, which a CUDA graph relies on
(components/decoding/graph_step.py). Only a cache without a window grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

_FIRST_SLOTS = 256  # a growing cache starts here and doubles


class Step:
    """Bookkeeping of one call of the model with a state, shared by its layers.

    positions: (B, T) int64, where in its row each new token stands. fresh: no row has seen a token yet.
    regime: (B,) RoPE regime of each row.
    """

    def __init__(self, length: Tensor, tokens: int, longest: int, regime: Tensor) -> None:
        self.regime = regime
        self.positions = length[:, None] + torch.arange(tokens, device=length.device)  # (B, T)
        self.fresh = longest == 0
        self.needed = longest + tokens
        self._rows = torch.arange(len(length), device=length.device)[:, None]  # (B, 1)
        self._held: dict[tuple[int, bool], Tensor] = {}
        self._slots: dict[tuple[int, int], Tensor] = {}

    def held(self, slots: int, before: bool = False) -> Tensor:
        """(B, slots) int64: the position that each slot holds after this step's tokens were written (or before that); -1 where empty."""
        key = (slots, before)
        if key not in self._held:
            newest = self.positions[:, :1] - 1 if before else self.positions[:, -1:]  # (B, 1)
            slot = torch.arange(slots, device=newest.device)
            self._held[key] = (newest - (newest - slot) % slots).clamp_min(-1)
        return self._held[key]

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Put new (B, G, T, K) into buffer (B, G, S, K) in place, at slot = position mod S; of more than S tokens the last S stay."""
        new = new.detach()[:, :, -buffer.shape[2] :]
        key = (new.shape[2], buffer.shape[2])
        if key not in self._slots:  # the same for the keys and the values of every layer
            self._slots[key] = self.positions[:, -key[0] :] % key[1]  # (B, T)
        buffer[self._rows, :, self._slots[key]] = new.transpose(1, 2).to(buffer.dtype)


def _may_overwrite(buffer: Tensor) -> bool:
    """Not where a backward may still read it, nor a tensor made in inference mode outside of that mode."""
    return not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not buffer.is_inference())


@dataclass
class KVCache:
    """Rotated keys and values of one attention layer.

    keys, values: (B, G, S, K). With a window, S = window slots are a ring; else S grows by doubling up to `limit`.
    """

    keys: Tensor
    values: Tensor
    window: int | None
    limit: int

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], window: int | None, max_length: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Return zeroed buffers for shape (B, G, K)."""
        batch, groups, size = shape
        slots = window if window is not None else min(max_length, _FIRST_SLOTS)
        keys, values = (torch.zeros(batch, groups, slots, size, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, window, max_length)

    def write(self, keys: Tensor, values: Tensor, step: Step) -> None:
        """Store new keys and values (B, G, T, K). Raises ValueError when a cache without a window would outgrow its limit."""
        if self.window is None and step.needed > self.keys.shape[2]:
            if step.needed > self.limit:
                raise ValueError(
                    f"decode state: {step.needed} tokens do not fit max_length={self.limit}; ask for new_state(max_length={step.needed})"
                )
            self._grow(min(self.limit, max(step.needed, 2 * self.keys.shape[2])))
        step.write(self.keys, keys)
        step.write(self.values, values)

    def append(self, keys: Tensor, values: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Store new keys and values (B, G, T, K); return what the new queries may look at: keys, values (B, G, S, K), positions (B, S)."""
        if self.window is not None and keys.shape[2] > 1:  # writing first would overwrite keys that the earlier new queries still see
            seen = (
                torch.cat([self.keys, keys.detach().to(self.keys.dtype)], dim=2),
                torch.cat([self.values, values.detach().to(self.values.dtype)], dim=2),
            )
            positions = torch.cat([step.held(self.window, before=True), step.positions], dim=1)
            self.write(keys, values, step)
            return *seen, positions
        self.write(keys, values, step)
        slots = self.window if self.window is not None else step.needed
        return self.keys[:, :, :slots], self.values[:, :, :slots], step.held(slots)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> KVCache:
        return KVCache(change(self.keys), change(self.values), self.window, self.limit)

    def put(self, row: int, source: KVCache, tokens: int) -> None:
        """Take over the one row of `source`, which has read so many tokens; what lies beyond them is zeroed, see `reset`."""
        held = source.keys.shape[2] if self.window is not None else tokens
        for own, other in ((self.keys, source.keys), (self.values, source.values)):
            own[row, :, :held] = other[0, :, :held]
            own[row, :, held:] = 0

    def resized(self, rows: int, tokens: int) -> KVCache:
        batch, groups, slots, size = self.keys.shape
        wanted = self.window if self.window is not None else tokens
        keys, values = (self.keys.new_zeros(rows, groups, wanted, size) for _ in range(2))
        made = KVCache(keys, values, self.window, wanted)
        for own, other in zip(made.tensors, self.tensors, strict=True):
            own[:batch, :, :slots] = other[:rows, :, :wanted]
        return made

    def reset(self, rows: Tensor) -> None:
        """Zero the rows: attention gives an empty slot the weight 0, and 0 times a NaN or infinity left there is NaN."""
        self.keys[rows] = 0
        self.values[rows] = 0

    def save(self) -> dict[str, Any]:
        return {"kind": "kv", "keys": self.keys.clone(), "values": self.values.clone(), "window": self.window, "limit": self.limit}

    @classmethod
    def load(cls, saved: dict[str, Any]) -> KVCache:
        return cls(saved["keys"], saved["values"], saved["window"], saved["limit"])

    @staticmethod
    def cat(layers: Sequence[KVCache]) -> KVCache:
        if len({layer.window for layer in layers}) > 1:
            raise ValueError(f"decode state: cannot join caches of windows {sorted({str(layer.window) for layer in layers})}")
        slots = max(layer.keys.shape[2] for layer in layers)
        for layer in layers:
            layer._grow(slots)
        keys, values = torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])
        return KVCache(keys, values, layers[0].window, max(layer.limit for layer in layers))

    def _grow(self, slots: int) -> None:
        batch, groups, old, size = self.keys.shape
        if slots > old:
            more = self.keys.new_zeros(batch, groups, slots - old, size)
            self.keys, self.values = torch.cat([self.keys, more], dim=2), torch.cat([self.values, more], dim=2)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values


@dataclass
class RecurrentState:
    """Memory of one state-space layer: conv (B, W-1, D) inputs before the convolution, ssm (B, D, N); both at least fp32."""

    conv: Tensor
    ssm: Tensor

    @classmethod
    def empty(cls, batch: int, taps: int, channels: int, size: int, dtype: torch.dtype, device: torch.device | str) -> RecurrentState:
        dtype = torch.promote_types(dtype, torch.float32)  # bf16 states drift by 8e-2 over 8192 tokens
        return cls(
            torch.zeros(batch, taps, channels, dtype=dtype, device=device), torch.zeros(batch, channels, size, dtype=dtype, device=device)
        )

    def update(self, conv: Tensor, ssm: Tensor) -> None:
        """Take the new states (copied in place where no gradient is recorded), keeping the own dtype."""
        if _may_overwrite(self.conv):
            self.conv.copy_(conv)
            self.ssm.copy_(ssm)
        else:
            self.conv, self.ssm = conv.detach().to(self.conv.dtype), ssm.detach().to(self.ssm.dtype)

    def put(self, row: int, source: RecurrentState, tokens: int) -> None:
        self.conv[row], self.ssm[row] = source.conv[0], source.ssm[0]

    def resized(self, rows: int, tokens: int) -> RecurrentState:
        made = self.map_rows(lambda t: t.new_zeros(rows, *t.shape[1:]))
        for own, other in zip(made.tensors, self.tensors, strict=True):
            own[: len(other)] = other[:rows]
        return made

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> RecurrentState:
        return RecurrentState(change(self.conv), change(self.ssm))

    def reset(self, rows: Tensor) -> None:
        self.conv[rows] = 0
        self.ssm[rows] = 0

    def save(self) -> dict[str, Any]:
        return {"kind": "recurrent", "conv": self.conv.clone(), "ssm": self.ssm.clone()}

    @classmethod
    def load(cls, saved: dict[str, Any]) -> RecurrentState:
        return cls(saved["conv"], saved["ssm"])

    @staticmethod
    def cat(layers: Sequence[RecurrentState]) -> RecurrentState:
        return RecurrentState(torch.cat([layer.conv for layer in layers]), torch.cat([layer.ssm for layer in layers]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.conv, self.ssm


LayerState = KVCache | RecurrentState


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
        if _may_overwrite(self.length):
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
