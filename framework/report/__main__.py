"""`python -m framework.report DIR ...`: a report of the runs below the folders, in three files; see `--help`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contracts import UserError
from framework.command import command_parser, run_command
from framework.runs import replace_file

if TYPE_CHECKING:
    from framework.report.summary import Summary

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = """examples:
  python -m framework.report multirun/NAME/DATE                      report.md, table.csv and report.html in that folder
  python -m framework.report outputs/a outputs/b --out comparison    several folders as one report
  python -m framework.report DIR --metric val/bits_per_byte          compare by another figure
  python -m framework.report DIR --wandb ENTITY/PROJECT              besides, a W&B report of the same runs
  python -m framework.report --matrix                                the interchange matrix, measured now
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("report", "Report on runs: tables, curves with spread over seeds, paired differences, failures.", EXAMPLES)
    add = parser.add_argument
    add("folders", nargs="*", metavar="DIR", help="a sweep, a run, or any folder with runs below it")
    add("--out", metavar="DIR", help="where the files go (default: the folder itself; of several, the one above all)")
    add("--metric", help="figure of metrics.json to compare by (default: the runs' optimized_metric)")
    add("--higher-is-better", action="store_true", help="of that figure (default: lower)")
    add("--wandb", metavar="ENTITY/PROJECT", help="build a W&B report too; needs an API key and the extra 'report'")
    add("--matrix", action="store_true", help="publish the interchange matrix (default of --out: docs)")
    return run_command(parser, argv, lambda words: matrix(words) if words.matrix else build(words))


def optional_module(name: str) -> Any:
    """A module of the framework that this copy may lack: the module, or None."""
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def matrix(words: argparse.Namespace) -> int:
    """Publish the interchange matrix."""
    if words.folders:
        raise UserError(f"--matrix: {words.folders[0]!r} does not go with it; it takes no folders (where to write is --out DIR)")
    module = optional_module("framework.matrix")
    if module is None:
        raise UserError("--matrix: this copy has no framework/matrix.py")
    folder = Path(words.out) if words.out else ROOT / "docs"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"matrix: {module.publish(folder)}")
    return 0


def build(words: argparse.Namespace) -> int:
    """Read, summarise, write; a W&B report where one is asked for."""
    if not words.folders:
        raise UserError("DIR: none given; name a sweep, e.g. python -m framework.report multirun/NAME/DATE")
    from framework.report.markdown import markdown
    from framework.report.page import page
    from framework.report.read import SWEEP_FILE, read_all, read_sweep
    from framework.report.summary import summarise
    from framework.report.text import table_csv

    folders = [Path(word) for word in words.folders]
    target = entity_and_project(words.wandb) if words.wandb else None
    summary = summarise(folders, read_all(folders), words.metric, words.higher_is_better)
    if len(folders) == 1:
        summary.sweep = read_sweep(folders[0])
    code, summary.verdict, summary.verdict_lines = judge(summary)
    for run in summary.runs:
        if run.problem:
            print(f"warning: {run.problem}; the run is left out", file=sys.stderr)
    out = Path(words.out) if words.out else folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.resolve() for f in folders]))
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "report.md", markdown(summary))
    replace_file(out / "table.csv", table_csv(summary))
    replace_file(out / "report.html", page(summary))
    print(f"report: {out / 'report.html'} (also report.md and table.csv)")
    if target:
        from framework.report.workspace import publish

        url = publish(summary, *target)
        if len(folders) == 1 and (folders[0] / SWEEP_FILE).is_file():
            replace_file(folders[0] / SWEEP_FILE, json.dumps({**summary.sweep, "report": url}, indent=2) + "\n")
        print(f"W&B report: {url}")
    return code


def entity_and_project(word: str) -> tuple[str, str]:
    """Both halves of ENTITY/PROJECT.

    Raises:
        UserError: it has not exactly two.
    """
    parts = word.split("/")
    if len(parts) != 2 or not all(parts):
        raise UserError(f"--wandb: {word!r} is not ENTITY/PROJECT, e.g. --wandb my-team/patchbay")
    return parts[0], parts[1]


def judge(summary: Summary) -> tuple[int, dict[str, Any] | None, list[str]]:
    """Exit code, verdict and its words, of the claim that the sweep carries (None where it carries none).

    A claim that cannot be judged is said, and the rest of the report is still made.
    """
    from framework.entry import describe

    module = optional_module("framework.claims")
    carried = any(key.split(".")[0] == "claim" and value is not None for run in summary.runs for key, value in run.config.items())
    if module is None or not carried or len(summary.folders) != 1:
        return 0, None, []
    try:
        verdict = module.judge(summary.folders[0])
    except UserError as error:
        lines, code = describe(error)
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        return code, None, []
    return 0, verdict, module.lines(verdict) if verdict else []


if __name__ == "__main__":
    sys.exit(main())
