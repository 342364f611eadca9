"""A task of train.py that is run instead of trained: it gets the built parts, returns metrics, and its run reads like any other.

Such a task is a subclass of `Procedure`; every other one is a LightningModule. Sweeps, reports and claims see no difference.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from components.adapters.base import tasks_to_say
from components.contracts import IGNORE, Batch, Data, Tokenizer, UserError
from framework import build, runtime
from framework.estimate import count_parameters
from framework.logging import LocalLogger, RunLogger, say, write_summary
from framework.opening import open_run
from framework.parts import Parts
from framework.runs import write_state
from framework.signatures import locate

# What a procedure would pass over in silence, and its value when it is off.
ASKS = {"stop.train_loss_below": "null", "data.eval_lengths": "[]", "compile.enabled": "false", "ema.enabled": "false"}


@dataclass
class Context:
    """What a procedure works with.

    model: in eval mode, on `device`. dtype: of autocast, float32 for none. data: prepared. Rows of `log` are one a `step`, counted by the
    procedure.
    """

    model: Any  # nn.Module and Model of the contract
    tokenizer: Tokenizer
    data: Data
    device: torch.device
    dtype: torch.dtype
    seed: int
    loggers: list[RunLogger]
    signals: runtime.StopSignals
    run_dir: Path
    goes_on: bool  # as that of the procedure
    closing: list[str] = field(default_factory=list)  # lines for the user at the very end

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Write one row of metrics.csv and of the service; 'tokens' in it is the service's x-axis."""
        for logger in self.loggers:
            logger.log_metrics(row, step)

    def progress(self, line: str | None = None) -> None:
        """Say how far it is, and stop here when a signal asked for that. Call it at least every few seconds, with or without a line.

        Raises: Interrupted.
        """
        if line is not None:
            say(line)
        if (signum := self.signals.received) is not None:
            how = "go on" if self.goes_on else "start it again"
            raise runtime.Interrupted(signum, f"stopped; {how} with: python train.py resume={self.run_dir}")


class Procedure:
    """Base of the tasks of train.py that are no LightningModule.

    goes_on: whether a resumed run keeps what was done before, its rows of metrics among it; if not, it starts from the beginning.
    """

    goes_on = False

    def check(self, config: DictConfig, parts: Parts) -> None:
        """Raise UserError for what it cannot work with. Called before anything is written, so that a mistake leaves no run behind."""

    def run(self, context: Context) -> dict[str, float]:
        """Do the work and return the metrics."""
        raise NotImplementedError


def is_procedure(task: Any) -> bool:
    """Is the node `task` run rather than trained?"""
    target = locate(task["_target_"], ("",))
    return isinstance(target, type) and issubclass(target, Procedure)


def check_procedure(config: DictConfig, parts: Parts) -> None:
    """Raise UserError for what the configured procedure, or any, cannot work with."""
    place(config)
    build.build(config.task).check(config, parts)


def refuse_several_tasks(parts: Parts) -> None:
    """Raise UserError for an adapter with several tasks, which is several models."""
    if tasks := tasks_to_say(parts.model):
        raise UserError(
            f"adapter: it has {len(tasks)} tasks ({', '.join(tasks)}), and this task works on one model; write that of one by "
            "python generate.py task=export adapter.task=NAME ckpt=RUN_DIR, and take that folder as ckpt"
        )


def run_procedure(config: DictConfig, run_dir: Path, parts: Parts, resuming: bool) -> dict[str, float]:
    """Run or resume the configured procedure; whatever happens, leave a true status and nothing open behind.

    Returns: the metrics of metrics.json: those of the procedure, and seed, seconds, parameters and peak memory.
    Raises: UserError for what the user can mend; Interrupted after a signal.
    """
    task: Procedure = build.build(config.task)
    device, dtype = place(config)
    parts.model.to(device).eval()
    signals, service = runtime.StopSignals(), build.build(config.logger)
    rows = LocalLogger(run_dir, keep_up_to=sys.maxsize if resuming and task.goes_on else -1)
    loggers: list[RunLogger] = [rows, *([service] if service is not None else [])]
    context = Context(parts.model, parts.tokenizer, parts.data, device, dtype, config.seed, loggers, signals, run_dir, task.goes_on)
    trainable, total = count_parameters(parts.model)
    say(f"{total:,} parameters; {type(task).__name__} on {device.type} ({str(dtype).removeprefix('torch.')})")
    open_run(config, run_dir, parts, service)
    status, code, metrics, began = "failed", 1, {}, time.monotonic()
    try:
        with signals.guarded():
            signals.install()
            found = task.run(context)
        metrics = {
            **found, "seed": config.seed, "seconds": time.monotonic() - began, "params/trainable": trainable, "params/total": total,
            "perf/peak_memory_bytes": runtime.peak_memory_bytes(),
        }  # fmt: skip
        write_summary(run_dir, metrics)
        status, code = "done", 0
    except runtime.Interrupted as stop:
        status, code = "interrupted", 128 + stop.signal
        raise
    finally:
        write_state(run_dir, status=status)
        lines = [line for logger in loggers for line in logger.close(code, metrics)]
        for line in lines:
            say(line)
    for line in (f"{metrics['seconds']:.0f} s; results in {run_dir}", *context.closing):
        say(line)
    return metrics


def place(config: DictConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that the option of `trainer` means. Raises UserError for several processes."""
    trainer = config.trainer
    if trainer.get("devices", 1) not in (1, "1", "auto") or trainer.get("num_nodes", 1) != 1:
        raise UserError(f"trainer.devices: {trainer.get('devices')}; this task runs in one process; use trainer=cpu or trainer=gpu")
    cuda = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu"), runtime.compute_dtype(trainer.precision)


def autocast(context: Context) -> AbstractContextManager[Any]:
    return torch.autocast(context.device.type, context.dtype, enabled=context.dtype != torch.float32)


def refuse_unheard(config: DictConfig, heard: Sequence[str] = ()) -> None:
    """Raise UserError for the first key of ASKS that is set: it would be ignored in silence. heard: keys that the task does look at."""
    for key, off in ASKS.items():
        if key in heard:
            continue
        value = OmegaConf.select(config, key)
        if value is not None and value is not False and value != []:  # 0.0 asks for something
            raise UserError(f"{key}: {value}; this task trains and evaluates nothing, so that it would have no effect; leave it {off}")


def text_ids(data: Data, count: int, seed: int, key: str, most: int | None = None) -> Tensor:
    """(count,) int64: tokens of the held-out text in reading order, then of the training text. most: take up to so many where they are.

    Raises: UserError, naming `key`, where there are not `count`.
    """
    wanted = count if most is None else most
    epoch = data.train_stream(seed)
    found: list[Tensor] = []
    for batch in itertools.chain(data.val_batches(), itertools.islice(epoch, len(epoch))):
        found += said(batch, data.tokenizer.eot_id)
        if sum(map(len, found)) >= wanted:
            break
    if (have := sum(map(len, found))) >= count:
        return torch.cat(found)[:wanted].long()
    raise UserError(f"{key}: the data has {have:,} tokens and {count:,} are needed; lower it, or give more text")


def said(batch: Batch, eot_id: int) -> list[Tensor]:
    """The tokens that each row reads, whether they are labels or not, without what fills it up at the end."""
    assert batch.labels is not None
    used = (batch.labels != IGNORE) | (batch.input_ids != eot_id)  # (B, T)
    return [row[: int(some.nonzero()[-1]) + 1] for row, some in zip(batch.input_ids, used, strict=True) if some.any()]
