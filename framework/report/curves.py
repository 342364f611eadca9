"""Pictures of a summary as inline SVG: curves with their spread over seeds, and intervals of paired differences.

Colours are CSS variables of the page (`--ink`, `--grid`, `--series-0` ...), so that one picture serves light and dark.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from framework.plots import smoothed
from framework.report.group import Configuration
from framework.report.read import RunData
from framework.report.summary import Paired, Summary

SERIES = 8  # colours; further configurations repeat them dashed
MAX_POINTS = 300  # of one curve
AXES = ("tokens", "seconds", "FLOPs")
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Stand-ins that matplotlib can draw with; replaced by CSS variables in the SVG's text.
STAND_INS = {"ink": "#010203", "grid": "#010204", **{f"series-{i}": f"#0103{i:02x}" for i in range(SERIES)}}


@dataclass(frozen=True)
class Curve:
    """One configuration's curve: mean over seeds at each x, and the lowest and highest seed."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def points(run: RunData, axis: str, metric: str, flops_per_token: float | None) -> tuple[np.ndarray, np.ndarray] | None:
    """The run's finite (x, y), x increasing; None where it has none. The training loss is smoothed as in a run's own picture."""
    if axis == "FLOPs" and flops_per_token is None:
        return None
    column, unit = ("tokens", flops_per_token) if axis == "FLOPs" else (axis, 1.0)
    rows = [row for row in run.rows if metric in row and column in row and math.isfinite(row[metric])]
    if not rows:
        return None
    values = [row[metric] for row in rows]
    x, y = np.array([row[column] for row in rows]) * (unit or 1.0), np.array(smoothed(values) if metric == "train/loss" else values)
    keep = np.concatenate([[True], np.diff(x) > 0])
    return x[keep], y[keep]


def curve(configuration: Configuration, axis: str, metric: str) -> Curve | None:
    """Mean and range over the configuration's seeds, where all of them have values; between points linear.

    Seeds share their tokens, so that nothing is interpolated there; their seconds differ.
    """
    per_token = next((f for run in configuration.runs if (f := run.metrics.get("perf/flops_per_token"))), None)
    found = [p for run in configuration.runs if (p := points(run, axis, metric, per_token)) is not None]
    if not found:
        return None
    start, end = max(x[0] for x, _ in found), min(x[-1] for x, _ in found)
    grid = np.unique(np.concatenate([x for x, _ in found]))
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):
        return None
    if len(grid) > MAX_POINTS:
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, MAX_POINTS).round().astype(int))]
    heights = np.stack([np.interp(grid, x, y) for x, y in found])  # (seeds, points)
    return Curve(grid, heights.mean(0), heights.min(0), heights.max(0), len(found))


def quantity(value: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def curve_figures(summary: Summary) -> list[tuple[str, str, str]]:
    """(metric, axis, SVG) for the metric judged by and the training loss, over tokens, seconds and FLOPs; those that have data."""
    figures = []
    for metric in dict.fromkeys([summary.metric, "train/loss"]):
        for axis in AXES:
            curves = [curve(c, axis, metric) for c in summary.configurations]
            if any(c is not None and len(c.x) > 1 for c in curves):

                def paint(axes, a=axis, cs=curves, m=metric) -> None:
                    draw_curves(axes, cs, a, m)

                figures.append((metric, axis, draw(paint, (4.4, 3.3), f"{metric} over {axis}")))
    return figures


def draw_curves(axes, curves: list[Curve | None], axis: str, metric: str) -> None:
    """Lines with bands from the lowest to the highest seed."""
    for i, found in enumerate(curves):
        if found is None:
            continue
        color, dash = STAND_INS[f"series-{i % SERIES}"], "-" if i < SERIES else (0, (4, 2))
        if found.seeds > 1:
            axes.fill_between(found.x, found.low, found.high, color=color, alpha=0.18, linewidth=0)
        marker = "o" if len(found.x) <= 12 else None
        axes.plot(found.x, found.mean, color=color, linewidth=1.7, linestyle=dash, marker=marker, markersize=3)
    axes.set_xlabel(f"training {axis}" if axis != "seconds" else "seconds of training")
    axes.set_ylabel(f"{metric} (smoothed)" if metric == "train/loss" else metric)
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value))
    axes.xaxis.set_major_locator(locator(5))
    axes.grid(axis="y", linewidth=0.6, color=STAND_INS["grid"])
    axes.spines[["top", "right"]].set_visible(False)


def locator(bins: int):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(bins)


def interval_figure(pairs: list[Paired], metric: str) -> str | None:
    """Paired differences with their intervals as horizontal bars round zero; None where no pair has two seeds."""
    bounded = [pair for pair in pairs if math.isfinite(pair.low)]
    if not bounded:
        return None

    def bars(axes) -> None:
        for y, pair in enumerate(reversed(bounded)):
            color = STAND_INS["series-0"] if pair.sure else STAND_INS["ink"]
            axes.plot([pair.low, pair.high], [y, y], color=color, linewidth=2.2, solid_capstyle="round", alpha=1 if pair.sure else 0.6)
            axes.plot([pair.mean], [y], "o", color=color, markersize=6)
        axes.axvline(0, color=STAND_INS["ink"], linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(bounded)), [f"{pair.first}\n− {pair.second}" for pair in reversed(bounded)])
        axes.set_ylim(-0.7, len(bounded) - 0.3)
        axes.set_xlabel(f"difference in {metric}, 95 % interval")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.6, color=STAND_INS["grid"])

    return draw(bars, (9.0, 1.0 + 0.5 * len(bounded)), f"paired differences in {metric}")


def draw(paint: Callable, size: tuple[float, float], label: str) -> str:
    """Call `paint(axes)` and return the picture as SVG text for a page. size: width and height in inches; label: for screen readers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = STAND_INS["ink"]
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9, "font.family": "sans-serif", "axes.edgecolor": ink,
             "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "text.color": ink, "axes.axisbelow": True}  # fmt: skip
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True)
    return for_page(buffer.getvalue(), label)


def for_page(svg: str, label: str) -> str:
    """Matplotlib's SVG file as a part of a page: no prologue, no metadata, scalable, coloured and lettered by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # its rules would hold for the whole page
    svg = re.sub(r'<g id="[\w.]+_\d+">', "<g>", svg)  # the same ids in every picture; nothing refers to them
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(label)}">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for name, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg.strip()
