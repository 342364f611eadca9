"""Stops a run whose loss or gradient is no longer a number, before the optimizer makes the weights follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from components.contracts import Batch, UserError
from framework.checkpoint import FOLDER, checkpoint_name
from framework.distributed import is_sharded, reduced

SHOWN_NAMES = 3


def gradient_norm(module: pl.LightningModule) -> Tensor:
    """2-norm of all gradients together, () float32 on their device; the same in every process."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=module.device)
    return reduced(norm**2).sqrt() if is_sharded(module.trainer) else norm  # else every process holds all of them


class Diverged(UserError):
    """The run can only fail again at the same place, so `resume=auto` passes it over."""


class NanGuard(pl.Callback):
    """Measures the gradient norm of each step (before clipping) and stops the run where it or the loss is not finite.

    The weights are then still those of the step before; they are saved, and the error names step and batch.
    """

    def __init__(self, run_dir: Path) -> None:
        """run_dir: where checkpoints/ lies."""
        self.run_dir = run_dir
        self.batches: list[int | None] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches = []
        self.batches.append(batch.index)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Called after the backward, before clipping and the step itself.

        Raises:
            Diverged: loss or gradient is not finite.
        """
        task: Any = module
        norm, loss = gradient_norm(module), task.step_loss()
        task.grad_norm = norm
        if torch.isfinite(norm + loss).item():
            return
        what = "loss" if not torch.isfinite(torch.as_tensor(loss)) else "gradient"
        names = [n for n, p in module.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        where = f" (first in {', '.join(n.removeprefix('model.') for n in names[:SHOWN_NAMES])})" if what == "gradient" and names else ""
        step = trainer.global_step  # optimizer steps done before this one
        saved = self.save(trainer, step)
        raise Diverged(
            f"{what} is not finite at step {step + 1}, batch {', '.join(str(b) for b in self.batches)}{where}; {saved}; "
            "try a lower optimizer.lr, a longer warm-up or a smaller trainer.gradient_clip_val"
        )

    def save(self, trainer: pl.Trainer, step: int) -> str:
        """Keep the state before the failing step; says where it is."""
        if step == 0:
            return "no step was done before it"
        path = self.run_dir / FOLDER / checkpoint_name(step)
        if not trainer.strategy.broadcast(path.exists()):  # saving is a thing that all processes do or none
            trainer.save_checkpoint(path)
        return f"the state before it is in {path}"
