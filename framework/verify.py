"""`python -m framework.verify RUN_DIR`: train the steps after a checkpoint once more, in a copy, and compare every bit."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from components.contracts import UserError
from framework.checkpoint import FOLDER, checkpoint_name, checkpoint_step, checkpoints, is_intact, read_checkpoint
from framework.diff import differing, require_run
from framework.logging import read_rows
from framework.runs import is_locked, write_state

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
OF_THE_CLOCK = ("perf/", "seconds")  # columns of metrics.csv that no two runs share
PARTS = {
    "weights": "state_dict",
    "optimizer": "optimizer_states",
    "schedule": "lr_schedulers",
    "generators": "rng",
    "averaged weights": "callbacks.Ema",
}
POLL_SECONDS, SAY_SECONDS, GRACE_SECONDS = 0.1, 5.0, 60.0
EXAMPLES = """examples:
  python -m framework.verify outputs/default/DATE_...            the steps between its two newest checkpoints
  python -m framework.verify RUN_DIR --start 100 --end 150       between two others that it still has
  python -m framework.verify RUN_DIR --start 0                   from the very beginning (also with one checkpoint)

exit code: 0 bit-identical, 1 different, 2 not possible
"""


@dataclass
class Verdict:
    """What the replay found."""

    start: int  # optimizer steps
    end: int
    rows: int = 0  # of metrics.csv that were compared
    lines: list[str] = field(default_factory=list)  # differences, [] when there is none

    @property
    def identical(self) -> bool:
        return not self.lines


def choose(run: Path, start: int | None, end: int | None) -> tuple[Path | None, Path]:
    """Checkpoints to replay from (None: from the beginning) and to.

    Raises:
        UserError: the run has no such checkpoints.
    """
    have = {checkpoint_step(path): path for path in checkpoints(run) if is_intact(path)}
    if not have:
        raise UserError(f"{str(run)!r}: has no readable checkpoint; there is nothing to replay")
    shown = ", ".join(map(str, have))
    for name, step in (("--start", start), ("--end", end)):
        if step is not None and step not in have and not (name == "--start" and step == 0):
            raise UserError(f"{name}: {step} is not a step with a readable checkpoint; {'0, ' if name == '--start' else ''}{shown}")
    last = end if end is not None else max(have)
    earlier = [step for step in have if step < last]
    if start is None and not earlier:
        raise UserError(
            f"{str(run)!r}: has no readable checkpoint before step {last}; replay from the beginning with --start 0, or keep more of them "
            "in the next run (checkpoint.keep_last)"
        )
    first = start if start is not None else max(earlier)
    if first >= last:
        raise UserError(f"--start: {first} is not before the step to replay to, {last}")
    return have.get(first), have[last]


def prepare(run: Path, copy: Path, start: Path | None) -> None:
    """Make a run directory that stopped at `start`. The checkpoint is linked: the replay replaces files, it never writes into them."""
    copy.mkdir()
    for name in ("config.yaml", "run_state.json"):
        if (run / name).is_file():
            shutil.copy(run / name, copy / name)
    for name in ("tokenizer", ".hydra"):
        if (run / name).is_dir():
            shutil.copytree(run / name, copy / name)
    (copy / FOLDER).mkdir()
    step = 0
    if start is not None:
        (copy / FOLDER / start.name).symlink_to(start.resolve())
        step = checkpoint_step(start)
    write_state(copy, status="interrupted", step=step, last_checkpoint=start.name if start else None, best_checkpoint=None, wandb_id=None)


def replay(copy: Path, start: int, end: int) -> Path:
    """Continue the copy with the real command until the checkpoint of step `end` is there; return that.

    Raises:
        UserError: the command failed.
    """
    words = [f"resume={copy}", "logger=none", "samples.every_steps=0", f"checkpoint.every_steps={end}", "checkpoint.keep_last=3"]
    target = copy / FOLDER / checkpoint_name(end)
    with open(copy / "replay.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *words], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            for step in progress(process, copy, target):
                print(f"replaying: step {max(step, start)} of {end}", flush=True)
        finally:
            stop(process)
    if not target.is_file():
        lines = [line for line in (copy / "replay.log").read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(
            f"the replay stopped with code {process.returncode}: {lines[-1].removeprefix('error: ') if lines else 'no message'}"
        )
    return target


def progress(process: subprocess.Popen[Any], copy: Path, target: Path) -> Iterator[int]:
    """Wait until the checkpoint is written or the process ended; yields the newest step now and then."""
    said = time.monotonic()
    while process.poll() is None and not target.is_file():
        time.sleep(POLL_SECONDS)
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            rows = read_rows(copy)
            yield int(rows[-1]["step"]) if rows else 0


def stop(process: subprocess.Popen[Any]) -> None:
    """End the command and what it started: politely, then not. It has nothing left to lose: its run is a copy."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def compare_rows(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]], start: int, end: int
) -> tuple[int, list[str]]:
    """Compare the rows of metrics.csv after step `start` up to `end`; returns how many there are, and a line for each figure that differs
    (where it first does)."""
    left, right = ({int(row["step"]): row for row in rows if start < row["step"] <= end} for rows in (before, after))
    lines: dict[str, str] = {}
    for step in sorted(left.keys() | right.keys()):
        a, b = left.get(step), right.get(step)
        if a is None or b is None:
            lines.setdefault("", f"metrics.csv: step {step} is only in the {'replay' if a is None else 'run'}")
            continue
        for key in sorted((a.keys() | b.keys()) - {"step"}):
            if not key.startswith(OF_THE_CLOCK) and not equal(a.get(key), b.get(key)):
                lines.setdefault(key, f"{key}: {a.get(key)!r} in the run, {b.get(key)!r} in the replay, first at step {step}")
    return len(left.keys() & right.keys()), list(lines.values())


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors and numbers; NaN equals NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(raw(a), raw(b)))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return type(a) is type(b) and bool(a == b)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, so that -0 and 0 differ and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def compare_checkpoints(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each part of two checkpoints that differs; of the weights it names the tensors."""
    lines = []
    for what, key in PARTS.items():
        a, b = (part(checkpoint, key) for checkpoint in (before, after))
        if equal(a, b):
            continue
        if key == "state_dict":
            names = [name for name in a if name not in b or not equal(a[name], b[name])]
            worst = max(
                (float((a[n].double() - b[n].double()).abs().max()) for n in names if n in b and a[n].shape == b[n].shape), default=0.0
            )
            lines.append(
                f"{what}: {len(names)} of {len(a)} tensors differ, by at most {worst:.3g}; the first is {names[0].removeprefix('model.')}"
            )
        else:
            lines.append(f"{what}: the state differs")
    return lines


def part(checkpoint: Mapping[str, Any], path: str) -> Any:
    """A nested entry, None where it is not there."""
    node: Any = checkpoint
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def verify(run: Path, start: int | None = None, end: int | None = None) -> Verdict:
    """Replay the steps between two checkpoints of a run in a temporary copy and compare losses, weights and states.

    Args:
        run: run directory; only read.
        start: step of the checkpoint to go on from, 0 for the beginning; None: the newest one before `end`.
        end: step of the checkpoint to compare with; None: the newest.

    Raises:
        UserError: not a run, not enough checkpoints, another process is training it, or the replay fails.
    """
    state = require_run(run)
    if is_locked(run):
        raise UserError(f"{str(run)!r}: another process is training it; wait for it")
    first, last = choose(run, start, end)
    verdict = Verdict(checkpoint_step(first) if first is not None else 0, checkpoint_step(last))
    print(f"replaying {run}: steps {verdict.start + 1} to {verdict.end}", flush=True)
    warn_of_changes(state)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / run.resolve().name
        prepare(run, copy, first)
        replayed = read_checkpoint(replay(copy, verdict.start, verdict.end))
        verdict.rows, verdict.lines = compare_rows(read_rows(run), read_rows(copy), verdict.start, verdict.end)
        verdict.lines += compare_checkpoints(read_checkpoint(last), replayed)
    return verdict


def warn_of_changes(state: Mapping[str, Any]) -> None:
    """Say what is not as it was when the run was trained: the first suspect when the bits differ."""
    from framework.runtime import git_state, versions

    for name, before, now in differing(state.get("versions") or {}, versions()):
        print(f"note: {name} was {before} then and is {now} now", flush=True)
    then, now = (state.get("git") or {}).get("sha"), git_state().get("sha")
    if then != now:
        print(f"note: the code was at {str(then)[:12]} then and is at {str(now)[:12]} now", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m framework.verify", description="Train the steps after a checkpoint once more, in a copy, and compare every bit.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN_DIR", help="a run directory")
    parser.add_argument(
        "--start", type=int, metavar="STEP", help="replay from this checkpoint (default: the newest but one; 0: the beginning)"
    )
    parser.add_argument("--end", type=int, metavar="STEP", help="replay to this one (default: the newest)")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    words = parser.parse_args(argv)
    try:
        verdict = verify(Path(words.run), words.start, words.end)
    except (Exception, KeyboardInterrupt) as error:
        from framework.entry import report

        return report(error, words.traceback)
    for line in verdict.lines:
        print(f"different: {line}")
    if verdict.identical:
        print(f"bit-identical: {verdict.rows} rows of losses, weights, optimizer, schedule and generators at step {verdict.end}")
        return 0
    print(
        f"NOT bit-identical after {verdict.end - verdict.start} steps; the same number of threads (OMP_NUM_THREADS) and the same machine?"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
