"""The graph on disk is the graph, to every reader."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from components.errors import UserError
from components.synthesis import graph_files
from components.synthesis.corpus import index_documents
from components.synthesis.graph import build_graph
from components.synthesis.graph_files import SUB_GRAPHS, load_graph, save_graph, write_graphml
from tests.components.synthesis.made_up import random_documents


@pytest.fixture(scope="module")
def graph():
    odd = {'Sets & "relations" <a, b>': ["größer als", "tab\there"], "isolated topic": []}
    return build_graph(index_documents([*random_documents(40, seed=6), odd], {}), 1e-5)


def undirected(graph):
    """{(node, node): freq} by names of nodes."""
    found = {}
    for name in SUB_GRAPHS:
        first, second = name.split("_")
        freq = getattr(graph, name).freq.tocoo()
        for u, v, count in zip(freq.row.tolist(), freq.col.tolist(), freq.data.tolist()):
            found[frozenset({f"{first[0]}{u}", f"{second[0]}{v}"})] = count
    return found


def test_loaded_graph_is_equal(graph, tmp_path):
    folder = save_graph(graph, tmp_path)
    again = load_graph(folder)
    assert folder.name == graph.address[:16] and again.address == graph.address and again.epsilon == graph.epsilon
    assert again.topics == graph.topics and again.concepts == graph.concepts
    assert np.array_equal(again.topic_documents, graph.topic_documents) and np.array_equal(again.concept_documents, graph.concept_documents)
    for name in SUB_GRAPHS:
        assert (getattr(again, name).freq != getattr(graph, name).freq).nnz == 0
    before = (folder / "graph.npz").stat().st_mtime_ns
    assert (
        save_graph(graph, tmp_path) == folder and (folder / "graph.npz").stat().st_mtime_ns == before
    )  # the same graph is not written twice
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_tables_have_every_edge_once(graph, tmp_path, monkeypatch, at_once):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the tables are parquet")
    monkeypatch.setattr(graph_files, "_EDGES_AT_ONCE", at_once)
    folder = save_graph(graph, tmp_path)
    rows = parquet.read_table(folder / "edges.parquet").to_pylist()
    found = {}
    for row in rows:
        first, second = row["kind"].split("_")
        found[frozenset({f"{first[0]}{row['source']}", f"{second[0]}{row['target']}"})] = row["freq"]
    assert found == undirected(graph) and len(rows) == len(found)
    nodes = parquet.read_table(folder / "nodes.parquet").to_pylist()
    assert [node["name"] for node in nodes if node["kind"] == "topic"] == graph.topics.names


def test_graphml_is_what_networkx_reads(graph, tmp_path):
    networkx = pytest.importorskip("networkx", reason="networkx is the reader of GraphML")
    write_graphml(graph, tmp_path / "graph.graphml")
    read = networkx.read_graphml(tmp_path / "graph.graphml")
    assert {frozenset(ends): freq for *ends, freq in read.edges(data="freq")} == undirected(graph)
    labels = {node: label.replace("\t", " ") for node, label in read.nodes(data="label")}
    expected = {f"t{i}": surface for i, surface in enumerate(graph.topics.surfaces)}
    expected |= {f"c{i}": surface.replace("\t", " ") for i, surface in enumerate(graph.concepts.surfaces)}
    assert labels == expected and not read.is_directed()
    assert [read.nodes[f"t{i}"]["documents"] for i in range(len(graph.topics))] == graph.topic_documents.tolist()


def test_bad_folders(graph, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_graph(tmp_path / "none")
    folder = save_graph(graph, tmp_path)
    renamed = shutil.copytree(folder, tmp_path / ("0" * 16))
    with pytest.raises(UserError, match=f"holds the graph {folder.name}, not 0000"):
        load_graph(renamed)
    data = (folder / "graph.npz").read_bytes()
    (folder / "graph.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no concept graph can be read here"):
        load_graph(folder)
    (folder / "nodes.parquet").unlink()
    with pytest.raises(UserError, match="no concept graph can be read here"):
        load_graph(folder)


def test_no_room_leaves_nothing_behind(graph, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_files.np, "savez", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        save_graph(graph, tmp_path)
    assert not list(tmp_path.iterdir())
