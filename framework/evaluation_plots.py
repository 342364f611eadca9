"""Pictures of an evaluation: a heat map of a task, or a curve over length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.plots import BASELINE, INK, VAL, canvas, save

UNITLESS = ("cosine", "weight", "rank")  # endings of measures that are plain numbers
LIMITS = {"score": (0.0, 1.0), "weight": (0.0, 1.0), "cosine": (-1.0, 1.0)}  # of the colours, by the measure's ending
WIDE_NAME = 9  # characters that fit below a cell
MOST_PIXELS = 8000  # of a heat map's longer side


def heat_map(
    panels: Mapping[str, Sequence[Sequence[float | None]]], down: Sequence[str], across: Sequence[str], labels: tuple[str, str], path: Path,
    title: str,
) -> None:  # fmt: skip
    """Draw tables of numbers side by side, each number in its coloured cell; None leaves a cell empty.

    Args:
        panels: measure -> a row of numbers for each of `down`, a number in it for each of `across`. Colours of a measure in LIMITS mean the
            same in every picture.
        labels: of the two axes, the vertical one first.
        path: PNG to write.
        title: one line above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (1.8 + len(panels) * (0.9 + 0.65 * len(across)), 1.5 + 0.42 * len(down))
    figure = Figure(figsize=size, dpi=min(130, MOST_PIXELS / max(size)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (measure, numbers) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        values = [[math.nan if number is None else number for number in row] for row in numbers]
        shares, limits = is_share(measure), next((pair for ending, pair in LIMITS.items() if measure.endswith(ending)), (None, None))
        image: Any = axes.imshow(values, aspect="auto", cmap="RdYlGn" if shares else "viridis_r", vmin=limits[0], vmax=limits[1])
        for y, row in enumerate(values):
            for x, number in enumerate(row):
                if math.isfinite(number):
                    red, green, blue, _ = image.cmap(image.norm(number))
                    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.45
                    text = f"{100 * number:.0f}" if shares else f"{number:.2f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        turned: Any = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if max(map(len, across)) > WIDE_NAME else {}
        axes.set_xticks(range(len(across)), across, fontsize=8, **turned)
        axes.set_yticks(range(len(down)), down if place == 1 else [""] * len(down), fontsize=8)
        axes.set_xlabel(labels[1], fontsize=9)
        axes.set_ylabel(labels[0] if place == 1 else "", fontsize=9)
        axes.set_title(unit(measure), fontsize=9, color=INK)
    figure.suptitle(title, fontsize=10, color=INK)
    save(figure, path)


def length_curve(values: Mapping[int, float], measure: str, trained_length: int, path: Path, title: str) -> None:
    """Draw a measure over lengths or positions, which are tokens, with a line at the trained length."""
    figure, axes = canvas(title)
    axes.plot(list(values), list(values.values()), color=VAL, marker="o", markersize=4, linewidth=1.6)
    axes.axvline(trained_length, color=BASELINE, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate("trained length", (trained_length, 0.98), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                  va="top", fontsize=8, color=BASELINE)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit(measure))
    save(figure, path)


def is_share(measure: str) -> bool:
    """Whether a measure lies between 0 and 1 and is shown in per cent."""
    return measure.endswith("score")


def unit(measure: str) -> str:
    """A measure in a reader's words, with its unit."""
    words = measure.replace("_", " ")
    return f"{words}, %" if is_share(measure) else words if measure.endswith(UNITLESS) else f"{words}, nats a token"
