"""What one layer remembers while decoding: a full or ring key/value cache, or convolution and state-space memory; and the step they share.

Positions of the cached keys are not stored: position p lives in slot p mod S, so the rows' lengths alone say what each slot holds.
Where no gradient is recorded every buffer is updated in place: decoding on and on moves no tensor, which a CUDA graph relies on
(components/decoding/graph_step.py). Only a cache without a window grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
        self.positions = length[:, None] + (0 if tokens == 1 else torch.arange(tokens, device=length.device))  # (B, T)
        self.fresh = longest == 0
        self.needed = longest + tokens
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
        rows = torch.arange(len(new), device=new.device)[:, None]  # (B, 1)
        buffer[rows, :, self._slots[key]] = new.transpose(1, 2).to(buffer.dtype)


def may_overwrite(buffer: Tensor) -> bool:
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

    def reserve(self, step: Step) -> None:
        """Have slots for the step's tokens. Raises ValueError when a cache without a window would outgrow its limit."""
        if self.window is None and step.needed > self.keys.shape[2]:
            if step.needed > self.limit:
                raise ValueError(
                    f"decode state: {step.needed} tokens do not fit max_length={self.limit}; ask for new_state(max_length={step.needed})"
                )
            self._grow(min(self.limit, max(step.needed, 2 * self.keys.shape[2])))

    def write(self, keys: Tensor, values: Tensor, step: Step) -> None:
        """Store new keys and values (B, G, T, K); raises what `reserve` does."""
        self.reserve(step)
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
        if may_overwrite(self.conv):
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
