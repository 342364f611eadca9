"""Several processes in one run: starting the further ones, agreeing between them, and which modules are sharded together.

Lightning would start them by running the command line again. In a sweep that starts the sweep again in each of them, with other folders
and, under a sampler, other values; `resume=auto` and `ckpt=last` mean another run by then; and a launcher's worker has no command line
of its own. So the first process hands its finished configuration to the others, and Lightning finds them started.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from components.contracts import Model, UserError
from framework.runs import write_state
from framework.runtime import usable_cpus

LOOPBACK = "127.0.0.1"
PLACE = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment: a process' place among the others
READY = b"ready\n"
GRACE_SECONDS = 10.0  # for the others to end by themselves
STUCK_SECONDS = 60.0  # after another process died, until this one is ended if it has not noticed
# _exit: what it did is on disk, and clearing up an interpreter with threads of gloo in it may abort and spoil a finished run
CHILD = "import os, sys; from framework.distributed import further_process; code = further_process(); sys.stderr.flush(); os._exit(code)"

_ready_pipe: int | None = None  # in a further process: where it says that it stands before the first step


def is_first() -> bool:
    """Is this the process that writes files and talks? Known before anything is built."""
    return rank_zero_only.rank in (None, 0)  # type: ignore[attr-defined]


def reduced(value: Tensor, op: str = "sum") -> Tensor:
    """A tensor summed ("sum"), averaged ("mean") or maximised ("max") over all processes; a copy, `value` is left as it is."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.clone()
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX if op == "max" else torch.distributed.ReduceOp.SUM)
    return value / torch.distributed.get_world_size() if op == "mean" else value


class Others:
    """The further processes of a run on this machine, as the first one sees them. Their errors go to rankN.log in the run directory."""

    def __init__(self, count: int, order: dict[str, Any], run_dir: Path) -> None:
        """
        Args:
            count: processes to start, besides this one.
            order: what `further_process` reads from its standard input.
            run_dir: folder of the run.
        """
        self.run_dir = run_dir
        self.closed = False
        self.processes: list[subprocess.Popen[bytes]] = []
        paths = os.pathsep.join(path for path in [str(Path(__file__).resolve().parent.parent), *sys.path] if path)
        for rank in range(1, count + 1):
            environment = {**os.environ, "LOCAL_RANK": str(rank), "PYTHONPATH": paths}
            with open(self.log(rank), "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", CHILD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    start_new_session=True,  # Ctrl-C is the first process' to answer: it decides for all
                )  # fmt: skip
            self.processes.append(process)
            with contextlib.suppress(BrokenPipeError), stdin(process) as pipe:
                pipe.write(json.dumps(order).encode())

    def log(self, rank: int) -> Path:
        """Where standard error of a process goes; empty ones are removed at the end."""
        return self.run_dir / f"rank{rank}.log"

    def wait_until_ready(self) -> None:
        """Return when all stand before their first step: until then a death would leave this process waiting for half an hour.

        Raises:
            UserError: one of them ended before.
        """
        for process in self.processes:
            assert process.stdout is not None
            if process.stdout.readline() != READY:
                process.wait()
                raise self.failure() or UserError(f"trainer.devices: a process ended before training; see {self.log(1)}")
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """End this process when another died and it does not notice: some backends wait for the dead for half an hour."""
        while not self.closed and not any(process.poll() for process in self.processes):
            time.sleep(1.0)
        deadline = time.monotonic() + STUCK_SECONDS
        while not self.closed and time.monotonic() < deadline:
            time.sleep(1.0)
        if not self.closed:
            print(f"error: {self.failure()}", file=sys.stderr, flush=True)
            write_state(self.run_dir, status="failed")
            os._exit(1)

    def failure(self) -> UserError | None:
        """What the user should know of the first process that failed by itself; None where none did."""
        for rank, process in enumerate(self.processes, 1):
            code = process.poll()
            lines = self.log(rank).read_text(errors="replace").splitlines() if code else []
            if code == 2 and lines:
                return UserError(f"process {rank}: {lines[-1].removeprefix('error: ')}")
            if code:
                how = f"was killed by signal {-code}; is there enough memory?" if code < 0 else f"ended with code {code}"
                where = f"; see {self.log(rank)}" if lines else ""
                return UserError(f"trainer.devices: process {rank} {how}{where}; go on with: python train.py resume={self.run_dir}")
        return None

    def stop(self) -> UserError | None:
        """Wait for them to end, end those that do not; returns what failed by itself."""
        deadline = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        failure = self.failure()
        self.closed = True
        for rank, process in enumerate(self.processes, 1):
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            if not self.log(rank).stat().st_size:
                self.log(rank).unlink()
        return failure

    def forget(self) -> None:
        """Remove what they wrote to standard error: it says nothing that this process does not say."""
        for rank, _ in enumerate(self.processes, 1):
            self.log(rank).unlink(missing_ok=True)


def stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    """The open standard input of a process."""
    assert process.stdin is not None
    return process.stdin


@contextlib.contextmanager
def all_processes(trainer: pl.Trainer, config: DictConfig, run_dir: Path, resuming: bool) -> Iterator[None]:
    """Inside, every process that the trainer counts on is there; afterwards those that were started here are gone, without a trace.

    Processes that somebody else started (torchrun, SLURM) are left alone.

    Args:
        trainer: says how many there are.
        config, run_dir, resuming: arguments of `framework.train.train` in each.

    Raises:
        UserError: one of the others failed, or the trainer starts processes in a way that cannot work here.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None:
        yield
    elif environment.creates_processes_externally:
        if _ready_pipe is not None:
            os.write(_ready_pipe, READY)
        try:
            yield
        finally:
            leave_group()
    else:
        check_launch(trainer)
        with own_place(trainer.num_devices):
            yield from with_others(trainer.num_devices - 1, config, run_dir, resuming)


def with_others(count: int, config: DictConfig, run_dir: Path, resuming: bool) -> Iterator[None]:
    """The part of `all_processes` between the start and the end of the further processes."""
    order = {"config": OmegaConf.to_container(config), "run_dir": str(run_dir), "resuming": resuming}
    others = Others(count, order, run_dir)
    alike = True  # do all end as this process does?
    try:
        alike = False
        others.wait_until_ready()
        alike = True
        yield
    except Exception as error:
        failure = others.stop()
        alike = alike and not ended_by_others(error)
        if failure is not None and ended_by_others(error):
            raise failure from error
        raise
    finally:
        leave_group()
        if not others.closed and (failure := others.stop()) is not None and sys.exception() is None:
            alike = False
            print(f"after training: {failure}", file=sys.stderr)
        if alike:
            others.forget()


def ended_by_others(error: Exception) -> bool:
    """Does the error say no more than that another process is gone?"""
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def check_launch(trainer: pl.Trainer) -> None:
    """
    Raises:
        UserError: the trainer wants several machines, or a way to start processes that copies this one.
    """
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes: {trainer.num_nodes}; start the processes with torchrun or SLURM, and give all of them one hydra.run.dir"
        )
    method = getattr(trainer.strategy, "_start_method", "popen")
    if method != "popen":
        raise UserError(f"trainer.strategy: processes started by {method} do not return what they measured; use trainer=ddp or ddp_cpu")


@contextlib.contextmanager
def own_place(processes: int) -> Iterator[None]:
    """Take the first place of a group on this machine; afterwards the environment and the threads are as before."""
    before = {key: os.environ.get(key) for key in (*PLACE, "OMP_NUM_THREADS")}
    threads = torch.get_num_threads()
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    place = {"LOCAL_RANK": 0, "NODE_RANK": 0, "WORLD_SIZE": processes, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    if before["OMP_NUM_THREADS"] is None:
        share = max(1, usable_cpus() // processes)
        os.environ["OMP_NUM_THREADS"] = str(share)
        torch.set_num_threads(min(threads, share))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def leave_group() -> None:
    """Leave the process group, so that the next job of a sweep can form its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def further_process() -> int:
    """What a further process does: train as the first one said, silently; returns its exit code."""
    global _ready_pipe
    follow_parent()
    order = json.load(sys.stdin)
    _ready_pipe = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    from framework import entry, resolvers
    from framework.train import train

    resolvers.register()
    try:
        train(OmegaConf.create(order["config"]), Path(order["run_dir"]), order["resuming"])
    except (Exception, KeyboardInterrupt) as error:
        return entry.report(error)
    return 0


def follow_parent() -> None:
    """End this process when the one that started it is gone, whatever it is doing then."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def sharding_units(model: nn.Module) -> list[str]:
    """Paths of the modules whose parameters are gathered together: each layer of the model's stack of layers.

    Embedding, final norm and head stay at the root, which is gathered for the whole step: the loss reads the head's weight directly.

    Raises:
        ValueError: a parameter that belongs to no layer has a role that only layers have.
    """
    assert isinstance(model, Model)
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in stacks if not any(path.startswith(f"{other}.") for other in stacks)]
    units = [f"{path}.{index}" for path in outermost for index in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]
    for name, role in model.roles().items():
        inside = any(name.startswith(f"{unit}.") for unit in units)
        if not inside and role not in ("embedding", "head", "norm", "adapter"):
            raise ValueError(f"{name} ({role}) is in no layer: a sharded step would keep it whole on every device")
    return units


def mark_units(model: nn.Module) -> None:
    """Mark the modules of `sharding_units` for `is_unit`."""
    for path in sharding_units(model):
        model.get_submodule(path).sharded_together = True  # type: ignore[assignment]


def is_unit(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Wrapping policy of torch's FSDP: descend everywhere (recurse), wrap the marked modules."""
    return recurse or bool(getattr(module, "sharded_together", False))


def is_sharded(trainer: pl.Trainer) -> bool:
    """Does each process hold only a piece of every parameter?"""
    from lightning.pytorch.strategies import FSDPStrategy

    return isinstance(trainer.strategy, FSDPStrategy)


def check_sharded(config: DictConfig, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        UserError: a part of the configuration needs whole parameters.
    """
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        raise UserError(
            f"optimizer: {type(optimizer).__name__} needs whole matrices, and trainer=fsdp leaves each process pieces of a flat vector; "
            "use trainer=ddp, where the processes share out the state of the matrices, or optimizer=adamw"
        )
    if config.ema.enabled:
        raise UserError("ema.enabled: true needs whole parameters, and trainer=fsdp leaves each process pieces; use ema.enabled=false")
    if config.compile.enabled:
        raise UserError("compile.enabled: true with trainer=fsdp is not supported; use compile.enabled=false or trainer=ddp")
