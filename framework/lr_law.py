"""`python -m framework.lr_law DIR ...`: the learning-rate law of a sweep over rates and budgets; see `--help`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from components.contracts import UserError
from components.scaling.lr_law import LEVEL, PAPER_SLOPE, Law, Optimum, fit_law, optimum
from framework.arms import read_jobs
from framework.command import command_parser, read_table, run_command
from framework.runs import replace_file

COLUMNS = ("tokens", "lr", "loss")
SEED = 0  # of the bootstrap
Rows = list[tuple[float, float, float]]  # (tokens, learning rate, loss) of every run
EXAMPLES = """examples:
  python train.py -m trainer.max_steps=100,200,400,800 optimizer.lr=1e-3,2e-3,4e-3,8e-3,1.6e-2 name=law
  python -m framework.lr_law multirun/law/DATE                        lr_law.json and lr_law.png in that folder
  python -m framework.lr_law multirun/law/DATE --tokens 5e9           the rate for a longer run
  python -m framework.lr_law --csv runs.csv --slope -0.3              a table with the columns tokens, lr, loss
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser(
        "lr_law", "Fit the best learning rate as B * tokens^slope: B with the slope given, and the free slope beside it.", EXAMPLES
    )
    add = parser.add_argument
    add("folders", nargs="*", metavar="DIR", help="sweeps over optimizer.lr and the length of the run")
    add("--csv", metavar="FILE", help=f"instead of folders: a table with the columns {', '.join(COLUMNS)}")
    add("--slope", type=float, default=PAPER_SLOPE, help=f"the slope that B is fitted with (default: {PAPER_SLOPE}, arXiv 2503.01743)")
    add("--tokens", type=float, metavar="N", help="tokens of the run that the rate is wanted for (default: the longest one's)")
    add("--metric", default="val/loss", help="figure of metrics.json that is to be low (default: val/loss)")
    add("--out", metavar="DIR", help="where the files go (default: the first folder, or that of the table)")
    return run_command(parser, argv, report)


def report(words: argparse.Namespace) -> int:
    """Read, fit, write, print."""
    if bool(words.folders) == bool(words.csv):
        raise UserError("DIR: give folders of a sweep, or --csv FILE, and not both; see --help")
    if words.tokens is not None and not 0 < words.tokens < math.inf:
        raise UserError(f"--tokens: {words.tokens}; must be a number above 0")
    rows = read_rows(Path(words.csv)) if words.csv else read_runs([Path(folder) for folder in words.folders], words.metric)
    found, left_out = optima(rows)
    console = Console(width=140, highlight=False)
    console.print(table(found, rows))
    for line in left_out:
        console.print(line, markup=False)
    try:
        law = fit_law(found, words.slope, SEED)
    except ValueError as error:
        raise UserError(f"no law: {error}; add rates beyond the best one, or budgets") from error
    out = Path(words.out) if words.out else Path(words.csv).parent if words.csv else Path(words.folders[0])
    out.mkdir(parents=True, exist_ok=True)
    tokens = words.tokens or max(tokens for tokens, _, _ in rows)
    stored = {
        **asdict(law),
        "tokens": tokens,
        "lr": law.rate(tokens),
        "optima": {f"{one.tokens:.0f}": one.rate for one in found if one.inside},
    }
    replace_file(out / "lr_law.json", json.dumps(stored, indent=2) + "\n")
    draw(found, law, out / "lr_law.png")
    spread = "no interval: three rates a budget leave no residual"
    if law.interval is not None:
        spread = f"{LEVEL:.0%} bootstrap interval {law.interval[0]:.3f} to {law.interval[1]:.3f}"
    console.print(f"lr = {law.B:.4g} * tokens^{law.slope:g}; free slope {law.free_slope:.3f} ({spread}), with B {law.free_B:.4g}")
    if law.interval is not None and not law.interval[0] <= law.slope <= law.interval[1]:
        console.print(f"the slope {law.slope:g} lies outside that interval: these runs do not follow it")
    console.print(f"files: {out / 'lr_law.png'}, {out / 'lr_law.json'}", soft_wrap=True)
    far = "" if tokens <= 1.0001 * max(t for t, _, _ in rows) else f", {tokens / max(t for t, _, _ in rows):.1f} times the longest run"
    console.print(f"for {tokens:,.0f} tokens{far}: optimizer.lr={law.rate(tokens):.3g}")
    return 0


def read_runs(folders: Sequence[Path], metric: str) -> Rows:
    """(tokens, lr, loss) of every finished run below the folders. Raises UserError where there is none with that metric."""
    jobs = [job for folder in folders for job in read_jobs(folder)]
    rows: Rows = []
    for job in jobs:
        rate, loss = OmegaConf.select(job.config, "optimizer.lr"), job.value(metric)
        if loss is not None and isinstance(rate, int | float) and "tokens" in job.metrics:
            rows.append((float(job.metrics["tokens"]), float(rate), loss))
    if not rows:
        raise UserError(f"{folders[0]}: none of {len(jobs)} run(s) is finished and has {metric} and optimizer.lr; see --metric")
    return rows


def read_rows(path: Path) -> Rows:
    """(tokens, lr, loss) of every line of a CSV file. Raises UserError naming the line."""
    rows: Rows = []
    for number, row in enumerate(read_table(path, "--csv", COLUMNS), start=2):
        try:
            tokens, rate, loss = (float(row[column]) for column in COLUMNS)
        except ValueError:
            tokens = rate = loss = math.nan
        if not all(map(math.isfinite, (tokens, rate, loss))) or min(tokens, rate) <= 0:
            shown = ", ".join(map(str, row.values()))
            raise UserError(f"--csv: {path}: line {number} is {shown}; tokens and lr are above 0, loss a number")
        rows.append((tokens, rate, loss))
    return rows


def optima(rows: Rows) -> tuple[list[Optimum], list[str]]:
    """The optimum of every budget with at least three rates, shortest first; and a line for each budget that the law leaves out."""
    found, lines = [], []
    for tokens in sorted({tokens for tokens, _, _ in rows}):
        points: dict[float, list[float]] = {}
        for _, rate, loss in (row for row in rows if row[0] == tokens):
            points.setdefault(rate, []).append(loss)
        if len(points) < 3:
            lines.append(f"{tokens:,.0f} tokens: left out, since it has {len(points)} rate(s) and a parabola needs 3")
            continue
        found.append(optimum(tokens, points))
        if not found[-1].inside:
            side = "below" if found[-1].rate == min(points) else "above" if found[-1].rate == max(points) else "round"
            lines.append(
                f"{tokens:,.0f} tokens: left out, since no minimum lies between the rates tried; try more {side} {found[-1].rate:g}"
            )
    return found, lines


def table(found: Sequence[Optimum], rows: Rows) -> Table:
    """A line a budget."""
    made = Table("tokens", "runs", "best rate tried", "its loss", "best rate of the fit", "its loss", box=None, pad_edge=False)
    for column in made.columns:
        column.justify = "right"
    for one in found:
        count = sum(tokens == one.tokens for tokens, _, _ in rows)
        best = int(one.losses.argmin())
        fit = (f"{one.rate:.3g}", f"{one.loss:.4f}") if one.inside else ("-", "-")
        made.add_row(f"{one.tokens:,.0f}", str(count), f"{one.rates[best]:g}", f"{one.losses[best]:.4f}", *fit)
    return made


def draw(found: Sequence[Optimum], law: Law, path: Path) -> None:
    """Losses with their parabolas, and the optima with both laws."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, one in enumerate(found):
        color = f"C{i % 10}"
        x = np.linspace(np.log(one.rates[0]), np.log(one.rates[-1]), 100)
        left.plot(one.rates, one.losses, "o", color=color, markersize=4, label=f"{one.tokens:.3g} tokens")
        left.plot(np.exp(x), np.polyval(one.coefficients, x), color=color, linewidth=1.2)
        if one.inside:
            right.plot([one.tokens], [one.rate], "o", color=color, markersize=5)
    budgets = np.geomspace(min(one.tokens for one in found), max(one.tokens for one in found), 50)
    right.plot(budgets, [law.rate(tokens) for tokens in budgets], color="#333333", label=f"slope {law.slope:g}")
    right.plot(budgets, law.free_B * budgets**law.free_slope, color="#999999", linestyle="--", label=f"free slope {law.free_slope:.3f}")
    left.set(xscale="log", xlabel="learning rate", ylabel="loss")
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="best learning rate")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.4, alpha=0.5)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
