"""What a search of factors says and leaves behind: progress, rows of metrics, the file of factors, pictures, a table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.contracts import RopeSpec
from components.search.evolution import Result
from components.search.scoring import factor_block
from framework import runtime
from framework.logging import read_rows, say_text
from framework.plots import factor_curves, search_curve
from framework.procedure import Context
from framework.runs import replace_file

FOUND = "found"  # name of the factors that a search found, beside those of rules


class SearchProgress:
    """Hears of every evaluation and every generation: a line now and then, one row of metrics a generation.

    A resumed search tells again of what its log has; nothing of that is said or written twice.

    Args:
        every_seconds: between lines within a generation.
        tokens: read in one evaluation.
    """

    def __init__(self, context: Context, every_seconds: float, tokens: int) -> None:
        self.context, self.every_seconds, self.tokens = context, every_seconds, tokens
        self.written = {int(row["step"]) for row in read_rows(context.run_dir)}
        self.spoke = time.monotonic()
        self.fresh = 0  # evaluations since the last generation ended that the log did not have
        self.seconds = 0.0  # of all evaluations, before an interruption too

    def on_evaluation(self, state: Mapping[str, Any]) -> None:
        """Say how far it is, and stop here when a signal asked for that."""
        self.fresh += 1
        line = None
        if time.monotonic() - self.spoke >= self.every_seconds:
            self.spoke = time.monotonic()
            line = f"  {state['evaluations']:,} of {state['total']:,} evaluations, best {state['best']:.5g}, {left(state)}"
        self.context.progress(line)

    def on_generation(self, state: Mapping[str, Any]) -> None:
        """Write the row of a generation that has none, and say how it went unless an earlier process did."""
        self.seconds = state["seconds"]
        known = state["evaluations"] in self.written
        if not known:
            keys = ("generation", "best", "median", "spread", "r", "failed", "seconds")
            row = {f"search/{key}": float(state[key]) for key in keys}
            self.context.log({"tokens": state["evaluations"] * self.tokens, **row}, state["evaluations"])
        if self.fresh or not known:
            ranks = " ".join(f"{r}:{count}" for r, count in state["r_histogram"].items())
            failed = f", {state['failed']} failed" if state["failed"] else ""
            self.context.progress(
                f"generation {state['generation']}: best {state['best']:.5g} (r {state['r']}), median {state['median']:.5g}, "
                f"candidates by r {ranks}; {state['evaluations']:,} of {state['total']:,} evaluations{failed}, {left(state)}"
            )
            self.spoke = time.monotonic()
        self.fresh = 0


def left(state: Mapping[str, Any]) -> str:
    """How long the rest will take."""
    return f"{state['eta_seconds']:.0f} s left"


def write_result(path: Path, found: RopeSpec, partial_rotary_factor: float, result: Result, scores: Mapping[str, float]) -> None:
    """The file of factors: `rope_parameters` as other programs load them, and under `search` what they were found with.

    Equal to the byte for equal searches on one commit: it holds no times.
    """
    held_out = scores.get("heldout", math.inf)
    about = {
        "score": result.score, "heldout": held_out if math.isfinite(held_out) else None, "r": result.r,
        "evaluations": result.evaluations, "failed": result.failed, "ended": result.ended,
        "attention": {"short": found.regimes[0].attention_factor, "long": found.attention_factor},
        "git": runtime.git_state().get("sha"), **result.settings,
    }  # fmt: skip
    whole = {"rope_parameters": factor_block(found, partial_rotary_factor), "search": about}
    replace_file(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def write_tables(folder: Path, rules: Mapping[str, RopeSpec], found: RopeSpec, partial_rotary_factor: float) -> None:
    """One file a rule and found.json, each what `rope.factors` loads: factors for rows beyond the trained length, where all turn alike."""
    folder.mkdir(exist_ok=True)
    short = replace(found.regimes[0], upto=found.original_len)
    for name, spec in {FOUND: found, **rules}.items():
        both = replace(found, regimes=(short, replace(spec.regimes[-1], upto=None)))
        text = json.dumps({"rope_parameters": factor_block(both, partial_rotary_factor)}, indent=1)
        replace_file(folder / f"{name}.json", text + "\n")


def write_plots(run_dir: Path, result: Result, rules: Mapping[str, Sequence[float]], critical: int, title: str) -> None:
    """factors.png and search.png."""
    factor_curves({FOUND: result.factors, **rules}, {"d_tcd": critical, "found r": result.r}, run_dir / "factors.png", title)
    search_curve(list(result.history), run_dir / "search.png", title)


def say_table(result: Result, scores: Mapping[str, float], rules: Sequence[str]) -> None:
    """Scores of what was found and of the other rules, side by side."""
    held_out = "heldout" in scores
    titles = ["score", "same attention factor", *(["held out", "same attention factor"] if held_out else [])]
    rows = [["rule (lower is better)", *titles]]
    rows.append([FOUND, f"{result.score:.5g}", "", *([f"{scores['heldout']:.5g}", ""] if held_out else [])])
    keys = ["score", "score_same_attention", *(["heldout", "heldout_same_attention"] if held_out else [])]
    rows += [[name, *(f"{scores[f'{key}@{name}']:.5g}" for key in keys)] for name in rules]
    widths = [max(map(len, column)) for column in zip(*rows)]
    head, *lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    say_text(head, "\n".join(lines))
