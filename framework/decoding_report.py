"""`python -m framework.decoding_report RUN_DIR ...`: several ways to answer the same items, at their cost, and each two compared."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from components.contracts import UserError
from framework.command import command_parser, run_command
from framework.runs import refuse_scripted
from framework.signatures import nearest
from framework.statistics import mcnemar, paired_bootstrap

COSTS = {"calls": "calls", "completion_tokens": "written", "processed_tokens": "processed", "flops": "FLOPs"}  # and their columns
WIDTH = 160  # of a table where standard output is no terminal
PLACE = ("task", "length", "depth", "problem", "asked", "expected")  # what tells items apart
EXAMPLES = """examples:
  python generate.py -m task=evaluate eval=gsm8k eval.path=test.jsonl decode=greedy,self_consistency,choose_from_n ckpt=RUN_DIR
  python -m framework.decoding_report multirun/generate/DATE              all jobs of a sweep
  python -m framework.decoding_report DIR DIR --measure flexible_score    another measure
"""


@dataclass
class Way:
    """One evaluation. values: of the measure, by item; costs: sums over all items; unparsed: answers that could not be read."""

    name: str
    values: dict[str, float]
    costs: dict[str, float]
    unparsed: int | None
    by_candidates: dict[int, tuple[int, int]]  # right candidates -> (items, right answers)


def read(folder: Path, measure: str | None) -> tuple[str, Way]:
    """The measure and the evaluation in a folder. Raises UserError for one without results, of a scripted engine, without the measure."""
    try:
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if "error" not in line]  # without an answer, task.missing=skip
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no finished task=evaluate in it (results.jsonl, metrics.json): {error}") from error
    refuse_scripted(folder, metrics.get("engine"))
    known = [key for key in lines[0] if key.endswith("score")] if lines else []
    measure = measure or next(iter(known), None)
    if measure is None or not all(isinstance(line.get(measure), int | float) for line in lines):
        raise UserError(f"--measure: {folder} has no {measure}; its scores are {', '.join(known) or 'none'}{nearest(str(measure), known)}")
    values: dict[str, float] = {}
    groups: dict[int, list[float]] = {}
    for line in lines:
        key = json.dumps([line.get(part) for part in PLACE])
        key += next(f" {i}" for i in itertools.count() if f"{key} {i}" not in values)  # the same question asked several times
        values[key] = float(line[measure])
        if "candidates" in line:
            groups.setdefault(round(sum(one[measure] for one in line["candidates"])), []).append(values[key])
    table = {k: (len(some), round(math.fsum(some))) for k, some in sorted(groups.items())}
    reading = measure.removesuffix("_score")
    unparsed = sum(line[reading] is None for line in lines) if reading in lines[0] else None
    costs = {key: float(metrics[f"decode/{key}"]) for key in COSTS if f"decode/{key}" in metrics}
    return measure, Way(folder.resolve().name, values, costs, unparsed, table)


def of_sweeps(folders: Sequence[Path]) -> list[Path]:
    """The folders, each of a sweep replaced by those of its jobs; a sweep's own files, which `DATE/*` names too, are left out."""
    found = list[Path]()
    for folder in folders:
        jobs = [job for job in folder.glob("*/") if job.name.isdigit()] if (folder / "multirun.yaml").is_file() else []
        found += sorted(jobs, key=lambda job: int(job.name)) or ([] if folder.name == "multirun.yaml" else [folder])
    return found


def same_items(ways: Sequence[Way]) -> None:
    """Raise UserError where two did not answer the same items."""
    for way in ways[1:]:
        if (differ := len(way.values.keys() ^ ways[0].values.keys())) > 0:
            raise UserError(f"{way.name} and {ways[0].name} differ in {differ} item(s); only answers to the same ones can be compared")


def named_apart(ways: Sequence[Way], folders: Sequence[Path]) -> None:
    """Name folders by what their command changed, where Hydra wrote it down; by their paths where that leaves equal names."""
    for way, folder in zip(ways, folders, strict=True):
        file = folder / ".hydra" / "overrides.yaml"
        words = [line[2:].strip() for line in file.read_text().splitlines() if line.startswith("- ")] if file.is_file() else []
        way.name = ", ".join(word for word in words if word.startswith(("decode", "seed="))) or way.name
    if len({way.name for way in ways}) < len(ways):
        for way, folder in zip(ways, folders, strict=True):
            way.name = f"{way.name} ({folder})"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """A line of words, then numbers to the right."""
    from framework.tasks.evaluate import print_table  # late: torch comes with it

    console.print(title)
    print_table(header, rows, console)


def report(measure: str, ways: Sequence[Way], console: Console) -> None:
    """Print the table of all ways, how each depends on its candidates, and each two compared."""
    items = len(ways[0].values)
    rows = []
    for way in ways:
        costs = [f"{way.costs[key] / items:,.4g}" if key in way.costs else "" for key in COSTS]
        read_ = "" if way.unparsed is None else str(way.unparsed)
        rows.append([way.name, f"{100 * math.fsum(way.values.values()) / items:.1f}", read_, *costs])
    header = [f"{items} items", f"{measure}, %", "unparsed", *COSTS.values()]
    table("calls, tokens written, tokens read and written, FLOPs: of an item", header, rows, console)
    counted = sorted({k for way in ways for k in way.by_candidates})
    if counted:
        cells = [
            [way.name, *("{1} of {0}".format(*way.by_candidates[k]) if k in way.by_candidates else "" for k in counted)]
            for way in ways
            if way.by_candidates
        ]
        table("right answers by right candidates", ["", *map(str, counted)], cells, console)
    pairs = []
    for first, second in itertools.combinations(ways, 2):
        a, b = list(first.values.values()), [second.values[key] for key in first.values]
        difference, low, high = paired_bootstrap(a, b)
        test = ["", "", ""]
        if {*a, *b} <= {0.0, 1.0}:
            won, lost, p = mcnemar([value == 1 for value in a], [value == 1 for value in b])
            test = [str(won), str(lost), f"{p:.3g}"]
        pairs.append([f"{first.name} - {second.name}", f"{100 * difference:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", *test])
    if pairs:
        table(
            "each two on the same items: difference with its bootstrap interval; items that only one has right, exact McNemar test",
            ["", "points", "95 % interval", "won", "lost", "p"],
            pairs,
            console,
        )


def work(words: argparse.Namespace) -> int:
    """Read, check, print."""
    measure, ways = words.measure, []
    folders = of_sweeps(words.folders)
    for folder in folders:
        measure, way = read(folder, measure)
        ways.append(way)
    named_apart(ways, folders)
    same_items(ways)
    report(measure, ways, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run on `argv` and return the exit code."""
    parser = command_parser("decoding_report", "Compare ways to answer: accuracy, cost, right candidates, and each two in pairs.", EXAMPLES)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN_DIR", help="output folders of task=evaluate on the same items, or of their sweep"
    )
    parser.add_argument("--measure", help="such as strict_score; the first score of the results where it is not given")
    return run_command(parser, argv, work)


if __name__ == "__main__":
    sys.exit(main())
