"""Run directories as plain files: find them, read their state, lock them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from components.errors import UserError
from framework.foreign import is_foreign

STATE_FILE, LOCK_FILE = "run_state.json", ".lock"
FINISHED = ("done", "diverged", "imported")  # statuses after which going on makes no sense by itself
INHERITED = ("model", "model/size", "model/variant", "rope")  # choices that `ckpt=` takes from its run; `rope` may be chosen anew


def read_state(run: Path) -> dict[str, Any]:
    """The run's state, {} when it has none or it cannot be read."""
    try:
        return json.loads((run / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}


def write_state(run: Path, **changes: Any) -> dict[str, Any]:
    """Merge `changes` into the run's state file; a kill at any moment leaves the old or the new file, never half of one."""
    state = {**read_state(run), **changes}
    replace_file(run / STATE_FILE, json.dumps(state, indent=2) + "\n")
    return state


def replace_file(path: Path, text: str) -> None:
    """Replace a file's content; a kill at any moment leaves the old or the new text, and a full disk the old."""
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with open(temporary, "w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def refuse_scripted(folder: Path, engine: Any) -> None:
    """Raise UserError where the engine of results is a test's: its id begins with `scripted`, and no model said what it says."""
    if str(engine).startswith("scripted"):
        raise UserError(f"{folder}: engine {engine!r} says what a script tells it to; no report or verdict is made of its answers")


def newest_run(root: Path, unfinished: bool = False, trained: bool = False) -> Path | None:
    """The most recently created run below `root` (any depth). unfinished: that can be continued now; trained: that has a checkpoint."""
    found = []
    for file in root.glob(f"**/{STATE_FILE}"):
        state = read_state(file.parent)
        passed_over = (unfinished and state.get("status") in FINISHED) or (trained and not state.get("last_checkpoint"))
        if state.get("created") and not passed_over:
            found.append((str(state["created"]), file.parent))
    for _, run in sorted(found, reverse=True):
        if not (unfinished and is_locked(run)):
            return run
    return None


def source_run(ckpt: str, root: Path) -> Path | None:
    """Run directory that a `ckpt=` word (RUN_DIR, FILE, last or best) means, None when there is none."""
    if ckpt in ("last", "best"):
        return newest_run(root, trained=True)
    path = Path(ckpt)
    folder = path if path.is_dir() else path.parent.parent
    return folder if read_state(folder) else None


def choices(run: Path) -> dict[str, str]:
    """Options that the run's groups had when it began: {group: option}; those that came with `ckpt=` from its source."""
    state = read_state(run)
    if state.get("choices"):
        return dict(state["choices"])
    file = run / ".hydra" / "hydra.yaml"
    if not file.is_file():
        return {}
    stored = OmegaConf.load(file).hydra.runtime.choices
    return {k: v for k, v in stored.items() if v not in (None, "null") and not k.startswith("hydra/")}


def with_inherited(own: Mapping[str, Any], ckpt: str | None, root: Path) -> dict[str, Any]:
    """A run's choices when it starts from `ckpt`: model and size of that run, and its RoPE rule unless another was chosen.

    A Hugging Face folder, which is no run yet, gives its name for the model.
    """
    source = source_run(str(ckpt), root) if ckpt else None
    taken = {} if source is None else {group: option for group, option in choices(source).items() if group in INHERITED}
    if source is None and ckpt and is_foreign(Path(str(ckpt))):
        taken = {"model": Path(str(ckpt)).resolve().name, "model/size": "none"}
    if own.get("rope", "none") != "none":  # the plain rule is the default, so that it counts as not chosen
        taken.pop("rope", None)
    return {**own, **taken}


def typed_before(run: Path) -> list[str]:
    """Words of the command line that began the run."""
    file = run / ".hydra" / "overrides.yaml"
    return [str(word) for word in OmegaConf.load(file)] if file.is_file() else []


@contextlib.contextmanager
def locked(run: Path) -> Iterator[bool]:
    """Hold the run's lock; yields False when another process has it. A lock dies with its process, however that dies."""
    if "LOCAL_RANK" in os.environ:  # a further rank of a run whose first process holds the lock
        yield True
        return
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK_FILE, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def is_locked(run: Path) -> bool:
    """Does a live process work on this run?"""
    if not (run / LOCK_FILE).exists():
        return False
    with locked(run) as free:
        return not free
