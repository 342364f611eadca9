"""A sweep is a folder of runs. Before it: its words are checked and written to sweep.json. After it: a table, read from the folders alone.

    DIR/sweep.json                 id, command, overrides, created, swept (keys), jobs (number, overrides; at the end folder and status too)
    DIR/NUMBER_SLUG/               one run each; a job that failed has status "failed" in run_state.json and the whole story in error.txt

Nothing here depends on which process a job ran in, so every launcher of Hydra gives the same table, and a killed sweep is continued by
starting it again in the same folder: jobs that are done are passed over, begun ones are resumed, missing ones are started.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from framework.runs import FINISHED, is_locked, read_state, replace_file, typed_before, write_state

SWEEP_FILE, ERROR_FILE = "sweep.json", "error.txt"
FLAGS = ("-m", "--multirun")
FREE = ("logger", "samples", "progress", "traceback", "on_error")  # may change when a sweep is continued, besides hydra's own keys
SHOWS_ONLY = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version", "--shell-completion", "-sc")
JOB_FOLDER = re.compile(r"(\d+)_")
SHOWN_ERRORS = 5


class JobFailed(Exception):
    """Tells Hydra that a job failed whose error was reported already. Holds text only, so that it survives any launcher."""


@dataclass
class Job:
    """One job as its folder shows it."""

    number: int
    words: list[str]
    status: str  # done, diverged, failed, interrupted, running, killed (its process is gone), not started
    folder: Path | None = None
    code: int = 0  # exit code of a failure
    error: str = ""  # its first line
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "diverged", "killed")


@dataclass
class Sweep:
    """A checked sweep: what Hydra is to be given, and where it writes."""

    folder: Path
    words: list[str]  # flags and overrides for Hydra
    typed: list[str]  # overrides as the user gave them, kept to continue the sweep
    swept: list[str]  # keys that take several values
    planned: list[list[str]] | None  # overrides of each job; None where a sampler chooses them
    first_job: int = 0  # number of the first job that a sampler proposes now
    created: str = ""

    @property
    def id(self) -> str:
        """Groups the runs, in W&B too."""
        return self.folder.name

    def begin(self) -> None:
        """Make the folder and say what will happen."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.created = read_sweep(self.folder).get("created") or datetime.datetime.now(datetime.UTC).isoformat()
        self.write([{"number": n, "overrides": words} for n, words in enumerate(self.planned or [])])
        size = f"{len(self.planned)} jobs" if self.planned is not None else "jobs of a sampler"
        print(f"sweep of {size} in {self.folder}", flush=True)

    def write(self, jobs: list[dict[str, Any]]) -> None:
        """sweep.json. jobs: [{number, overrides, ...}]"""
        record = {
            "id": self.id, "command": shlex.join(["python", "train.py", "-m", *self.typed]), "overrides": self.typed,
            "created": self.created, "swept": self.swept, "first_job": self.first_job, "jobs": jobs,
        }  # fmt: skip
        replace_file(self.folder / SWEEP_FILE, json.dumps(record, indent=2) + "\n")

    def finish(self, code: int) -> int:
        """Print the table and what can be done next; return the exit code: `code` of an interrupt, else 0, 1, or 2 when all failures are
        the user's to mend."""
        jobs = read_jobs(self.folder)
        self.write([
            {"number": j.number, "overrides": j.words, "folder": j.folder.name if j.folder else None, "status": j.status} for j in jobs
        ])  # fmt: skip
        for line in table(jobs):
            print(line)
        failed = [job for job in jobs if job.failed]
        for job in failed[:SHOWN_ERRORS]:
            print(f"job {job.number}: {job.status}: {job.error} ({job.folder}/{ERROR_FILE})", file=sys.stderr)
        if len(failed) > SHOWN_ERRORS:
            print(f"and {len(failed) - SHOWN_ERRORS} more failed", file=sys.stderr)
        if any(job.status not in FINISHED for job in jobs) or code not in (0, 2):
            print(f"finish it: python train.py resume={self.folder}   (what is done is not repeated)")
        print(f"report:    python -m framework.report {self.folder}")
        if code not in (0, 1, 2):
            return code
        codes = {job.code or 1 for job in failed} | ({1} if any(j.status in ("running", "not started") for j in jobs) else set())
        return 1 if 1 in codes else 2 if codes else code


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a folder, {} when it has none."""
    try:
        return json.loads((folder / SWEEP_FILE).read_text())
    except (OSError, ValueError):
        return {}


def in_sweep() -> bool:
    """Does the calling job belong to a sweep?"""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_free(word: str) -> bool:
    """May a sweep be continued with another value here?"""
    key = word.lstrip("+~").partition("=")[0]
    return key.startswith(("hydra/launcher", "hydra.launcher", "hydra.job")) or key.split(".")[0] in FREE


def job_folder(sweep_dir: str, number: int, words: Sequence[str], slug: str) -> str:
    """Name of a job's folder: its number, its parts, and the swept values that those do not show.

    A job that was begun before keeps its folder; a sampler's is known by its words, and its other jobs are numbered on from there.
    """
    record = read_sweep(Path(sweep_dir))
    first = record.get("first_job", 0)
    if not first:
        own = {word for word in words if not is_free(word)}
        for begun in Path(sweep_dir).glob(f"{number}_*/"):
            if {word for word in typed_before(begun) if not is_free(word)} == own:
                return begun.name
    if first:
        for job in read_jobs(Path(sweep_dir)):
            if job.number < first and job.folder and set(job.words) <= set(words):
                return job.folder.name
    shown = [w.partition("=") for w in words]
    extra = [f"{k.rpartition('.')[2]}{rounded(v)}" for k, _, v in shown if k in record.get("swept", ()) and "." in k]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([f"{number + first}_{slug}", *extra]))[:100]


def rounded(value: str) -> str:
    """A swept value as a folder's name shows it."""
    try:
        return f"{float(value):.4g}".replace("+", "")
    except ValueError:
        return value


def read_jobs(folder: Path) -> list[Job]:
    """All jobs of a sweep, those that never began included, in order. Reads the folders alone."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = JOB_FOLDER.match(path.name)
        if match and path.is_dir():
            found[int(match[1])] = read_job(int(match[1]), path)
    for planned in read_sweep(folder).get("jobs", ()):
        if planned["number"] not in found:
            found[planned["number"]] = Job(planned["number"], planned["overrides"], "not started")
    return [found[number] for number in sorted(found)]


def read_job(number: int, folder: Path) -> Job:
    """One job from its folder."""
    state = read_state(folder)
    status = state.get("status", "not started")
    if status == "running" and not is_locked(folder):
        status = "killed"
    try:
        metrics = json.loads((folder / "metrics.json").read_text()) if status == "done" else {}
    except (OSError, ValueError):
        metrics = {}
    error = state.get("error", "") or ("its process is gone" if status == "killed" else "")
    return Job(number, typed_before(folder), status, folder, state.get("exit_code", 0), error, metrics)


def table(jobs: list[Job]) -> list[str]:
    """The summary, one aligned line a job below a header: only the words in which jobs differ."""
    common = set.intersection(*(set(job.words) for job in jobs)) if len(jobs) > 1 else set()
    rows = [["job", "words", "status", "val/loss", "bits/byte", "seconds", "folder"]]
    for job in jobs:
        figures = [
            "-" if job.metrics.get(key) is None else f"{job.metrics[key]:.{digits}f}"
            for key, digits in (("val/loss", 4), ("val/bits_per_byte", 4), ("seconds", 1))
        ]
        words = " ".join(word for word in job.words if word not in common)
        rows.append([str(job.number), words or "-", job.status, *figures, str(job.folder) if job.folder else "-"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = (0, 3, 4, 5)
    return [
        "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows
    ]


def begin_job(config: DictConfig, run_dir: Path) -> tuple[bool, float | None]:
    """Is there work left for a job, and if not, its metric (None: it diverged, and would again)."""
    status = read_state(run_dir).get("status")
    if status == "done":
        print(f"{run_dir} is done already", flush=True)
        return False, read_job(0, run_dir).metrics.get(config.optimized_metric)
    if status == "diverged":
        print(f"{run_dir} diverged; it is not tried again", flush=True)
        return False, None
    if status is not None and not is_locked(run_dir):
        (run_dir / ERROR_FILE).unlink(missing_ok=True)
        write_state(run_dir, error="", exit_code=0)
    return True, None


def end_failed_job(config: DictConfig, error: BaseException, code: int) -> None:
    """Write a failure into the job's folder. Hydra gets no value for it, which a sampler takes as a failed trial, and the others go on.
    (NaN would do in principle, but Optuna 2.10 with the sweeper of Hydra 1.3 ends the whole search at it.)

    Raises:
        KeyboardInterrupt: the job was interrupted, and so the sweep is.
        JobFailed: on_error=raise.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if code >= 128:
        raise KeyboardInterrupt from error
    if not is_locked(folder):  # else another process is at work on it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first = lines[0] if code == 2 else f"{type(error).__name__}: {lines[0]}"
        status = "diverged" if read_state(folder).get("status") == "diverged" else "failed"
        write_state(folder, name=config.get("name"), seed=config.get("seed"), status=status, error=first, exit_code=code)
        replace_file(folder / ERROR_FILE, "\n".join([*lines, "", "".join(traceback.format_exception(error))]))
    if config.get("on_error") == "raise":
        raise JobFailed(f"job in {folder} failed")


def might_sweep(words: list[str]) -> bool:
    """Can these words start a sweep? Cheap, for the start of every run. The further ranks of a job never do."""
    if "LOCAL_RANK" in os.environ or any(word.partition("=")[0] in SHOWS_ONLY for word in words):
        return False
    return any(word in FLAGS or word.partition("=")[0].lstrip("+") in ("sweep", "experiment", "hydra.mode") for word in words)
