"""When to save, what to keep, and what to do when a signal asks the run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from framework.callbacks.metrics import MetricsRow
from framework.callbacks.step import StepCallback
from framework.callbacks.throughput import Throughput
from framework.checkpoint import FOLDER, checkpoint_name, checkpoint_step, checkpoints
from framework.distributed import reduced
from framework.runs import write_state
from framework.runtime import Interrupted, StopSignals


class Checkpoints(StepCallback):
    """Saves every `every_steps` steps, at a new best validation and at the end; keeps the newest `keep_last` and the `keep_best` best."""

    def __init__(self, run_dir: Path, every_steps: int, keep_last: int, keep_best: int, clock: Throughput, rows: MetricsRow) -> None:
        """
        Args:
            run_dir: checkpoints go to its folder checkpoints/.
            every_steps: optimizer steps.
            keep_last: newest files to keep, at least 1.
            keep_best: files with the lowest val/loss to keep.
            clock: paused while saving.
            rows: where val/loss is read from; runs before this callback.
        """
        self.run_dir = run_dir
        self.every_steps = every_steps
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.clock = clock
        self.rows = rows
        self.scores: dict[str, float] = {}  # val/loss by file name, where the checkpoint was validated at its own step
        self.saved_step = -1

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        name, score = checkpoint_name(step), self.rows.validated_at(step)
        best = score is not None and self.keep_best > 0 and score < min(self.scores.values(), default=float("inf"))
        if score is not None:
            self.scores[name] = score
            best = trainer.strategy.broadcast(best)  # saving is a thing that all processes do or none
        if best or step % self.every_steps == 0 or step >= trainer.max_steps or trainer.should_stop:
            self.save(trainer, step)

    def save(self, trainer: pl.Trainer, step: int) -> Path:
        """Write the checkpoint of this step unless it is there already; then let old ones go."""
        path = self.run_dir / FOLDER / checkpoint_name(step)
        if step == self.saved_step:
            return path
        self.scores = {n: s for n, s in self.scores.items() if n == path.name or (self.run_dir / FOLDER / n).exists()}
        with self.clock.paused():
            trainer.save_checkpoint(path)
        self.saved_step = step
        if trainer.is_global_zero:
            best = min(self.scores, key=self.scores.__getitem__, default=None)
            write_state(self.run_dir, step=step, tokens=self.clock.tokens, last_checkpoint=path.name, best_checkpoint=best)
            self.let_go(step)
        return path

    def let_go(self, step: int) -> None:
        """Delete checkpoints that are neither among the newest nor among the best."""
        files = checkpoints(self.run_dir)
        newest = [p.name for p in files if checkpoint_step(p) <= step][-self.keep_last :]
        best = sorted((n for n in self.scores if (self.run_dir / FOLDER / n).exists()), key=self.scores.__getitem__)[: self.keep_best]
        for path in files:
            if path.name not in newest and path.name not in best:
                path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = dict(state_dict["scores"])


class StopOnSignal(StepCallback):
    """Ends the run after the current step when SIGTERM or SIGINT came: state saved, how to go on said. Last in the callback list."""

    def __init__(self, signals: StopSignals, saver: Checkpoints, announce: Callable[[int, Path], str]) -> None:
        """
        Args:
            signals: taken over at the start of training.
            saver: writes the checkpoint.
            announce: (step, checkpoint) -> message of the exception.
        """
        self.signals = signals
        self.saver = saver
        self.announce = announce

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.install()

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """
        Raises:
            Interrupted: a signal came and training is not over.
        """
        received = self.signals.received or 0
        if trainer.world_size > 1:  # it may have come to one process alone
            received = int(reduced(torch.tensor(received, device=trainer.strategy.root_device), "max"))
        if not received or step >= trainer.max_steps:
            return
        path = self.saver.save(trainer, step)
        name = signal.Signals(received).name
        raise Interrupted(received, f"{name}: stopped after step {step} of {trainer.max_steps}. {self.announce(step, path)}")
