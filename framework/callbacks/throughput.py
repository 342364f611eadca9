"""Clock of a run: seconds, tokens, tokens per second, model FLOP utilisation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from components.contracts import Batch
from framework.callbacks.step import StepCallback, window_is_full


class Throughput(StepCallback):
    """Counts tokens and seconds over all continuations of a run. Validation, samples and checkpoints are no training time."""

    def __init__(self, flops_per_token: float, peak_flops: float | None) -> None:
        """
        Args:
            flops_per_token: of one training token (forward and backward).
            peak_flops: FLOP/s that utilisation is relative to; None where it is unknown.
        """
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.tokens = 0  # of finished optimizer steps
        self.window_tokens = 0
        self.seconds = 0.0  # from start of training, pauses of the process left out
        self.training_seconds = 0.0
        self.started: float | None = None
        self.paused_since: float | None = None
        self.last_row = (0, 0.0)  # tokens and training seconds when `take` was called last

    def tick(self) -> None:
        """Bring both clocks up to now."""
        now = time.perf_counter()
        if self.started is not None:
            self.seconds += now - self.started
            if self.paused_since is None:
                self.training_seconds += now - self.started
        self.started = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is no training time."""
        if self.paused_since is not None:
            yield
            return
        self.tick()
        self.paused_since = self.started
        try:
            yield
        finally:
            self.tick()
            self.paused_since = None

    def take(self) -> dict[str, float]:
        """Figures since the call before: tokens/s and utilisation; tokens and seconds in all."""
        self.tick()
        tokens, seconds = self.tokens - self.last_row[0], self.training_seconds - self.last_row[1]
        self.last_row = (self.tokens, self.training_seconds)
        row = {"tokens": float(self.tokens), "seconds": self.seconds}
        if tokens > 0 and seconds > 0:
            row |= self.speed(tokens, seconds)
        return row

    def speed(self, tokens: float, seconds: float) -> dict[str, float]:
        """Tokens per second, and utilisation where the peak is known."""
        rate = tokens / seconds
        figures = {"perf/tokens_per_second": rate}
        if self.peak_flops:
            figures["perf/mfu"] = rate * self.flops_per_token / self.peak_flops
        return figures

    def totals(self) -> dict[str, float]:
        """The same over the whole run."""
        figures = {"tokens": float(self.tokens), "seconds": self.seconds, "perf/flops_per_token": self.flops_per_token}
        if self.training_seconds > 0:
            figures |= self.speed(self.tokens, self.training_seconds)
        return figures

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started = None
        self.tick()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.window_tokens = 0
        self.window_tokens += batch.input_ids.numel() * trainer.world_size
        if window_is_full(trainer, batch_idx):  # not before: a checkpoint asked for inside a step holds the state before it
            self.tokens += self.window_tokens
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.started is not None and self.paused_since is None:
            self.tick()
            self.paused_since = self.started

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.paused_since is not None:
            self.tick()
            self.paused_since = None
        super().on_validation_end(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.tick()

    def state_dict(self) -> dict[str, Any]:
        self.tick()
        return {"tokens": self.tokens, "seconds": self.seconds, "training_seconds": self.training_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.seconds, self.training_seconds = (state_dict[key] for key in ("tokens", "seconds", "training_seconds"))
        self.last_row = (self.tokens, self.training_seconds)
