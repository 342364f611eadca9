"""Run directories as plain files: find them and read their state. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

STATE_FILE = "run_state.json"


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


def newest_run(root: Path, unfinished: bool = False, trained: bool = False) -> Path | None:
    """The most recently created run below `root` (any depth). unfinished: that can be continued; trained: that has a checkpoint."""
    found = []
    for file in root.glob(f"**/{STATE_FILE}"):
        state = read_state(file.parent)
        passed_over = (unfinished and state.get("status") == "done") or (trained and not state.get("last_checkpoint"))
        if state.get("created") and not passed_over:
            found.append((str(state["created"]), file.parent))
    return max(found)[1] if found else None
