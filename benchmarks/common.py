"""What every benchmark needs: equal memory settings for both sides, interleaved timing, the description of the machine, a result file."""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_SHAPES = Path(__file__).parent / "shapes.json"  # written by `python -m framework.shapes`; a test fails when it is stale
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


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: Mapping[str, int], warmup: int = 1) -> dict[str, list[float]]:
    """Wall seconds of each side's calls, taken in turns so that a change of the machine's load meets all sides.

    rounds: measured calls of each side; a side with fewer joins the first rounds only. warmup: unmeasured calls of the sides with more than
    one round.
    """
    for name, run in sides.items():
        for _ in range(warmup if rounds[name] > 1 else 0):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(max(rounds.values())):
        for name, run in sides.items():
            if turn < rounds[name]:
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(values: list[float]) -> dict[str, float | int]:
    """Median, least and greatest value, and how many there were."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def environment(*packages: str) -> dict[str, Any]:
    """Hardware, threads, versions of Python, torch and `packages`, commit and whether files differ from it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def append_row(name: str, row: Mapping[str, Any]) -> Path:
    """Append `row` as one JSON line to benchmarks/results/NAME.jsonl and return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return path


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
