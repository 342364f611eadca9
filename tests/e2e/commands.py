"""Run the two commands as a user does: real processes in a folder of their own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model/size=test", "data=text", "data.seq_len=64", "data.batch_size=4", "data.tokenizer.kind=bytes"]


def environment(threads: int | None) -> dict[str, str]:
    """No network, offline W&B: what a laptop without accounts has. threads: None for the default."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HYDRA_", "PL_", "OMP_"))}
    pinned = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return keep | pinned | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def start(folder: Path, *words: str, script: str = "train.py", code: str | None = None, threads: int | None = 1) -> subprocess.Popen:
    """Start `python train.py WORDS` (or a line of Python that calls it) with `folder` as the place of all its output."""
    command = [sys.executable, "-c", code] if code else [sys.executable, str(ROOT / script)]
    paths = [f"paths.root={folder / 'outputs'}", f"paths.cache_dir={folder / 'cache'}"]
    env = environment(threads) | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *paths, *words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(
    folder: Path, *words: str, script: str = "train.py", code: str | None = None, threads: int | None = 1, timeout: float = 240
) -> subprocess.CompletedProcess:
    process = start(folder, *words, script=script, code=code, threads=threads)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def only_run(folder: Path) -> Path:
    """The one run directory below the folder."""
    found = sorted(p.parent for p in (folder / "outputs").glob("**/run_state.json"))
    assert len(found) == 1, found
    return found[0]


def state(run_dir: Path) -> dict:
    return json.loads((run_dir / "run_state.json").read_text())


def history(run_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the columns that measure time."""
    with open(run_dir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "seconds"))} for row in rows]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int, timeout: float = 120) -> None:
    """Return as soon as metrics.csv has a row of that step (or the process ended)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        for file in (folder / "outputs").glob("**/metrics.csv"):
            rows = file.read_text().splitlines()
            steps = [
                int(float(r.split(",")[rows[0].split(",").index("step")] or 0)) for r in rows[1:] if r.count(",") == rows[0].count(",")
            ]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.002)
    assert process.poll() is not None, f"step {step} was not reached in {timeout} s"


def shakespeare_like(path: Path, kilobytes: int = 60) -> Path:
    """Real English text that every machine has: the licence of Python itself, repeated with line numbers."""
    text = (ROOT / "LICENSE").read_text() + (ROOT / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    body = "\n".join(f"{i} {lines[i % len(lines)]}" for i in range(kilobytes * 1000 // 40))
    path.write_text(body)
    return path
