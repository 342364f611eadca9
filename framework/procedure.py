"""A task of train.py that is run instead of trained: it gets the built parts, returns metrics, and its run reads like any other.

Such a task is a subclass of `Procedure`; every other one is a LightningModule. Sweeps, reports and claims see no difference.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from components.contracts import Data, Tokenizer, UserError
from framework import build, runtime
from framework.estimate import count_parameters
from framework.logging import LocalLogger, RunLogger, say, write_summary
from framework.opening import open_run
from framework.parts import Parts
from framework.runs import write_state
from framework.signatures import locate


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
            raise runtime.Interrupted(signum, f"stopped; start it again with: python train.py resume={self.run_dir}")


class Procedure:
    """Base of the tasks of train.py that are no LightningModule."""

    def run(self, context: Context) -> dict[str, float]:
        """Do the work and return the metrics."""
        raise NotImplementedError


def is_procedure(task: Any) -> bool:
    """Is the node `task` run rather than trained?"""
    target = locate(task["_target_"], ("",))
    return isinstance(target, type) and issubclass(target, Procedure)


def run_procedure(config: DictConfig, run_dir: Path, parts: Parts) -> dict[str, float]:
    """Run the configured procedure; whatever happens, leave a true status and nothing open behind.

    Returns: the metrics of metrics.json: those of the procedure, and seed, seconds, parameters and peak memory.
    Raises: UserError for what the user can mend; Interrupted after a signal.
    """
    task: Procedure = build.build(config.task)
    device, dtype = place(config)
    parts.model.to(device).eval()
    signals, service = runtime.StopSignals(), build.build(config.logger)
    loggers: list[RunLogger] = [LocalLogger(run_dir), *([service] if service is not None else [])]
    context = Context(parts.model, parts.tokenizer, parts.data, device, dtype, config.seed, loggers, signals, run_dir)
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
    say(f"{metrics['seconds']:.0f} s; results in {run_dir}")
    return metrics


def place(config: DictConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that the option of `trainer` means. Raises UserError for several processes."""
    trainer = config.trainer
    if trainer.get("devices", 1) not in (1, "1", "auto") or trainer.get("num_nodes", 1) != 1:
        raise UserError(f"trainer.devices: {trainer.get('devices')}; this task runs in one process; use trainer=cpu or trainer=gpu")
    cuda = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu"), runtime.compute_dtype(trainer.precision)
