"""One row of metrics an optimizer step, handed to every logger."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from components.contracts import Diagnostics
from framework.callbacks.step import StepCallback
from framework.callbacks.throughput import Throughput


class MetricsRow(StepCallback):
    """Collects loss, validation, optimizer figures, speed and every component's diagnostics, every few steps.

    Lightning's own logging keeps the validation of a step in another row than its training loss, under another step number.
    """

    def __init__(self, clock: Throughput, every_steps: int) -> None:
        """
        Args:
            clock: gives tokens, seconds and speed.
            every_steps: optimizer steps between rows; a validated step and the last one have a row in any case.
        """
        self.clock = clock
        self.every_steps = every_steps
        self.last: dict[str, float] = {}  # newest value of every metric
        self.newest: tuple[int, dict[str, float]] = (-1, {})  # step and values of the newest row

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        task: Any = module
        validation: dict[str, float] = task.take_validation()
        if validation or step % self.every_steps == 0 or step >= trainer.max_steps:
            self.emit(trainer, {**task.step_metrics(), **validation, **self.diagnostics(trainer, module), **self.clock.take()}, step)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, module)
        if trainer.state.fn == "validate":  # before the first step
            task: Any = module
            self.emit(trainer, {**task.take_validation(), "tokens": 0.0, "seconds": 0.0}, 0)

    def emit(self, trainer: pl.Trainer, row: dict[str, float], step: int) -> None:
        """Write one row everywhere."""
        self.last |= row
        self.newest = (step, row)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(row, step)

    def validated_at(self, step: int) -> float | None:
        """val/loss measured at exactly this step, None where there was no validation."""
        return self.newest[1].get("val/loss") if self.newest[0] == step else None

    @staticmethod
    def diagnostics(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Figures of every part of the model and of the optimizer that offers some."""
        found: dict[str, float] = {}
        parts: list[tuple[str, Any]] = [(name, part) for name, part in module.named_modules() if part is not module]
        for name, part in [*parts, ("optimizer", trainer.optimizers[0])]:
            if isinstance(part, Diagnostics):
                path = name.removeprefix("model").strip(".").replace(".", "/")
                found |= {"/".join(filter(None, ("diagnostics", path, key))): float(value) for key, value in part.diagnostics().items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last = dict(state_dict["last"])
