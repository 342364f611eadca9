"""`python -m framework.scaling SOURCE ...`: laws of loss over data, fitted to the runs of a sweep or to a table; see `--help`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from components.contracts import UserError
from components.scaling.data_law import LEVEL, Fit, Interval, fit
from framework.command import command_parser, read_table, run_command
from framework.plots import INK, OTHERS, VAL, canvas, save
from framework.report.group import relevant_keys, shown
from framework.report.read import RunData, read_all
from framework.report.text import number
from framework.runs import replace_file
from framework.signatures import nearest

SEED = 0  # of the starting points of the fits
AHEAD = 10  # times the largest size: what is predicted where --at does not say
BAND = 16  # sizes that the band of the picture is computed at
X, Y = "tokens", "val/loss"
EXAMPLES = """examples:
  python train.py -m trainer.max_steps=20,40,80,160,320,640 seed=1,2,3 name=sizes
  python -m framework.scaling multirun/sizes/DATE                      scaling.json and scaling.png in that folder
  python -m framework.scaling multirun/sizes/DATE --at 1e9             the loss to expect at another size
  python -m framework.scaling DIR --by optimizer --y val/bits_per_byte a law for each optimizer, of another figure
  python -m framework.scaling points.csv                               a table: first column the size, second the loss
"""


@dataclass
class Group:
    """Runs that one law is fitted to."""

    name: str
    runs: list[tuple[float, float]] = field(default_factory=list)  # (size, loss)
    laws: dict[str, Fit] = field(default_factory=dict)
    at: np.ndarray = field(default_factory=lambda: np.zeros(0))  # sizes of the band; the last one is what is predicted

    @property
    def points(self) -> dict[float, list[float]]:
        """{size: losses}, smallest first."""
        found: dict[float, list[float]] = {}
        for size, loss in sorted(self.runs):
            found.setdefault(size, []).append(loss)
        return found


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    description = "Fit L(D) = B / (D_l + D^beta) + E, and the power law with D_l = 0, to losses at different sizes of the training data."
    parser = command_parser("scaling", description, EXAMPLES)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="sweeps over the size, or any folder with runs below it; or one table FILE.csv")
    add("--x", metavar="KEY", help=f"the size: a figure of metrics.json, a key of the configuration or a column (default: {X})")
    add("--y", metavar="KEY", help=f"what falls with it: a figure of metrics.json or a column, above 0 (default: {Y})")
    add("--by", metavar="KEY", help="a law for each value of this group, key or column")
    add("--at", type=float, metavar="N", help=f"the size that the loss is wanted for (default: {AHEAD} times the largest)")
    add("--out", metavar="DIR", help="where the files go (default: the first folder, or that of the table)")
    return run_command(parser, argv, report)


def report(words: argparse.Namespace) -> int:
    """Read, fit, write, print."""
    if words.at is not None and not 0 < words.at < math.inf:
        raise UserError(f"--at: {words.at}; must be a number above 0")
    sources = [Path(source) for source in words.sources]
    of_table = sources[0].is_file() or sources[0].suffix == ".csv"
    if of_table and len(sources) > 1:
        raise UserError(f"SOURCE: {sources[0]} and {len(sources) - 1} more; give one table, or folders")
    options = [f"--{key}={value}" for key in ("x", "y", "by", "out") if (value := getattr(words, key)) is not None]
    groups, words.x, words.y = (from_table if of_table else from_runs)(sources, words.x, words.y, words.by)
    console = Console(width=140, highlight=False)
    groups = fitted_of(groups, words)
    for group in groups:
        console.print(points_table(group, words))
        console.print("", laws_table(group), sep="\n")
        console.print(*remarks(group), "", sep="\n", markup=False)
    out = Path(words.out) if words.out else sources[0].parent if of_table else sources[0]
    out.mkdir(parents=True, exist_ok=True)
    stored = {"x": words.x, "y": words.y, "by": words.by, "level": LEVEL, "groups": {group.name: as_json(group) for group in groups}}
    replace_file(out / "scaling.json", json.dumps(stored, indent=2, allow_nan=False) + "\n")
    draw(groups, words.x, words.y, out / "scaling.png")
    again = shlex.join(["python", "-m", "framework.scaling", *words.sources, *options])
    console.print(f"files: {out / 'scaling.png'}, {out / 'scaling.json'}; for another size: {again} --at N", soft_wrap=True, markup=False)
    return 0


def from_table(sources: Sequence[Path], x: str | None, y: str | None, by: str | None) -> tuple[list[Group], str, str]:
    """Groups of a CSV file, and the names of its two columns. Raises UserError naming the line that has no numbers above 0."""
    path, groups = sources[0], dict[str, Group]()
    rows = read_table(path, "SOURCE", [name for name in (x, y, by) if name])
    free = [name for name in rows[0] if name not in (x, y, by)]
    if any(is_number(name) for name in rows[0]):
        raise UserError(f"SOURCE: the first line of {path} is {', '.join(rows[0])}; it must name the columns, such as tokens,loss")
    x, y = x or (free.pop(0) if free else None), y or (free.pop(0) if free else None)
    if x is None or y is None:
        raise UserError(f"SOURCE: {path} has the column {', '.join(rows[0])}; it needs two, the size and the loss")
    for line, row in enumerate(rows, start=2):
        if not all(is_number(row[name]) and 0 < float(row[name]) < math.inf for name in (x, y)):
            raise UserError(f"SOURCE: {path}: line {line} has {x} {row[x]!r} and {y} {row[y]!r}; both must be numbers above 0")
        name = f"{by}={row[by]}" if by else "all"
        groups.setdefault(name, Group(name)).runs.append((float(row[x]), float(row[y])))
    return list(groups.values()), x, y


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def from_runs(sources: Sequence[Path], x: str | None, y: str | None, by: str | None) -> tuple[list[Group], str, str]:
    """Groups of the finished runs below folders, and what was read. What is left out or mixed is said on stderr.

    Raises:
        UserError: no run has the size and the figure, or one is not above 0.
    """
    x, y, groups, left_out = x or X, y or Y, dict[str, Group](), Counter[str]()
    alike: dict[tuple[str, float], list[RunData]] = {}  # runs that should differ in their seed alone
    runs = read_all(list(sources))
    for run in runs:
        size, loss, value = run.metrics.get(x, run.config.get(x)), run.metrics.get(y), run.choices.get(by or "", run.config.get(by or ""))
        if run.status != "done":
            left_out[run.status] += 1
        elif isinstance(size, bool) or not isinstance(size, int | float):
            left_out[f"without {x}"] += 1
        elif loss is None or (by and value is None):
            left_out[f"without {y if loss is None else by}"] += 1
        elif min(size, loss) <= 0:
            raise UserError(f"{run.path}: {x} is {size:g} and {y} {loss:g}; both must be above 0")
        else:
            name = f"{by}={shown(value)}" if by else "all"
            groups.setdefault(name, Group(name)).runs.append((float(size), loss))
            alike.setdefault((name, float(size)), []).append(run)
    if not groups:
        raise UserError(f"{sources[0]}: {nothing(runs, x, y, by)}")
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        print(f"warning: {left_out.total()} of {len(runs)} runs left out: {reasons}", file=sys.stderr)
    if mixed := list(dict.fromkeys(key for members in alike.values() for key in relevant_keys(members))):
        print(f"warning: runs of one size differ in {', '.join(mixed[:5])}; --by {mixed[0]} fits them apart", file=sys.stderr)
    return list(groups.values()), x, y


def nothing(runs: Sequence[RunData], x: str, y: str, by: str | None) -> str:
    """Why no run can be used."""
    done = [run for run in runs if run.status == "done"]
    if not done:
        return f"none of {len(runs)} run(s) is finished"
    known = {
        "--x": (x, {key for run in done for key in (*run.metrics, *run.config)}),
        "--y": (y, {key for run in done for key in run.metrics}),
        "--by": (by, {key for run in done for key in (*run.choices, *run.config)}),
    }
    for option, (key, names) in known.items():
        if key is not None and key not in names:
            return f"{option} {key}: no run has it{nearest(key.rpartition('/')[2], names) or nearest(key, names)}"
    return f"no finished run has a number for {x} and for {y}"


def fitted_of(groups: Sequence[Group], words: argparse.Namespace) -> list[Group]:
    """The groups with their laws; one that no law describes is left out and named on stderr. Raises UserError where that is all of them."""
    fitted, problems = [], []
    for group in groups:
        try:
            fit_group(group, words)
            fitted.append(group)
        except UserError as error:
            problems.append(str(error))
    if not fitted:
        raise UserError("\n".join(problems))
    print(*(f"warning: left out: {line}" for line in problems), sep="\n", end="\n" if problems else "", file=sys.stderr)
    return fitted


def fit_group(group: Group, words: argparse.Namespace) -> None:
    """Fit both laws, with a band from the smallest size to the one that is predicted."""
    sizes, losses = zip(*sorted(group.runs))
    wanted = words.at or AHEAD * sizes[-1]
    group.at = np.append(np.geomspace(sizes[0], max(wanted, sizes[-1]), BAND), wanted)
    try:
        group.laws = {
            "rectified law": fit(sizes, losses, True, SEED, group.at.tolist()),
            "power law": fit(sizes, losses, False, SEED, group.at[-1:].tolist()),
        }
    except ValueError as error:
        name = "" if group.name == "all" else f", {group.name}"
        raise UserError(f"no law of {words.y} over {words.x}{name}: {error}") from error


def points_table(group: Group, words: argparse.Namespace) -> Table:
    """A line a size."""
    made = Table(words.x, "runs", words.y, "std", *group.laws, box=None, pad_edge=False, title_justify="left")
    made.title = None if group.name == "all" else group.name
    for column in made.columns:
        column.justify = "right"
    for size, losses in group.points.items():
        spread = f"{np.std(losses, ddof=1):.2g}" if len(losses) > 1 else "-"
        made.add_row(count(size), str(len(losses)), number(float(np.mean(losses))), spread,
                     *(number(one.law.loss(size)) for one in group.laws.values()))  # fmt: skip
    return made


def laws_table(group: Group) -> Table:
    """A column a law: its parameters, how far the runs scatter, the largest size predicted from the others, and the size asked for."""
    wanted, last = float(group.at[-1]), max(group.points)
    made = Table("law", *group.laws, box=None, pad_edge=False)
    fits = group.laws.values()
    rows = {
        "B": [f"{one.law.B:.4g}" for one in fits],
        "D_l": [f"{one.law.D_l:.4g}" for one in fits],
        "beta": [f"{one.law.beta:.3f}{ends(one.beta)}" for one in fits],
        "E": [f"{number(one.law.E)}{ends(one.E)}" for one in fits],
        "scatter of the runs": [f"{one.scatter:.2%}" for one in fits],
        f"{count(last)} from the others": [f"{number(one.predicted)}, {one.error:+.2%}" for one in fits],
        f"expected at {count(wanted)}": [f"{number(one.law.loss(wanted))}{ends(one.band[-1])}" for one in fits],
    }
    for name, cells in rows.items():
        made.add_row(name, *cells)
    return made


def count(size: float) -> str:
    """A size with its thousands apart."""
    return f"{size:,.0f}" if size >= 1000 else f"{size:g}"


def ends(interval: Interval) -> str:
    """' (1.2 to 1.4)', with a word for an end that the runs leave open."""
    low, high = ("open" if math.isinf(end) else f"{end:.4g}" for end in interval)
    return f" ({low} to {high})"


def remarks(group: Group) -> list[str]:
    """How to read the table of laws."""
    lines = [f"in brackets: {LEVEL:.0%} profile-likelihood intervals, which take the law for true"]
    if group.laws["rectified law"].law.D_l == 0:
        lines.append("D_l = 0: both laws are the same curve, as where nothing was learnt before")
    better, worse = sorted(group.laws, key=lambda name: abs(group.laws[name].error))
    near, far = (abs(group.laws[name].error) for name in (better, worse))
    scatter = min(one.scatter for one in group.laws.values())
    if far - near > scatter:
        lines.append(f"the largest size, held out, is predicted better by the {better}: {near:.2%} off against {far:.2%}")
    if near > 2 * scatter:
        lines.append(
            "both laws miss it by more than the runs scatter: the form is only nearly right, so trust no figure far beyond the runs"
        )
    return lines


def as_json(group: Group) -> dict[str, Any]:
    """What the fit of a group says; an end that is open is null."""

    def closed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [closed(item) for item in value]
        if isinstance(value, dict):
            return {key: closed(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    laws = {}
    for name, one in group.laws.items():
        stored = closed(asdict(one))
        ahead = {"size": float(group.at[-1]), "loss": one.law.loss(float(group.at[-1])), "interval": stored.pop("band")[-1]}
        laws[name.replace(" ", "_")] = {**stored, "at": ahead}
    return {"runs": sorted(group.runs), **laws}


def once(index: int, label: str) -> str | None:
    """The label for the first group alone."""
    return None if index else label


def draw(groups: Sequence[Group], x: str, y: str, path: Path) -> None:
    """Runs and both laws of every group with the band of the rectified one; dashed where there are no runs."""
    figure, axes = canvas(f"{y} over {x}; L = B / (D_l + D^beta) + E")
    for index, group in enumerate(groups):
        color, other, ink = (VAL, OTHERS[0], INK) if len(groups) == 1 else (OTHERS[index % len(OTHERS)],) * 3
        points, (rectified, plain) = group.points, group.laws.values()
        last, furthest = max(points), float(group.at[:-1].max())
        name = "rectified law" if len(groups) == 1 else group.name
        for fitted, shade, width, label in ((rectified, color, 2.0, name), (plain, other, 0.9, once(index, "power law"))):
            for sizes, dashes in ((np.geomspace(min(points), last, 200), "-"), (np.geomspace(last, furthest, 200), (0, (4, 2)))):
                heights = [fitted.law.loss(size) for size in sizes]
                axes.plot(sizes, heights, color=shade, linewidth=width, linestyle=dashes, label=label if dashes == "-" else None)
            axes.plot(last, fitted.predicted, "x", color=shade, markersize=7, zorder=6)
        low, high = np.transpose(rectified.band[:-1])
        band = once(index, f"{LEVEL:.0%} of the rectified law")
        axes.fill_between(group.at[:-1], low, high, color=color, alpha=0.18, linewidth=0, label=band)
        axes.plot(*np.transpose(group.runs), "o", color=ink, markersize=3, alpha=0.4, zorder=4)
        means, spreads = zip(*((np.mean(losses), np.std(losses)) for losses in points.values()))
        axes.errorbar(list(points), means, spreads, fmt="_", color=ink, markersize=7, zorder=5, label=once(index, "runs, mean and spread"))
        ring = once(index, "held out; x: as the other sizes predict it")
        axes.plot(last, means[-1], "o", markersize=12, fillstyle="none", color=ink, label=ring, linestyle="none")
    heights = [loss for group in groups for _, loss in group.runs] + [one.predicted for group in groups for one in group.laws.values()]
    room = 0.3 * (max(heights) - min(heights))  # a band that is open would flatten everything else
    axes.set(xscale="log", xlabel=x, ylabel=y, ylim=(max(min(heights) - room, 0), max(heights) + room))
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
