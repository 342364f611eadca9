"""State that Lightning leaves out of a checkpoint, and a way to save after something went wrong in the middle of a step."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from components.contracts import Batch
from framework.callbacks.step import StepCallback

RngState = dict[str, Any]


def rng_state() -> RngState:
    """States of this process' global generators, as plain types and tensors (loadable with weights_only=True)."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process' device
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],  # type: ignore[call-overload]
    }


def set_rng_state(state: RngState) -> None:
    """Put the states of `rng_state` back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


class ExactState(StepCallback):
    """Keeps what a checkpoint needs besides weights and optimizer: generators, loop counters, place in the data.

    All of it is recorded at the end of every step. A checkpoint asked for in the middle of a step (a loss that is not finite) then gets the
    record, and is the state before that step: weights and optimizer are untouched until the step's very end.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] | None = None
        self.to_restore: RngState | None = None
        self.inside_step = False

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        self.inside_step = False
        self.record = {"rng": rng_state(), "fit_loop": trainer.fit_loop.state_dict()}

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Restore here and not at loading: what lies between (loaders, compilation) may draw numbers."""
        if self.to_restore is not None:
            set_rng_state(self.to_restore)
            self.to_restore = None
        self.inside_step = True

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = rng_state()
        if self.inside_step and self.record is not None:
            checkpoint["rng"] = self.record["rng"]
            checkpoint["loops"]["fit_loop"] = self.record["fit_loop"]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.to_restore = checkpoint["rng"]
