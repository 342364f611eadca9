"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from components.contracts import Batch
from framework.callbacks.step import window_is_full

WARMUP = 10  # after n updates the decay is at most (1 + n) / (WARMUP + n): early weights are forgotten fast


class Ema(pl.Callback):
    """Averages the trainable weights after every optimizer step: a <- d a + (1 - d) w. Validation and samples use the average.

    Lightning's own callback keeps a second copy of the whole module and saves the average in the place of the weights; here the
    checkpoint's `state_dict` stays what training continues from, and the average stands beside it.
    """

    def __init__(self, decay: float) -> None:
        """decay: d, in (0, 1)."""
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}  # name in the model -> float32, same shape
        self.inside: contextlib.ExitStack | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights = self.weights(module)
        kept = self.average
        self.average = {name: kept[name].to(w.device) if name in kept else w.detach().float().clone() for name, w in weights.items()}

    @staticmethod
    def weights(module: pl.LightningModule) -> dict[str, Tensor]:
        """Trainable weights of the model by name."""
        return {name: p for name, p in module.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not window_is_full(trainer, batch_idx):
            return
        decay = min(self.decay, (1 + self.updates) / (WARMUP + self.updates))
        self.updates += 1
        weights = [w.detach().float() for w in self.weights(module).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self, module: pl.LightningModule) -> Iterator[None]:
        """Inside, the model computes with the average; afterwards its own weights are back, bit for bit."""
        if not self.average or self.inside is not None:
            yield
            return
        weights = self.weights(module)
        own = {name: w.detach().clone() for name, w in weights.items()}
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, w in weights.items():
                    w.copy_(own[name])

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(self.applied(module))
        self.inside = stack

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.inside is not None:
            self.inside.close()
            self.inside = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.updates = dict(state_dict["average"]), int(state_dict["updates"])
