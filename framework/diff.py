"""`python -m framework.diff RUN_A RUN_B`: what differs between two runs, and what came out of each, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from components.contracts import UserError
from framework.runs import STATE_FILE, choices, read_state

ABSENT = "-"
OF_THE_PLACE = ("paths.output_dir", "resume", "resume_force", "preflight", "traceback")  # say where and how, not what
DETAILS = ("diagnostics/", "opt/")  # figures that only --all shows
EXAMPLES = """examples:
  python -m framework.diff outputs/default/DATE_A outputs/default/DATE_B
  python -m framework.diff multirun/NAME/DATE/0_adamw multirun/NAME/DATE/1_muon --all
"""

Row = tuple[str, Any, Any]


@dataclass(frozen=True)
class Side:
    """What one run directory says about itself."""

    path: Path
    status: str
    choices: dict[str, Any]
    config: dict[str, Any]  # by key path
    software: dict[str, Any]  # versions and git
    data: dict[str, Any]
    results: dict[str, Any]  # metrics.json; of an unfinished run the newest value of every column of metrics.csv


@dataclass(frozen=True)
class Difference:
    """Rows (name, value of A, value of B): of everything but the results only those that differ."""

    a: Side
    b: Side
    choices: list[Row]
    config: list[Row]
    software: list[Row]
    data: list[Row]
    results: list[Row]

    @property
    def same_setup(self) -> bool:
        """Do the two runs agree in everything that they were told?"""
        return not (self.choices or self.config or self.software or self.data)


def read_side(run: Path) -> Side:
    """Read a run directory.

    Raises:
        UserError: it is not a run, or its files cannot be read.
    """
    state = require_run(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{str(run)!r}: stopped before it had a configuration; nothing to compare")
    from framework.build import plain, read_config

    config = {key: value for key, value in flat(plain(read_config(run))).items() if key not in OF_THE_PLACE}
    git = state.get("git") or {}
    software = {**(state.get("versions") or {}), "git": git.get("sha", ABSENT)[:12] + (" (changed)" if git.get("dirty") else "")}
    return Side(run, str(state.get("status", "?")), choices(run), config, software, flat(state.get("data") or {}), read_results(run))


def require_run(run: Path) -> dict[str, Any]:
    """The state of a run directory.

    Raises:
        UserError: the folder is not there or not a run; the line names the runs below it.
    """
    if not run.is_dir():
        raise UserError(f"{str(run)!r}: is not a directory; give a run directory such as outputs/NAME/DATE_...")
    state = read_state(run)
    if not state:
        below = sorted(str(file.parent) for file in run.glob(f"*/**/{STATE_FILE}"))
        hint = (
            f"; there are {len(below)} runs below it, such as {below[-1]}" if below else "; give a directory such as outputs/NAME/DATE_..."
        )
        raise UserError(f"{str(run)!r}: is not a run (no readable {STATE_FILE}){hint}")
    return state


def read_results(run: Path) -> dict[str, Any]:
    """metrics.json, or the newest value of every column of metrics.csv.

    Raises:
        UserError: metrics.json is not JSON.
    """
    from framework.logging import JSON_FILE, read_rows

    try:
        return dict(json.loads((run / JSON_FILE).read_text()))
    except FileNotFoundError:
        newest: dict[str, Any] = {}
        for row in read_rows(run):
            newest |= row
        return newest
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / JSON_FILE}: cannot be read ({error})") from error


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings by dotted key path; lists and empty mappings are values."""
    if not isinstance(node, Mapping) or (path and not node):
        return {path: node}
    return {key: value for name, inner in node.items() for key, value in flat(inner, f"{path}.{name}" if path else str(name)).items()}


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    """Rows of the keys whose values differ; a key that one side lacks has ABSENT there."""
    keys = [*a, *(key for key in b if key not in a)]
    rows = [(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys]
    return [row for row in rows if row[1] != row[2] or type(row[1]) is not type(row[2])]


def compare(a: Path, b: Path) -> Difference:
    """Compare two run directories.

    Raises:
        UserError: one of them is not a run.
    """
    one, two = read_side(Path(a)), read_side(Path(b))
    keys = [*one.results, *(key for key in two.results if key not in one.results)]
    results = [(key, one.results.get(key), two.results.get(key)) for key in keys if key != "seed"]
    return Difference(
        one, two, differing(one.choices, two.choices), differing(one.config, two.config), differing(one.software, two.software),
        differing(one.data, two.data), results,
    )  # fmt: skip


def show(difference: Difference, console: Console, everything: bool = False) -> None:
    """Print the tables. everything: also figures of single layers and of the optimizer."""
    a, b = difference.a, difference.b
    for name, side in (("A", a), ("B", b)):
        console.print(f"{name}: {side.path} ({side.status})", highlight=False, markup=False, soft_wrap=True)
    for title, rows in (
        ("options", difference.choices), ("configuration", difference.config), ("software", difference.software), ("data", difference.data),
    ):  # fmt: skip
        console.print()
        if not rows:
            console.print(f"{title}: the same")
            continue
        table = columns(title, "A", "B")
        for key, left, right in rows:
            table.add_row(key, text(left), text(right))
        console.print(table, markup=False)
    table = columns("result", "A", "B", "B - A", "", numeric=True)
    hidden = 0
    for key, left, right in difference.results:
        if not everything and key.startswith(DETAILS):
            hidden += 1
            continue
        table.add_row(key, number(left), number(right), *change(left, right))
    console.print()
    console.print(table if table.row_count else "results: none yet", markup=False)
    if hidden:
        console.print(f"{hidden} further figures with --all")


def columns(first: str, *others: str, numeric: bool = False) -> Table:
    """An empty table without lines."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    return table


def text(value: Any) -> str:
    """A value of a configuration as YAML would write it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def number(value: Any) -> str:
    """A figure, ABSENT where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ABSENT if value is None else str(value)
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:,.6g}"


def change(left: Any, right: Any) -> tuple[str, str]:
    """B - A, and the same in per cent of A."""
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        return "", ""
    delta = right - left
    return (f"{delta:+,.4g}" if delta else "0"), (f"{delta / abs(left):+.1%}" if left and delta else "")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 compared, 2 not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m framework.diff", description=__doc__.split(": ", 1)[1] if __doc__ else "", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", metavar="RUN_A", help="a run directory")
    parser.add_argument("b", metavar="RUN_B", help="another")
    parser.add_argument("--all", action="store_true", help="also figures of single layers and of the optimizer")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    words = parser.parse_args(argv)
    from framework.entry import leave_quietly, report

    try:
        show(compare(Path(words.a), Path(words.b)), Console(width=160), words.all)
    except BrokenPipeError:
        return leave_quietly()
    except (Exception, KeyboardInterrupt) as error:
        return report(error, words.traceback)
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main())
