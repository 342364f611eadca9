"""A training run from a validated configuration: build, say what it will cost, fit, and say what came out."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from components.adapters.base import breakdown, may_rest, tasks_to_say
from components.adapters.base.sharing import sharing
from components.contracts import Batch, UserError
from components.optim.groups import describe
from framework import build, distributed, runtime
from framework.callbacks.checkpoints import Checkpoints, StopOnSignal
from framework.callbacks.early_stop import EarlyStop
from framework.callbacks.ema import Ema
from framework.callbacks.exact_state import ExactState
from framework.callbacks.metrics import MetricsRow
from framework.callbacks.nan_guard import Diverged, NanGuard
from framework.callbacks.progress import ProgressLine
from framework.callbacks.samples import Samples, sample_writer
from framework.callbacks.step import LastStep
from framework.callbacks.throughput import Throughput
from framework.checkpoint import AtomicCheckpointIO
from framework.datamodule import StreamDataModule
from framework.estimate import count_parameters, estimate
from framework.likelihood import in_words
from framework.logging import LocalLogger, RunLogger, read_rows, say, say_text, write_summary
from framework.opening import open_run
from framework.parts import Parts, build_parts, save_setup, with_head
from framework.plots import loss_curve
from framework.procedure import check_procedure, is_procedure, run_procedure
from framework.runs import write_state
from framework.task_report import draw, interference, means, sharing_figures

NOISE = ("lightning.pytorch", "lightning.fabric", "lightning")  # loggers that repeat what we say ourselves


def train(config: DictConfig, run_dir: Path, resuming: bool = False) -> dict[str, float]:
    """Train or continue a run, or run the procedure that its task is.

    Args:
        config: composed and validated.
        run_dir: folder of the run; made when it is not there.
        resuming: go on from the newest readable checkpoint in run_dir (from the start where there is none).

    Returns:
        The metrics of metrics.json.

    Raises:
        UserError: anything that the user can mend, among it a loss that is no longer finite.
        Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    for name in NOISE:
        logging.getLogger(name).setLevel(logging.ERROR)
    runtime.prepare_process(config.seed)
    first = distributed.is_first()
    with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")  # advice on loaders and logging that does not apply here
        parts = build_parts(config, run_dir, resuming)
        if procedure := is_procedure(config.task):
            check_procedure(config, parts)
        config = save_setup(config, run_dir, parts) if first else with_head(config, parts)
        if procedure:
            return run_procedure(config, run_dir, parts, resuming)
        session = Session(config, run_dir, parts, resuming)
        return session.run() if first else session.follow()


def profile_of(trainer: pl.Trainer) -> str:
    """The table of Lightning's profiler, '' without one."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    return str(profiler.summary()) if hasattr(profiler, "summary") else ""


class Session:
    """One process' part of a run: from the built parts to the last line. Only the first process writes and talks."""

    def __init__(self, config: DictConfig, run_dir: Path, parts: Parts, resuming: bool = False) -> None:
        self.config, self.run_dir, self.parts, self.resuming = config, run_dir, parts, resuming
        self.signals = runtime.StopSignals()
        self.service: RunLogger | None = None
        self.loggers: list[RunLogger] = []
        if distributed.is_first():
            self.service = build.build(config.logger)
            self.loggers.append(LocalLogger(run_dir, keep_up_to=parts.start_step if parts.resume_file else -1))
            self.loggers += [self.service] if self.service is not None else []
        self.datamodule = StreamDataModule(parts.data, config.seed)
        self.write_sample = sample_writer(
            parts.model, parts.tokenizer, parts.data, config.samples.prompt, config.samples.max_new_tokens, config.seed
        )
        self.trainer = self.make_trainer()
        self.device = self.trainer.strategy.root_device
        if distributed.is_sharded(self.trainer):
            distributed.check_sharded(config, build.build_optimizer(config, parts.model))
            distributed.mark_units(parts.model)
        self.task = self.make_task()

    def make_trainer(self) -> pl.Trainer:
        """The configured Trainer with our callbacks. Their order matters: see StepCallback."""
        config = self.config
        self.clock = Throughput(3.0 * self.parts.model.forward_flops(self.parts.data.seq_len), None)
        self.rows = MetricsRow(self.clock, config.trainer.log_every_n_steps)
        self.ema = Ema(config.ema.decay) if config.ema.enabled else None
        saver = Checkpoints(self.run_dir, **config.checkpoint, clock=self.clock, rows=self.rows)
        weights = self.ema.applied if self.ema else None
        self.samples = Samples(config.samples.every_steps, self.write_sample, say_text, self.clock, weights)
        exact, guard, progress = ExactState(), NanGuard(self.run_dir), ProgressLine(self.rows, config.progress.every_seconds)
        stop = StopOnSignal(self.signals, saver, lambda step, path: f"Go on with: python train.py resume={self.run_dir}")
        averaging = [self.ema] if self.ema else []
        early = [] if config.stop.train_loss_below is None else [EarlyStop(config.stop.train_loss_below, config.stop.steps)]
        options: Any = OmegaConf.to_container(config.trainer)
        strategy = options.get("strategy")
        if may_rest(self.parts.model) and isinstance(strategy, dict) and "find_unused_parameters" in strategy:
            strategy["find_unused_parameters"] = True  # else an expert without rows gets zeros as its gradient, and decay moves it
        make = build.build({**options, "_partial_": True})
        return make(
            callbacks=[LastStep(), *early, *averaging, self.clock, guard, self.rows, self.samples, exact, saver, progress, stop],
            logger=self.loggers,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(self.run_dir),
            val_check_interval=config.validate.every_steps * config.trainer.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def make_task(self) -> pl.LightningModule:
        """The configured task round the model."""
        config = self.config
        if is_procedure(config.task):
            raise UserError("preflight: this task trains nothing that could be rehearsed; drop preflight=true")
        make_schedule = build.build(config.schedule)
        make = build.build({**OmegaConf.to_container(config.task), "_partial_": True})  # type: ignore[dict-item]
        task = make(
            model=self.parts.model,
            make_optimizer=lambda model: build.build_optimizer(config, model),
            make_schedule=lambda optimizer, steps: make_schedule(optimizer, total_steps=steps),
            val_bytes=self.parts.data.val_bytes,
        )
        task.own_settings = bool(config.resume_force)
        return task

    def announce(self) -> None:
        """Say what this run is, what it will cost, and how its parameters are grouped."""
        parts, trainer, processes = self.parts, self.trainer, self.trainer.world_size
        peak, self.peak_source = runtime.peak_flops(self.device, trainer.precision)
        shared = self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ  # the processes divide what was measured
        self.clock.peak_flops = peak * (trainer.num_nodes if shared else processes) if peak else None
        trainable, total = count_parameters(parts.model)
        facts, rows = parts.data.summary(), parts.data.batch_size
        micro_batches = max(0, trainer.max_steps - parts.start_step) * trainer.accumulate_grad_batches
        optimizer = build.build_optimizer(self.config, parts.model)  # for this purpose alone
        groups = describe(optimizer)
        cost = estimate(
            parts.model, self.device, vocab_size=parts.tokenizer.vocab_size, rows=rows, seq_len=parts.data.seq_len,
            precision=trainer.precision, micro_batches=micro_batches, flops_per_token=self.clock.flops_per_token, peak_flops=peak,
            optimizer=optimizer,
        )  # fmt: skip
        tokens = micro_batches * rows * parts.data.seq_len * processes
        time = f"{cost.seconds:.0f} s" if cost.seconds is not None else "an unknown time"
        peak = self.clock.peak_flops
        speed = f", peak {peak / 1e9:,.0f} GFLOP/s ({self.peak_source})" if peak else f" ({self.peak_source})"
        say(
            f"{total:,} parameters ({trainable:,} trainable); {facts.get('train_tokens', 0):,} training tokens in the data, "
            f"{tokens:,} in this run ({trainer.precision}{f', {processes} processes' if processes > 1 else ''}); "
            f"about {cost.memory_bytes / 2**30:.1f} GiB{' each' if processes > 1 else ''} and {time} ({cost.source}); "
            f"{self.clock.flops_per_token / 1e6:,.1f} MFLOP a token{speed}"
        )
        if line := breakdown(parts.model):
            say(line)
        table = Table(box=None, pad_edge=False)
        for key in groups[0] if groups else ():
            table.add_column(key, justify="left" if isinstance(groups[0][key], str) else "right")
        for group in groups:
            table.add_row(*(f"{x:,}" if isinstance(x, int) else f"{x:g}" if isinstance(x, float) else x for x in group.values()))
        Console(width=160).print(table)
        if parts.resume_file is not None:
            say(f"going on from {parts.resume_file}")

    def run(self) -> dict[str, float]:
        """Fit; whatever happens, leave a true status and nothing open behind."""
        status, code, metrics = "failed", 1, {}
        self.announce()
        self.open()
        try:
            with self.signals.guarded(), distributed.all_processes(self.trainer, self.config, self.run_dir, self.resuming):
                self.fit()
            metrics = self.finish()
            status, code = "done", 0
        except runtime.Interrupted as stop:
            status, code = "interrupted", 128 + stop.signal
            raise
        except Diverged:
            status = "diverged"
            raise
        finally:
            write_state(self.run_dir, status=status, **({"step": self.trainer.global_step} if code == 0 else {}))
            lines = [line for logger in self.loggers for line in logger.close(code, metrics)]
            if self.config.compile.enabled:
                torch._dynamo.reset()
            for line in lines:
                say(line)
        if profile := profile_of(self.trainer):
            say(profile)
        if tasks := tasks_to_say(self.parts.model):
            say(f"next: python generate.py ckpt={self.run_dir} adapter.task={tasks[0]} prompt='...'   (or another of the tasks)")
            return metrics
        say(f"next: python generate.py ckpt={self.run_dir} prompt='...'")
        say(f"or:   python train.py ckpt={self.run_dir} data=text data.path=FILE   (go on from these weights on text of your own)")
        return metrics

    def follow(self) -> dict[str, float]:
        """The part of a process that is not the first: fit and nothing else; returns the newest row."""
        with self.signals.guarded(), distributed.all_processes(self.trainer, self.config, self.run_dir, self.resuming):
            self.fit()
        return dict(self.rows.last)

    def open(self) -> None:
        """Make the run known."""
        open_run(self.config, self.run_dir, self.parts, self.service)

    def fit(self) -> None:
        """Train, from the checkpoint where there is one."""
        config, file = self.config, self.parts.resume_file
        if config.compile.enabled:
            mode = config.compile.mode if config.compile.backend == "inductor" else None
            logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # a break at each of our kernels is meant
            self.parts.model.compile(backend=config.compile.backend, mode=mode)
        if config.validate.at_start and file is None and self.trainer.limit_val_batches:
            self.trainer.validate(self.task, datamodule=self.datamodule, verbose=False)
        path = str(file) if file is not None else None
        self.trainer.fit(self.task, datamodule=self.datamodule, ckpt_path=path, weights_only=True)

    def evaluations(self) -> dict[str, float]:
        """The data's further held-out batches, measured with the weights as they are now: {eval/NAME/loss, eval/NAME/accuracy}."""
        sets = self.parts.data.evaluations()
        found: dict[str, float] = {}
        if sets and distributed.is_sharded(self.trainer):
            say(f"not measured, since each process holds a part of the weights: {', '.join(sets)}")
            return {}
        weights = self.ema.applied(self.task) if self.ema else contextlib.nullcontext()
        with weights, self.trainer.precision_plugin.forward_context():
            self.task.eval()
            for name, batches in sets.items():
                result = self.task.evaluate(batches)  # type: ignore[operator]
                found |= {f"eval/{name}/{key}": value for key, value in result.items()}
                say(f"{name}: {in_words(result)}")
            if tasks := list(getattr(self.parts.data, "task_names", ())):
                found |= self.report_tasks(tasks, found, {name: sets[name] for name in tasks if name in sets})
        return found

    def report_tasks(self, tasks: list[str], measured: dict[str, float], sets: Mapping[str, Iterable[Batch]]) -> dict[str, float]:
        """Figures of tasks that were trained together, with their pictures in the run's folder; see framework/task_report.py."""
        model = self.parts.model
        conflict, table = interference(model, sets, self.task.device)
        shared = sharing(model) if len(tasks) > 1 else {}
        pictures = draw(self.run_dir, tasks, table, shared)
        if self.service is not None:
            self.service.log_images({path.stem: path for path in pictures})
        found = means(measured, tasks) | conflict | sharing_figures(shared)
        say(f"over the tasks: {in_words({key.removeprefix('tasks/'): value for key, value in found.items()})}")
        return found

    def finish(self) -> dict[str, float]:
        """Write metrics.json and loss.png; say what came out."""
        baselines = self.parts.data.baselines()
        trainable, total = count_parameters(self.parts.model)
        metrics = {
            **self.rows.last, **{f"baseline/{name}_bits_per_byte": value for name, value in baselines.items()},
            **self.clock.totals(), "seed": self.config.seed, "step": self.trainer.global_step, "params/trainable": trainable,
            "params/total": total, "perf/peak_memory_bytes": runtime.peak_memory_bytes(),
        }  # fmt: skip
        write_summary(self.run_dir, metrics)  # nothing that was trained is lost, whatever the rest meets
        if measured := self.evaluations():
            metrics |= measured
            write_summary(self.run_dir, metrics)
        title = f"{self.config.name}: {self.run_dir.name}"
        loss_curve(read_rows(self.run_dir), baselines, self.run_dir / "loss.png", title, str(self.task.loss_unit))
        others = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
        bits, loss = metrics.get("val/bits_per_byte"), metrics.get("val/loss")
        result = (
            f"held-out bits per byte {bits:.4f}" if bits is not None else "no validation" if loss is None else f"held-out loss {loss:.4f}"
        )
        speed = f"{metrics.get('perf/tokens_per_second', 0.0):,.0f} tokens/s"
        used = f", {metrics['perf/mfu']:.1%} of {self.peak_source}" if "perf/mfu" in metrics else ""
        say(result + (f" (simple models of the same bytes: {others})" if others else ""))
        say_text("sample:", self.samples.sample(self.task))
        say(f"{metrics['tokens']:,.0f} tokens in {metrics['seconds']:.0f} s ({speed}{used}); results in {self.run_dir}")
        return metrics
