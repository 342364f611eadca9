"""The process a run lives in: allocator, threads, seeds, peak speed, signals, provenance."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of glibc's mallopt
PROBE_SECONDS = 0.3
GPU_PEAKS = {  # dense bf16 FLOP/s of the vendors' data sheets, by a part of the device's name
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


class Interrupted(Exception):
    """A signal ended the run after its state was saved. `signal` is the signal's number; the message says how to go on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signal = signum


def raise_allocator_thresholds(threshold_bytes: int = 1 << 30) -> bool:
    """Keep large temporaries in glibc's heap. Returns False where there is no mallopt.

    By default every block above 128 kB is mapped and unmapped anew, so each step pays page faults for all activations: a 2M-parameter
    transformer trained at 1.2k tokens/s that way and at 8.7k tokens/s with the thresholds raised (2 cores, fp32).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, threshold_bytes) and mallopt(M_TRIM_THRESHOLD, threshold_bytes))


def usable_cpus() -> int:
    """CPUs that this process may keep busy: its affinity mask, cut by a container's CPU quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, math.ceil(int(quota) / int(period))))
    return cpus


def prepare_process(seed: int) -> None:
    """Allocator, threads and every seed. Call once before data and model are built."""
    import lightning
    import torch

    raise_allocator_thresholds()
    if "OMP_NUM_THREADS" not in os.environ:  # torch counts the machine's CPUs, also those that a container may not use
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    lightning.seed_everything(seed, workers=True, verbose=False)
    torch.backends.cudnn.benchmark = False  # its choice depends on timing, so two runs could differ
    torch.set_float32_matmul_precision("high")


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products under a Lightning precision such as 'bf16-mixed' or '32-true'."""
    import torch

    if "bf16" in str(precision):
        return torch.bfloat16
    return torch.float16 if str(precision).startswith("16") else torch.float32


@functools.cache
def matmul_peak(dtype_name: str, size: int = 1024) -> float:
    """Best FLOP/s of a (size, size) matrix product on this CPU, over 0.3 s. dtype_name: 'float32', 'bfloat16', ..."""
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype_name))
    best, end = math.inf, time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_flops(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Peak FLOP/s that utilisation is measured against, and where the figure is from. None on a GPU that the table lacks."""
    import torch

    dtype = compute_dtype(precision)
    if device.type == "cpu":
        name = str(dtype).removeprefix("torch.")
        return matmul_peak(name), f"{name} matmul probe on {torch.get_num_threads()} CPU threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((flops for part, flops in GPU_PEAKS.items() if part in name), None)
    if dtype == torch.float32 and peak is not None:
        return None, f"no figure for {name} in float32"
    return peak, f"data sheet of {name}, dense bf16" if peak else f"no figure for {name}"


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a request (`received`); a second one ends the process at once."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, promise: str = "finishing this step, then saving") -> None:
        """promise: what is done after the first signal, for the reader."""
        self.promise = promise
        self.received: int | None = None

    def install(self) -> None:
        """Take the signals over. Lightning takes SIGTERM during fit, so this is called from inside it."""
        for number in self.NUMBERS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler itself."""
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: {self.promise} (once more: stop at once)\n".encode())

    @contextlib.contextmanager
    def guarded(self) -> Iterator[StopSignals]:
        """Put the handlers of before back at the end. Signal handlers exist in the main thread only; elsewhere nothing is changed."""
        before = {number: signal.getsignal(number) for number in self.NUMBERS}
        try:
            yield self
        finally:
            with contextlib.suppress(ValueError):
                for number, handler in before.items():
                    signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("torch", "lightning", "hydra-core", "omegaconf", "tokenizers", "wandb", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state() -> dict[str, str | bool]:
    """{'sha', 'dirty'} of the checkout this code lies in, {} when it is not one."""
    folder = Path(__file__).resolve().parent
    try:
        sha = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"sha": sha, "dirty": bool(changes.stdout.strip())}
