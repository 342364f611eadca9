"""Pictures of a run: its loss curve; factors that a search found, and how it found them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, TRAIN, VAL, BASELINE = "#333333", "#9bb8d3", "#c8502d", "#777777"
OTHERS = ("#3b6ea5", "#d9a62e", "#4c9a5f", "#8a6bbd", "#8c6d4f", "#5fb7b0")
SMOOTHING = 0.9  # weight of the past in the drawn training curve


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average without start-up bias."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(total / weight)
    return result


def loss_curve(
    rows: list[dict[str, float]], baselines: Mapping[str, float], path: Path, title: str, loss_unit: str = "nats per token"
) -> None:
    """Draw training and validation loss over tokens; in bits per byte where known, with baselines as horizontal lines.

    Args:
        rows: of metrics.csv.
        baselines: name -> bits per byte.
        path: PNG to write.
        title: one line above the plot.
        loss_unit: of a loss that is not in bits per byte.
    """
    val = [row for row in rows if "val/loss" in row]
    train = [row for row in rows if "train/loss" in row and math.isfinite(row["train/loss"])]
    in_bits = bool(val) and all("val/bits_per_byte" in row for row in val)
    unit = val[-1]["val/bits_per_byte"] / val[-1]["val/loss"] if in_bits and val[-1]["val/loss"] > 0 else 1.0
    figure, axes = canvas(title)
    if train:
        tokens, losses = [row["tokens"] for row in train], [row["train/loss"] * unit for row in train]
        axes.plot(tokens, losses, color=TRAIN, linewidth=0.6, alpha=0.6)
        axes.plot(tokens, smoothed(losses), color="#3b6ea5", linewidth=1.6, label="training")
    if val:
        heights = [row["val/loss"] * unit for row in val]
        axes.plot([row["tokens"] for row in val], heights, color=VAL, marker="o", markersize=4, linewidth=1.6, label="held out")
        axes.annotate(f"{heights[-1]:.3f}", (val[-1]["tokens"], heights[-1]), (6, -2), textcoords="offset points", color=VAL, fontsize=9)
    for name, height in baselines.items() if in_bits else ():
        axes.axhline(height, color=BASELINE, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(f"{name} {height:.2f}", (0.995, height), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=8, color=BASELINE)  # fmt: skip
    top = max([*(h for h in baselines.values() if in_bits), *(row["val/loss"] * unit for row in val), 0.0])
    if top > 0:
        axes.set_ylim(bottom=0, top=1.3 * top)
    axes.set_xlabel("tokens")
    axes.set_ylabel("bits per byte" if in_bits else loss_unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value else "0")
    if train or val:
        axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def factor_curves(curves: Mapping[str, Sequence[float]], marks: Mapping[str, int], path: Path, title: str) -> None:
    """Draw RoPE factors over the index of the rotary pair; the first curve is the one that the picture is about.

    Args:
        curves: name -> factors > 0, one a rotary pair.
        marks: name -> pair index, vertical lines.
        path: PNG to write.
        title: one line above the plot.
    """
    figure, axes = canvas(title)
    for number, (name, factors) in enumerate(curves.items()):
        subject: dict[str, Any] = {"color": VAL, "linewidth": 2.2, "marker": "o", "markersize": 3, "zorder": 3}
        other: dict[str, Any] = {"color": OTHERS[(number - 1) % len(OTHERS)], "linewidth": 1.2}
        axes.plot(range(len(factors)), factors, label=name, **(other if number else subject))
    for number, (name, index) in enumerate(marks.items()):
        axes.axvline(index, color=BASELINE, linewidth=0.9, linestyle=(0, (4, 3)))
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        axes.annotate(f"{name} {index}", (index, 0.98 - 0.06 * number), (3, 0), fontsize=8, color=BASELINE, **place)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("rotary pair")
    axes.set_ylabel("factor: how many times slower it turns")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def search_curve(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw the best and the median score over the generations of a search; what is not finite is left out.

    history: rows of generation, best, median. path: PNG to write. title: one line above the plot.
    """
    figure, axes = canvas(title)
    for key, color in (("median", TRAIN), ("best", VAL)):
        known = [(row["generation"], row[key]) for row in history if math.isfinite(row[key])]
        axes.plot([x for x, _ in known], [y for _, y in known], color=color, marker="o", markersize=3, linewidth=1.6, label=key)
    axes.set_xlabel("generation")
    axes.set_ylabel("score (lower is better)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def canvas(title: str) -> tuple[Any, Any]:
    """A figure and its axes in the style of all pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all."""
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
