"""Pictures of a graph of named nodes, and of distributions side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.plots import INK, OTHERS, VAL, canvas, save

MOST_LABELS = 40  # more cannot be read


def network(
    labels: Sequence[str], kinds: Sequence[str], sizes: Sequence[float], edges: Sequence[tuple[int, int, float]], path: Path, title: str
) -> None:  # fmt: skip
    """Draw nodes as discs whose area grows with their size, coloured by kind, and edges the darker, the heavier; linked nodes lie near.

    Args:
        labels, kinds, sizes: one a node; the largest `MOST_LABELS` nodes bear their label.
        edges: (node, node, weight > 0).
        path: PNG to write.
        title: one line above.
    """
    import networkx
    from matplotlib.collections import LineCollection

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(labels)))
    # heavy edges pull no harder than this: a few of them would draw all nodes into one point
    graph.add_weighted_edges_from((u, v, math.log1p(weight)) for u, v, weight in edges)
    places = networkx.spring_layout(graph, seed=0, k=3 / math.sqrt(max(len(labels), 1)))
    figure, axes = canvas(title)
    figure.set_size_inches(9, 7)
    most = max((math.log1p(weight) for *_, weight in edges), default=1.0)
    shades = [(0.35, 0.35, 0.35, 0.04 + 0.5 * (math.log1p(weight) / most) ** 2) for *_, weight in edges]
    lines: Any = [(places[u], places[v]) for u, v, _ in edges]
    axes.add_collection(LineCollection(lines, colors=shades, linewidths=0.8, zorder=1))
    largest = max(sizes, default=1) or 1
    areas = [15 + 350 * size / largest for size in sizes]  # square points
    for number, kind in enumerate(dict.fromkeys(kinds)):
        own = [node for node, other in enumerate(kinds) if other == kind]
        axes.scatter(
            [places[node][0] for node in own], [places[node][1] for node in own], s=[areas[node] for node in own],
            color=[VAL, *OTHERS][number % (1 + len(OTHERS))], edgecolors="white", linewidths=0.6, label=kind, zorder=2,
        )  # fmt: skip
    for node in sorted(range(len(labels)), key=lambda node: -sizes[node])[:MOST_LABELS]:
        above = (0, 2 + math.sqrt(areas[node]) / 2)
        axes.annotate(_plain(labels[node]), places[node], above, textcoords="offset points", ha="center", fontsize=6.5, color=INK)
    axes.set_axis_off()
    if labels:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, path)


def distributions(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str, path: Path, title: str) -> None:
    """Draw histograms over one another. curves: name -> (edges (bins + 1,), heights (bins,)); label: of the horizontal axis."""
    figure, axes = canvas(title)
    for number, (name, (edges, heights)) in enumerate(curves.items()):
        color = [VAL, *OTHERS][number % (1 + len(OTHERS))]
        axes.stairs(heights, edges, color=color, linewidth=1.6, label=name)
        axes.stairs(heights, edges, color=color, alpha=0.12, fill=True)
    axes.set_xlabel(label)
    axes.set_ylabel("density")
    axes.set_ylim(bottom=0)
    if curves:
        axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def _plain(label: str) -> str:
    """One short line in which no sign starts a formula."""
    text = " ".join(label.split()).replace("$", r"\$")
    return text if len(text) <= 32 else text[:31] + "…"
