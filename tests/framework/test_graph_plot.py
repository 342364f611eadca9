"""Pictures of graphs and distributions are drawn whatever the labels hold."""

from __future__ import annotations

import matplotlib.image
import pytest

from framework.graph_plot import MOST_LABELS, distributions, network


def ink(path):
    """Share of pixels that are not white."""
    return float((matplotlib.image.imread(path)[..., :3] < 0.99).any(axis=-1).mean())


def test_network(tmp_path):
    labels = ["$5 and $x^", "Algebra", *(f"a name that is much longer than a picture has room for {i}" for i in range(MOST_LABELS))]
    edges = [(0, i, 10.0**i) for i in range(1, 6)]
    for name, chosen in (("with", edges), ("without", [])):
        network(labels, ["topic", *["concept"] * (len(labels) - 1)], list(range(len(labels))), chosen, tmp_path / f"{name}.png", "title")
    assert ink(tmp_path / "with.png") > 0.02 and sorted(path.name for path in tmp_path.iterdir()) == ["with.png", "without.png"]


@pytest.mark.parametrize("count", [0, 1])
def test_networks_of_one_node_or_none(tmp_path, count):
    network(["a"] * count, ["topic"] * count, [0] * count, [], tmp_path / "graph.png", "title")
    assert (tmp_path / "graph.png").is_file()


def test_distributions(tmp_path):
    distributions({}, "cosine", tmp_path / "none.png", "title")
    distributions({f"level {i}": ([0.0, 0.5, 1.0], [i, 2.0 - i]) for i in range(3)}, "cosine", tmp_path / "some.png", "title")
    assert ink(tmp_path / "some.png") > 2 * ink(tmp_path / "none.png")
