"""What a person watching sees: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from components.contracts import Batch
from framework.callbacks.metrics import MetricsRow
from framework.callbacks.step import StepCallback
from framework.logging import say


def figures(metrics: dict[str, float]) -> str:
    """Loss, held-out bits per byte and speed in a few words."""
    shown = (("loss {:.3f}", "train/loss"), ("val bits/byte {:.3f}", "val/bits_per_byte"), ("{:,.0f} tokens/s", "perf/tokens_per_second"))
    return "  ".join(text.format(metrics[key]) for text, key in shown if key in metrics)


class ProgressLine(StepCallback):
    """Shows step, loss, bits per byte, tokens/s and the time left."""

    def __init__(self, rows: MetricsRow, every_seconds: float) -> None:
        """
        Args:
            rows: source of the figures.
            every_seconds: between plain lines, where standard error is no terminal.
        """
        self.rows = rows
        self.every_seconds = every_seconds
        self.bar: Progress | None = None
        self.task: Any = None
        self.started = self.spoke = 0.0
        self.first_step = 0
        self.redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started = self.spoke = time.monotonic()
        self.first_step = trainer.global_step
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, figures=figures(self.rows.last))
        for handler in logging.getLogger().handlers:  # a handler that writes to the terminal would tear the bar
            if type(handler) is logging.StreamHandler:
                self.redirected.append((handler, handler.setStream(FileProxy(console, handler.stream))))  # type: ignore[arg-type]
        self.bar.start()

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=figures(self.rows.last))
            return
        now = time.monotonic()
        if trainer.is_global_zero and now - self.spoke >= self.every_seconds:
            self.spoke = now
            left = (trainer.max_steps - step) * (now - self.started) / max(1, step - self.first_step)
            say(f"step {step}/{trainer.max_steps}  {figures(self.rows.last)}  {left:.0f} s left")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, figures=f"validating, batch {batch_idx + 1}")

    def stop(self) -> None:
        """Take the bar down and give the terminal back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        for handler, stream in self.redirected:
            handler.setStream(stream)
        self.redirected = []

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.stop()
