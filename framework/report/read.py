"""Run directories as data: configuration, history, final figures, and what went wrong. Reads files only."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from components.contracts import UserError
from framework.runs import STATE_FILE, is_locked, refuse_scripted

INSIDE_A_RUN = {"checkpoints", "wandb", "tokenizer", ".hydra"}
SWEEP_FILE, ERROR_FILE = "sweep.json", "error.txt"
ERROR_CHARACTERS = 400  # of a failed job's message that are shown
UNSTARTED = "not started"
PLAIN = {  # statuses that need no message of their own
    UNSTARTED: "it has not begun; resume the sweep", "running": "it is still at work", "killed": "its process is gone; resume it",
    "interrupted": "stopped by a signal; resume it", "diverged": "the loss was no longer finite",
}  # fmt: skip


@dataclass
class RunData:
    """One run directory, read."""

    path: Path
    state: dict[str, Any]
    config: dict[str, Any]  # flat: key path -> value; {} where the job never had a configuration
    choices: dict[str, str]  # option chosen in each group
    overrides: list[str]  # words of the command line that made it
    metrics: dict[str, float]  # final figures, finite ones only
    in_sweep: bool = False  # was it a job of a multirun?
    problem: str | None = None  # what could not be read, one line
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.csv, each with "step"

    @property
    def seed(self) -> int | None:
        """Seed of the run, None where it is not known."""
        seed = self.config.get("seed", self.state.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def status(self) -> str:
        """done, diverged, failed, interrupted, running, killed, not started, or unreadable."""
        return "unreadable" if self.problem else str(self.state.get("status", UNSTARTED))

    @property
    def created(self) -> str:
        return str(self.state.get("created", ""))

    @property
    def command(self) -> str:
        """The line that makes this run alone."""
        single = ["hydra.mode=RUN"] if any(w.startswith(("experiment=", "sweep=")) for w in self.overrides) and self.in_sweep else []
        return shlex.join(["python", "train.py", *self.overrides, *single])

    @cached_property
    def error(self) -> str:
        """Why it did not finish, as far as its folder says."""
        if self.problem:
            return self.problem
        if isinstance(said := self.state.get("error"), str) and said.strip():
            return shortened(said)
        if text := read_text(self.path / ERROR_FILE):
            return shortened(text)
        if self.status in PLAIN:
            return PLAIN[self.status]
        lines = (read_text(self.path / "train.log") or "").strip().splitlines()
        return f"no message; last line of train.log: {shortened(lines[-1])}" if lines else "no message in its folder"


def shortened(text: str) -> str:
    """The line of an error text that says most, cut: the last one of a traceback, otherwise the first."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    line = lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
    return line if len(line) <= ERROR_CHARACTERS else line[: ERROR_CHARACTERS - 1] + "…"


def read_text(path: Path) -> str | None:
    """Text of a file; None where there is none."""
    return path.read_text(errors="replace") if path.is_file() else None


def find_runs(folder: Path) -> list[Path]:
    """Run directories at or below `folder`, and job folders of a sweep that never became a run; in the order of their job numbers.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder}: {what}; give a sweep (multirun/NAME/DATE), a run directory, or a folder that has some below it")
    found = []
    for path, folders, files in os.walk(folder):
        is_run = STATE_FILE in files or is_failed_job(Path(path), files)
        if is_run:
            found.append(Path(path))
        folders[:] = sorted(f for f in folders if f not in INSIDE_A_RUN)
    if not found:
        raise UserError(f"{folder}: no runs in it (no {STATE_FILE} at any depth); make some: python train.py -m seed=1,2,3")
    return sorted(found, key=job_order)


def is_failed_job(path: Path, files: list[str]) -> bool:
    """Is this the folder of a training job that failed before it became a run? A sweep leaves its words and an error there."""
    stored: Any = read_yaml(path / ".hydra" / "hydra.yaml").get("hydra") or {}
    of_training = (stored.get("job") or {}).get("name") == "train"
    return of_training or ERROR_FILE in files


def job_order(path: Path) -> tuple[str, int, str]:
    """Sorts 2_x before 10_x."""
    number = path.name.partition("_")[0]
    return str(path.parent), int(number) if number.isdigit() else 0, path.name


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dict; {} where it is missing, broken or something else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def read_run(path: Path) -> RunData:
    """Read one run directory. What is broken is told in `problem`, never raised."""
    problems: list[str] = []
    state = read_json(path / STATE_FILE, problems) if (path / STATE_FILE).exists() else {"status": UNSTARTED}
    if state.get("status") == UNSTARTED and (path / ERROR_FILE).is_file():
        state["status"] = "failed"
    if state.get("status") == "running" and is_dead(path):
        state["status"] = "killed"
    config = read_config(path, problems)
    hydra: Any = read_yaml(path / ".hydra" / "hydra.yaml").get("hydra") or {}
    chosen: Any = state.get("choices") or (hydra.get("runtime") or {}).get("choices") or {}
    choices = {k: str(v) for k, v in chosen.items() if v not in (None, "null") and not k.startswith("hydra/")}
    overrides = (hydra.get("overrides") or {}).get("task") or []
    run = RunData(path, state, config, choices, [str(word) for word in overrides], {}, str(hydra.get("mode")).endswith("MULTIRUN"))
    run.rows = read_history(path, problems)
    run.metrics = read_metrics(path, problems, required=state.get("status") == "done")
    run.problem = problems[0] if problems else None
    return run


def is_dead(path: Path) -> bool:
    """Has the process of a run that says 'running' gone? A run that is still at work holds its lock."""
    try:
        return not is_locked(path)
    except OSError:  # somebody else's folder
        return False


def read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    """The run's flat configuration; a finished run must have one."""
    file = path / "config.yaml"
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})")
        return {}
    return flat(content) if isinstance(content, dict) else {}


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """An object from a JSON file; {} and a line in `problems` where that fails."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        problems.append(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file}: holds no object but {type(content).__name__}")
        return {}
    return content


def read_metrics(path: Path, problems: list[str], required: bool) -> dict[str, float]:
    """Finite numbers of metrics.json. Raises UserError for those of a scripted engine."""
    file = path / "metrics.json"
    if not file.exists():
        if required:
            problems.append(f"{file}: missing, though the run is done")
        return {}
    content = read_json(file, problems)
    refuse_scripted(path, content.get("engine"))
    numbers = {k: v for k, v in content.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def read_history(path: Path, problems: list[str]) -> list[dict[str, float]]:
    """Rows of metrics.csv; a last line that a kill cut short is left out. (Its own reader: that of the loggers imports Lightning.)"""
    file = path / "metrics.csv"
    try:
        text = file.read_text()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{file}: cannot be read ({error})")
        return []
    rows = []
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if reader.fieldnames and "step" not in reader.fieldnames:
        problems.append(f"{file}: has no column 'step'")
        return []
    try:
        for row in reader:
            rows.append({key: float(value) for key, value in row.items() if value})
    except (ValueError, TypeError, csv.Error) as error:
        problems.append(f"{file}: line {reader.line_num} cannot be read ({error})")
        return []
    return rows


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Nested containers as {key path: value}; lists are values."""
    if isinstance(node, dict) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}" if path else str(key)).items()}
    return {path: node}


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a sweep; {} where there is none or it is broken."""
    content = read_json(folder / SWEEP_FILE, []) if (folder / SWEEP_FILE).is_file() else {}
    return content if isinstance(content.get("jobs", []), list) else {}


def unbegun(folder: Path, found: list[Path]) -> list[RunData]:
    """Jobs that a sweep planned and that have no folder yet."""
    numbers = {path.name.partition("_")[0] for path in found if path.parent == folder}
    jobs = [job for job in read_sweep(folder).get("jobs", []) if isinstance(job, dict) and str(job.get("number")) not in numbers]
    return [
        RunData(folder / f"job {job.get('number')}", {"status": UNSTARTED}, {}, {}, [str(w) for w in job.get("overrides") or []], {}, True)
        for job in jobs
    ]


def read_all(folders: list[Path]) -> list[RunData]:
    """All runs below the folders, each once, and the jobs that their sweeps still have to begin."""
    runs: dict[Path, RunData] = {}
    for folder in folders:
        found = find_runs(folder)
        for path in found:
            if path.resolve() not in runs:
                runs[path.resolve()] = read_run(path)
        for run in [job for sweep in dict.fromkeys([folder, *(p.parent for p in found)]) for job in unbegun(sweep, found)]:
            runs.setdefault(run.path.resolve(), run)
    return list(runs.values())
