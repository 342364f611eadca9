"""The moment that most callbacks want: an optimizer step is over, and so is the validation that belongs to it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from components.contracts import Batch


def window_is_full(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Does this micro-batch end an optimizer step?"""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Will Lightning validate after this micro-batch? (At the interval, and when it was asked to stop.)"""
    interval = int(trainer.val_check_batch or 0)
    return bool(trainer.enable_validation) and (trainer.should_stop or (interval > 0 and (batch_idx + 1) % interval == 0))


class StepCallback(pl.Callback):
    """Calls `on_step_end` once an optimizer step.

    Everything that belongs to a step (validation, metrics row, checkpoint, in the order of the callback list) happens in that one place. A
    checkpoint therefore never stands before a row that a resumed run would not write again, nor after one that it would write twice.
    """

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """`step` optimizer steps are done; the validation of this step too if there was one."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if window_is_full(trainer, batch_idx) and not validation_follows(trainer, batch_idx):
            self.on_step_end(trainer, module, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.on_step_end(trainer, module, trainer.global_step)


class LastStep(pl.Callback):
    """Asks Lightning to stop at the last step, which makes it validate there whatever the interval. First in the callback list."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if window_is_full(trainer, batch_idx) and trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
