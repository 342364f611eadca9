"""Every OmegaConf resolver of the project, registered once. Imports nothing heavy: --help and --cfg must answer at once."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.errors import UserError
from framework.runs import newest_run, read_state, with_inherited
from framework.sweep import job_folder

HIGHER_IS_BETTER = ("accuracy", "reward", "score", "exact_match", "win_rate", "pass@", "f1", "per_second", "mfu")
SLUG_PARTS = ("model", "model/variant", "model/size", "rope", "adapter", "optimizer", "data")  # choices that name a run
UNNAMED = (None, "none", "base")  # options that leave a part as it is
NO_TASKS = ["all"]  # the one task of data that have none


def slug(choices: Any, seed: int) -> str:
    """Readable folder name of a run, at most 80 characters of [A-Za-z0-9._-]."""
    parts = [str(choices[key]) for key in SLUG_PARTS if choices.get(key) not in UNNAMED]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([*parts, f"s{seed}"]))[:80]


def run_dir(resume: str | None, root: str, name: str, now: str, choices: Any, seed: int, ckpt: str | None = None) -> str:
    """Folder of the run: the one to resume, or a fresh one, named after its parts (those of `ckpt=` included)."""
    name = str(name)
    if resume == "auto":
        found = newest_run(Path(root) / name, unfinished=True)
        if found is not None:
            return str(found)
    elif resume:
        if not read_state(Path(resume)):  # not a run: hydra must neither create nor fill it; the job reports it
            return str(Path(root) / ".rejected" / now)
        return str(resume)
    parts = with_inherited(choices, ckpt, Path(root))
    return str(Path(root) / name / f"{now}_{slug(parts, seed)}")


def run_sub(run_dir: str) -> str:
    """Where hydra keeps what it composed; a resumed run keeps its original `.hydra`."""
    return ".hydra_resume" if read_state(Path(run_dir)) else ".hydra"


def job_dir(sweep_dir: str, number: int, words: Any, choices: Any, seed: int, *, _root_: Any) -> str:
    """Folder of a sweep's job, inside that of the sweep; named after its parts (those of `ckpt=` included)."""
    with contextlib.suppress(UserError, OmegaConfBaseException, OSError):  # no such run: the job says so, in its folder
        choices = with_inherited(choices, _root_.ckpt, Path(_root_.paths.root))
    return job_folder(str(sweep_dir), int(number), [str(word) for word in words], slug(choices, seed))


def direction(metric: str) -> str:
    """Which way a sampler goes: up for rates of success and of speed, else down."""
    return "maximize" if any(part in metric.lower() for part in HIGHER_IS_BETTER) else "minimize"


def failure_rate(on_error: str) -> float:
    """Share of failed trials that a search bears, of those proposed at once: all of them, or none."""
    return 0.0 if on_error == "raise" else 1.0


def precision(accelerator: str) -> str:
    """Lightning precision of the fastest safe kind: bf16 autocast on GPUs and on processors with bf16 instructions, else fp32."""
    if accelerator == "cpu" and not cpu_has_bf16():
        return "32-true"
    return "bf16-mixed"


def cpu_has_bf16() -> bool:
    """Does this processor multiply bf16 in hardware? (Linux only; elsewhere fp32 is used.)"""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def tuned(key: str, *, _root_: Any) -> Any:
    """Value of a key that the first stage of an experiment found best for this job's arm."""
    from framework.arms import tuned as chosen

    return chosen(key, _root_)


def run_of(folder: str | None, *words: str, _root_: Any) -> str:
    """Folder of the finished run below `folder` that has the options or values KEY=VALUE; its seed is this job's, where none is given."""
    from framework.arms import run_of as found

    return found(folder or "", words, _root_)


def task_names(data: Any) -> list[str]:
    """Names of a data option's tasks, from its configuration alone: the keys of `tasks`, that list, or what the option calls by a word."""
    tasks = None if OmegaConf.is_config(data) and OmegaConf.is_missing(data, "tasks") else data.get("tasks")
    if isinstance(tasks, str):
        from framework.signatures import locate

        try:
            tasks = locate(data["_target_"], ("",)).names_of(tasks)
        except (LookupError, AttributeError, UserError):  # what is wrong with it, the data say themselves
            tasks = None
    return [str(name) for name in tasks or NO_TASKS]


def register() -> None:
    """Register all resolvers; harmless when called again (multirun, tests)."""
    for function in (slug, run_dir, run_sub, job_dir, direction, failure_rate, precision, tuned, run_of, task_names):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
