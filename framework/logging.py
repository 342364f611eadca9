"""What a run says and writes down: lines, metrics.csv, metrics.json. The files do not depend on any service."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from framework.runs import replace_file

log = logging.getLogger("patchbay")

CSV_FILE, JSON_FILE = "metrics.csv", "metrics.json"
SECRET = re.compile(r"(^|_)(api_?key|token|password|secret|credentials?)$", re.IGNORECASE)
MASK = "***"


def say(line: str) -> None:
    """One line for the user: on the terminal and in train.log."""
    print(line, flush=True)
    log.info(line)


def say_text(title: str, text: str) -> None:
    """A title, and text of several lines set off below it."""
    say("\n".join([title, *("  | " + line for line in text.rstrip().splitlines())]))


def masked(node: Any) -> Any:
    """A copy of plain containers in which values that look like secrets by their key are replaced."""
    if isinstance(node, Mapping):
        return {k: MASK if isinstance(v, str) and SECRET.search(str(k)) else masked(v) for k, v in node.items()}
    return [masked(value) for value in node] if isinstance(node, list) else node


def masked_word(word: str) -> str:
    """A word of a command line with its value replaced where the key looks like a secret's."""
    key, equals, _ = word.partition("=")
    return f"{key}={MASK}" if equals and SECRET.search(key.rpartition(".")[2]) else word


def read_rows(run: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.csv, each with 'step'; empty cells are left out, and so is a last line that a kill cut short."""
    try:
        text = (run / CSV_FILE).read_text()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def to_csv(rows: list[dict[str, float]], columns: list[str]) -> str:
    """Rows as CSV text with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: cell(key, value) for key, value in row.items()} for row in rows])
    return buffer.getvalue()


def cell(key: str, value: float) -> str:
    """A number with all its digits; steps and tokens as integers."""
    return str(int(value)) if key in ("step", "tokens") else repr(float(value))


class RunLogger(Logger):
    """What this project's loggers share. Rows come one per optimizer step, from the metrics callback alone."""

    name = None
    version = None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row. step: optimizer steps done."""
        raise NotImplementedError

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is saved as config.yaml and uploaded by its own route."""

    def start(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Called once before the first row. info: keys of `framework.train.run_info`."""

    def log_images(self, images: Mapping[str, Path]) -> None:
        """Show pictures, PNG files by name, beside the last row; a logger that has no place for them leaves them."""

    def close(self, exit_code: int, summary: Mapping[str, float]) -> list[str]:
        """Called once at the end, also after a failure. Returns lines for the user."""
        return []


class LocalLogger(RunLogger):
    """metrics.csv in the run directory. A row is on disk when `log_metrics` returns; columns are the union of all rows."""

    def __init__(self, run_dir: Path, keep_up_to: int = -1) -> None:
        """
        Args:
            run_dir: folder of the run.
            keep_up_to: rows after this step are cut (they are written again by the resumed run).
        """
        super().__init__()
        self.path = run_dir / CSV_FILE
        self.rows = [row for row in read_rows(run_dir) if row["step"] <= keep_up_to]
        self.columns = ["step"]
        for row in self.rows:
            self.columns += [key for key in row if key not in self.columns]
        if self.path.exists():
            replace_file(self.path, to_csv(self.rows, self.columns))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; with a new column the file is written anew."""
        row = {"step": float(step or 0), **metrics}
        self.rows.append(row)
        new = [key for key in row if key not in self.columns]
        if new or not self.path.exists():
            self.columns += new
            replace_file(self.path, to_csv(self.rows, self.columns))
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow({key: cell(key, value) for key, value in row.items()})


def write_summary(run_dir: Path, metrics: Mapping[str, float]) -> None:
    """metrics.json: the final numbers; what is not finite becomes null, which JSON can hold."""
    finite = {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in metrics.items()}
    replace_file(run_dir / JSON_FILE, json.dumps(finite, indent=2) + "\n")
