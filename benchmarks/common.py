"""What every benchmark needs: equal memory settings for both sides, interleaved timing, the description of the machine, a result file."""

from __future__ import annotations

import ctypes
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_SHAPES = Path(__file__).parent / "shapes.json"  # written by `python -m framework.shapes`; a test fails when it is stale
Clock = Callable[[Callable[[], object]], float]  # seconds of one call
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt


def raise_allocator_thresholds(threshold_bytes: int = 1 << 30) -> bool:
    """Keep large temporaries in glibc's heap, as the training entry point does. Returns False where there is no mallopt."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, threshold_bytes) and mallopt(_M_TRIM_THRESHOLD, threshold_bytes))


def model_shape(model: str, size: str, *keys: str) -> dict[str, Any]:
    """The given keys, in their order, of conf/model/MODEL.yaml at model/size=SIZE."""
    shape = json.loads(_SHAPES.read_text(encoding="utf-8"))[model][size]
    return {key: shape[key] for key in keys}


def wall_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock: right for the CPU, whose calls return when they are done."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def cuda_clock(device: torch.device, flush_bytes: int = 256 << 20) -> Clock:
    """A clock of CUDA events for `device`, read after the call's last kernel. Before each call a buffer of `flush_bytes` is zeroed, so that
    no call finds its inputs in the L2 cache (50 MB on H100 and H200). Not run on a GPU yet."""
    buffer = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def seconds(run: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    return seconds


def clock_of(device: torch.device) -> Clock:
    """The clock that is right for calls on `device`."""
    return cuda_clock(device) if device.type == "cuda" else wall_seconds


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    rounds: Mapping[str, int],
    warmup: int = 1,
    clock: Clock = wall_seconds,
    limit_seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each side's calls, taken in turns so that a change of the machine's load meets all sides.

    rounds: measured calls of each side; a side with fewer joins the first rounds only. warmup: unmeasured calls of the sides with more than
    one round. limit_seconds: no further round begins after so many; three are made whatever they take.
    """
    for name, run in sides.items():
        for _ in range(warmup if rounds[name] > 1 else 0):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for turn in range(max(rounds.values())):
        if turn >= 3 and time.perf_counter() - began > limit_seconds:
            break
        for name, run in sides.items():
            if turn < rounds[name]:
                seconds[name].append(clock(run))
    return seconds


def spread(values: list[float]) -> dict[str, float | int]:
    """Median, least and greatest value, and how many there were."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def environment(*packages: str) -> dict[str, Any]:
    """Hardware, threads, versions of Python, torch and `packages`, commit and whether files differ from it. gpu: name, None without one."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident size starts anew


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes since `reset_peak_memory`: of torch's tensors on a GPU, of the whole process on the CPU (None where it is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def verdict(value: float, bound: float, at_least: bool) -> str:
    """One phrase: the bound, and whether `value` keeps it."""
    met = value >= bound if at_least else value <= bound
    return f"{'at least' if at_least else 'at most'} {bound:g} is wanted: {'met' if met else 'NOT met'}"


def append_row(name: str, row: Mapping[str, Any]) -> Path:
    """Append `row` as one JSON line to benchmarks/results/NAME.jsonl and return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return path


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of `expected`, in float64."""
    difference = (actual.double() - expected.double().view_as(actual)).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())


def table(header: list[str], rows: list[list[str]]) -> str:
    """Left-aligned text table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
