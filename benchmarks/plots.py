"""The one kind of picture that the benchmarks draw: cost against length (or against bytes), both axes logarithmic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_COLORS = ("#c8502d", "#4a7ba6", "#6b8e4e", "#8a6bb0", "#555555", "#b8912f", "#2f8f8b")


def log_log(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, title: str) -> bool:
    """Draw each line's (x, y) points to `path`. Returns False, with one printed line, where matplotlib is absent."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return False
    figure = Figure(figsize=(6, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points), "o-", color=_COLORS[i % len(_COLORS)], label=name, markersize=4)
    axes.set(yscale="log", xlabel=x, ylabel=y)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
