"""What a run will cost: a quick figure from one timed step, said before every run, and a rehearsal of the real loop for the pre-flight."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from components.contracts import Batch
from components.losses.lm import next_token_loss
from framework.callbacks.exact_state import rng_state, set_rng_state
from framework.callbacks.step import StepCallback
from framework.runtime import compute_dtype, peak_memory_bytes

ASSUMED_UTILISATION = 0.3  # of a GPU's peak, where nothing was timed
SLOW_SECONDS = 5.0  # a trial step slower than this is not repeated
WARM_UP, LEAST_STEPS, TRIAL_SECONDS = 2, 8, 5.0  # of a rehearsal: steps not counted, steps timed at least, seconds of them at least
TRIAL_BATCHES = 4  # validation batches that a rehearsal times


@dataclass(frozen=True)
class Estimate:
    """Cost of a run: seconds of training, bytes of memory, and how they were found."""

    seconds: float | None
    memory_bytes: float
    source: str


@dataclass(frozen=True)
class Rehearsal:
    """What a few real steps of a run cost, in seconds, and what the whole run will."""

    step: float  # median
    steps: int  # how many were timed
    spread: float  # width of the middle half of the timed steps, over the median
    warm_up: float  # what the first steps took longer than that
    validation: float  # one whole validation
    checkpoint: float
    sample: float
    memory_bytes: int  # largest resident size of the process, or what a GPU's allocator reserved

    def whole_run(self, config: Any) -> Estimate:
        """The cost of all steps, validations, checkpoints and samples of a configuration: what `seconds` in its metrics.json will count."""
        often = occurrences(config)
        seconds = self.warm_up + sum(count * float(getattr(self, what)) for what, count in often.items())
        return Estimate(seconds, float(self.memory_bytes), f"{self.steps} real steps timed")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; shared ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def trial(
    model: nn.Module, vocab_size: int, rows: int, seq_len: int, precision: str, optimizer: torch.optim.Optimizer | None = None
) -> float:
    """Seconds of one forward and backward on the CPU; weights, gradients and generators are as before afterwards.

    The tokens are arbitrary: cost does not depend on them. optimizer: its step is timed too; it keeps what it saw, so give one that
    nobody else uses.
    """
    state, best = rng_state(), float("inf")
    ids = (torch.arange(rows * (seq_len + 1)).view(rows, -1) * 7919) % vocab_size
    batch = Batch(input_ids=ids[:, :-1], labels=ids[:, 1:].contiguous(), segment_ids=torch.zeros(rows, seq_len, dtype=torch.int32))
    batch.position_ids = torch.arange(seq_len).expand(rows, seq_len)
    batch.task_ids = torch.zeros(rows, dtype=torch.int64)  # for an adapter with tasks; others do not ask
    dtype = compute_dtype(precision)
    kept = {p: p.detach().clone() for p in model.parameters() if p.requires_grad} if optimizer is not None else {}
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(batch)
            loss = next_token_loss(output.hidden, model.head_weight, batch.labels, rows * seq_len)  # type: ignore[arg-type]
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for p in model.parameters():
            p.grad = None
        best = min(best, time.perf_counter() - start)
        if best > SLOW_SECONDS:
            break
    with torch.no_grad():
        for p, value in kept.items():
            p.copy_(value)
    set_rng_state(state)
    return best


def estimate(
    model: nn.Module, device: torch.device, *, vocab_size: int, rows: int, seq_len: int, precision: str, micro_batches: int,
    flops_per_token: float, peak_flops: float | None, optimizer: torch.optim.Optimizer | None = None,
) -> Estimate:  # fmt: skip
    """Estimate a run of `micro_batches` batches of (rows, seq_len) tokens.

    On a CPU from one timed step (with the optimizer's part where one is given); on a GPU from the FLOP count at 30 % of its peak. Memory:
    what the process reached in the trial (on a GPU: nothing of the activations), plus two optimizer moments.
    """
    trainable, total = count_parameters(model)
    if device.type == "cpu":
        seconds: float | None = trial(model, vocab_size, rows, seq_len, precision, optimizer) * micro_batches
        return Estimate(seconds, peak_memory_bytes() + (8.0 * trainable if optimizer is None else 0.0), "from one timed step")
    tokens = micro_batches * rows * seq_len
    seconds = tokens * flops_per_token / (ASSUMED_UTILISATION * peak_flops) if peak_flops else None
    return Estimate(seconds, 4.0 * total + 12.0 * trainable, "from the FLOP count; memory without activations")


def occurrences(config: Any) -> dict[str, int]:
    """How often a run of this configuration does a step, a validation, a checkpoint and a sample."""
    steps = int(config.trainer.max_steps)

    def times(every: int, at_the_end: bool) -> int:
        if not every:
            return 0
        return steps // every + (steps % every > 0) if at_the_end else (steps - 1) // every

    return {
        "step": steps,
        "validation": times(config.validate.every_steps, True) + bool(config.validate.at_start),
        "checkpoint": times(config.checkpoint.every_steps, True),
        "sample": times(config.samples.every_steps, False),
    }


def without_interruptions(config: DictConfig) -> DictConfig:
    """A copy of a configuration whose first steps are nothing but steps: no validation, checkpoint, sample or logger between them."""
    copy = DictConfig(OmegaConf.to_container(config, resolve=True))
    never = max(int(copy.trainer.max_steps), 1_000_000)
    changes = {"logger": None, "samples.every_steps": 0, "checkpoint.every_steps": never, "validate.every_steps": never}
    for key, value in {**changes, "validate.at_start": False, "progress.every_seconds": 3600.0}.items():
        OmegaConf.update(copy, key, value)
    return copy


class RehearsalOver(Exception):
    """Leaves Lightning's loop: everything was measured."""


class StepTimer(StepCallback):
    """Times optimizer steps of the real loop; with enough of them it calls `afterwards` and leaves. Last in the callback list."""

    def __init__(self, device: torch.device, afterwards: Callable[[], None]) -> None:
        """
        Args:
            device: waited for at the end of every step.
            afterwards: measures what else there is, while the loop still holds everything.
        """
        self.device, self.afterwards = device, afterwards
        self.times: list[float] = []
        self.last = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """
        Raises:
            RehearsalOver: everything was measured.
        """
        wait_for(self.device)
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now
        if step >= trainer.max_steps:
            if len(self.times) > 1:
                self.times.pop()  # Lightning validated inside it
        elif not self.enough():
            return
        self.afterwards()
        raise RehearsalOver

    def enough(self) -> bool:
        """Were enough steps timed? Of steps that take very long a few must do."""
        spent, count = sum(self.timed), len(self.timed)
        return len(self.times) > WARM_UP and (spent >= TRIAL_SECONDS and (count >= LEAST_STEPS or spent >= 10 * TRIAL_SECONDS))

    @property
    def timed(self) -> list[float]:
        """Seconds of the steps after the warm-up; of all steps where the run has no more."""
        return self.times[WARM_UP:] or self.times


def rehearse(session: Any) -> Rehearsal:
    """Do the first steps of a run in its own loop, then a part of a validation, a checkpoint and a sample, and time each.

    Nothing is imitated: data, precision, optimizer, callbacks and devices are those of the run. Its weights are changed by it, so the
    session is of no further use. session: a `framework.train.Session` of one process and of `without_interruptions(config)`.
    """
    trainer, device = session.trainer, session.trainer.strategy.root_device
    costs: dict[str, float] = {}

    def rest() -> None:
        costs["validation"] = validation_seconds(session, device)
        with tempfile.TemporaryDirectory() as folder:
            costs["checkpoint"] = seconds_of(device, lambda: trainer.save_checkpoint(Path(folder) / "rehearsal.ckpt"))
        costs["sample"] = seconds_of(device, lambda: session.samples.sample(session.task))
        costs["memory"] = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes()

    forget_peak()
    timer = StepTimer(device, rest)
    trainer.callbacks.append(timer)
    with contextlib.suppress(RehearsalOver):
        session.fit()
    times = sorted(timer.timed)
    step, quarter = statistics.median(times), len(times) // 4
    spread = (times[-1 - quarter] - times[quarter]) / step
    warm_up = max(0.0, sum(timer.times[:WARM_UP]) - WARM_UP * step) if len(timer.times) > WARM_UP else 0.0
    return Rehearsal(
        step, len(times), spread, warm_up, costs["validation"], costs["checkpoint"], costs["sample"], int(costs["memory"])
    )  # fmt: skip


def forget_peak() -> None:
    """Let the peak of this process' memory begin at what it holds now, where the system can (Linux).

    Data that are not cached yet need memory of their own to be prepared; the run that follows finds them cached.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, action: Callable[[], Any]) -> float:
    """Seconds of an action, the device's work included."""
    wait_for(device)
    start = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - start


def validation_seconds(session: Any, device: torch.device) -> float:
    """Seconds of one whole validation, from a few batches; 0 where there is none."""
    trainer, task, limit = session.trainer, session.task, session.trainer.limit_val_batches
    batches = session.datamodule.val_dataloader()
    held_out = len(batches) if hasattr(batches, "__len__") else sum(1 for _ in batches)
    count = min(held_out, limit) if isinstance(limit, int) else round(held_out * limit)
    seconds: list[float] = []
    task.eval()
    task.on_validation_epoch_start()

    def one(batch: Batch, index: int) -> None:
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            task.validation_step(batch.to(device), index)

    for index, batch in enumerate(batches):
        if index >= min(count, TRIAL_BATCHES):
            break
        seconds.append(seconds_of(device, lambda b=batch, i=index: one(b, i)))  # type: ignore[misc]
    task.train()
    return statistics.median(seconds) * count if seconds else 0.0
