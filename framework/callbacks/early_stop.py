"""Ends a run before its last step, once it has learned what it was to learn."""

from __future__ import annotations

from collections import deque
from typing import Any

import lightning.pytorch as pl

from components.contracts import Batch
from framework.callbacks.step import window_is_full


class EarlyStop(pl.Callback):
    """Stops where the mean training loss of the last `steps` optimizer steps is below a limit; the run then validates, saves and is done.

    Before every callback that acts at a step's end, like LastStep.
    """

    def __init__(self, below: float, steps: int) -> None:
        """
        Args:
            below: nats a label.
            steps: optimizer steps that the mean is taken over.
        """
        self.below = below
        self.losses: deque[float] = deque(maxlen=steps)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not window_is_full(trainer, batch_idx):
            return
        task: Any = module
        self.losses.append(float(task.step_loss()))  # the same in every process
        if len(self.losses) == self.losses.maxlen and sum(self.losses) / len(self.losses) < self.below:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])
