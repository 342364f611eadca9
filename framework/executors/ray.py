"""Option executor=ray: copies of the engine in the processes of a Ray cluster, fed by Ray Data."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from components.contracts import Engine, UserError
from framework.build import Run
from framework.engines.building import exported, takes
from framework.executors.ray_engine import Options, RayEngine
from framework.executors.ray_worker import Recipe, described
from framework.runtime import usable_cpus
from framework.signatures import ALLOWED, locate

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # of its C++ side, which writes to our stderr
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what other processes print is in Ray's own files, and never on our stdout
}
CONNECT_SECONDS = 10
PATIENCE_SECONDS = 60  # before it is said what a cluster seems to lack


class Ray:
    """Large generation jobs on one machine or many: every worker holds the run and its own engine, of whatever kind `engine=` says.

    Args:
        workers: copies of the engine; None: as many as the cluster has room for.
        cpus_per_worker, gpus_per_worker: what each takes of the cluster; parts of one are allowed.
        batch_size: requests of a block; see `RayEngine`.
        window: requests of a Dataset.
        address: of a cluster that runs (auto or HOST:PORT); None: one of our own, which ends with this process, however that ends.
        object_store_bytes: shared memory of our own cluster.

    Of a cluster that runs, every machine must have the project, the run and paths.cache_dir under the paths that they have here.

    Raises: UserError where Ray is not installed, no cluster answers, or it has no room, and for values that are not allowed.
    """

    in_process = False

    def __init__(
        self, workers: int | None, cpus_per_worker: float, gpus_per_worker: float, batch_size: int, window: int, address: str | None,
        object_store_bytes: int,
    ) -> None:  # fmt: skip
        for key, value in (("workers", workers), ("batch_size", batch_size), ("window", window)):
            if value is not None and value < 1:
                raise UserError(f"executor.{key}: {value}; at least 1 is allowed")
        for key, share in (("cpus_per_worker", cpus_per_worker), ("gpus_per_worker", gpus_per_worker)):
            whole = share <= 1 or share == int(share)
            if not (0 <= share < math.inf and whole) or (share == 0 and key == "cpus_per_worker"):
                least = "above 0" if key == "cpus_per_worker" else "0"
                raise UserError(f"executor.{key}: {share}; {least}, and a whole number where it is more than 1, is allowed")
        if object_store_bytes < 80_000_000:
            raise UserError(f"executor.object_store_bytes: {object_store_bytes}; Ray needs at least 80000000")
        self.workers, self.batch_size, self.window, self.address = workers, batch_size, window, address
        self.needs = {"CPU": float(cpus_per_worker), "GPU": float(gpus_per_worker)}
        self.object_store_bytes = object_store_bytes
        self._open = 0  # engines
        self._ours = False  # the connection, which is then ours to end

    def engine(self, config: DictConfig, run: Run | None, cache_dir: Path) -> Engine:
        """See `framework/generate.py`, `Executor`. One copy is made and left again, to learn what it says of itself."""
        recipe = Recipe.of(config, None if run is None else run.file, cache_dir)
        allowed = (*ALLOWED, *config.allow_targets)
        self._check_room()
        if takes(config.engine, config.allow_targets) == "export" and run is not None:  # made once, not by all workers at the same time
            exported(run, locate(config.engine._target_, allowed).reader, cache_dir, config.adapter.task)  # type: ignore[attr-defined]
        self._begin()
        try:
            about = self._describe(recipe)
            workers = self.workers or max(1, self._fitting(ray_resources()))
            print(f"executor: {workers} workers on Ray", file=sys.stderr, flush=True)
        except BaseException:
            self._end()
            raise
        options = Options(workers, self.needs["CPU"], self.needs["GPU"], self.batch_size, self.window)
        return RayEngine(recipe, options, about, close=self._end)

    def _begin(self) -> None:
        """Connect, unless that is done. Called in the main thread: the processes of our own cluster die with the thread that made them."""
        self._open += 1
        if self._open > 1:
            return
        try:
            self._connect()
        except BaseException:
            self._open = 0
            raise

    def _connect(self) -> None:
        os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError(f"executor: ray is not installed ({error}); pip install 'patchbay[ray]', or take executor=local") from error
        hush()
        if ray.is_initialized():
            return
        shared: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        with signals_kept(), stderr_closed():
            if self.address is None:
                ray.init(
                    address="local", num_cpus=usable_cpus(), num_gpus=torch.cuda.device_count(), include_dashboard=False,
                    _node_ip_address="127.0.0.1", object_store_memory=self.object_store_bytes, **shared,
                )  # fmt: skip
            else:
                join(self.address, shared)
        self._ours = True

    def _end(self) -> None:
        """Leave the cluster when its last engine is closed; one of our own ends then."""
        self._open -= 1
        if self._open == 0 and self._ours:
            import ray

            self._ours = False
            with signals_kept():
                ray.shutdown()

    def _check_room(self) -> None:
        """Raise UserError where this machine cannot hold the workers that were asked for; another cluster may grow."""
        has = {"CPU": usable_cpus(), "GPU": torch.cuda.device_count()}
        wanted = self.workers or 1
        if self.address is None and wanted > self._fitting(has):
            each = " and ".join(f"{need:g} {name}" for name, need in self.needs.items() if need)
            here = " and ".join(f"{count:g} {name}" for name, count in has.items())
            raise UserError(f"executor.workers: {wanted}, each with {each}, but this machine has {here}; lower it, or what each takes")

    def _fitting(self, has: Mapping[str, float]) -> int:
        return int(min(has.get(name, 0) / need for name, need in self.needs.items() if need))

    def _describe(self, recipe: Recipe) -> dict[str, Any]:
        """What an engine that a worker builds says of itself. Raises UserError where it cannot be built."""
        import ray

        task = ray.remote(num_cpus=self.needs["CPU"], num_gpus=self.needs["GPU"], max_calls=1)(described)
        answer = task.remote(recipe)
        while not ray.wait([answer], timeout=PATIENCE_SECONDS)[0]:
            each = " and ".join(f"{need:g} {name}" for name, need in self.needs.items())
            print(f"executor: still waiting for a worker with {each} to load the engine", file=sys.stderr, flush=True)
        about = ray.get(answer)
        if isinstance(about, str):
            raise UserError(about)
        return dict(about)


def join(address: str, how: dict[str, Any]) -> None:
    """Connect to a cluster that runs. Raises UserError where there is none: Ray itself would try for minutes."""
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        import ray

        ray.init(address=address, **how)
    except (OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"executor.address: no cluster at {address!r} ({said}); give auto or HOST:PORT, or null for one on this machine"
        ) from error


def ray_resources() -> Mapping[str, float]:
    """What the whole cluster has."""
    import ray

    return dict(ray.cluster_resources())


def hush() -> None:
    """Keep Ray Data's messages in its own log files."""
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL + 1)


@contextmanager
def stderr_closed() -> Iterator[None]:
    """Ray's C++ side says on the descriptor itself how loud it will be."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM over; put back what was there."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
