"""The concept graph on disk: CSR arrays to load again, tables of nodes and edges for others, GraphML for viewers."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from scipy import sparse

from components.errors import UserError
from components.synthesis.corpus import Vocabulary
from components.synthesis.graph import ConceptGraph, Edges

SUB_GRAPHS = ("topic_topic", "topic_concept", "concept_concept")
_EDGES_AT_ONCE = 1 << 20


def save_graph(graph: ConceptGraph, root: Path) -> Path:
    """Write the folder ROOT/ADDRESS (the first 16 digits) and return it; what is already there is the same graph and stays.

    graph.npz holds the CSR arrays, nodes.parquet (kind, id, name, surface, documents), edges.parquet (kind, source, target, freq), each
    edge once, with ids that count within the kind of each end. The folder appears under its name when it is complete.
    """
    folder = root / graph.address[:16]
    if folder.exists():
        return folder
    unfinished = root / f".{folder.name}.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        arrays: dict[str, Any] = {"epsilon": graph.epsilon, "address": graph.address}
        for name in SUB_GRAPHS:
            freq = getattr(graph, name).freq
            arrays |= {f"{name}/data": freq.data, f"{name}/indices": freq.indices, f"{name}/indptr": freq.indptr}
        np.savez(unfinished / "graph.npz", **arrays)
        _write_nodes(graph, unfinished / "nodes.parquet")
        _write_edges(graph, unfinished / "edges.parquet")
        os.replace(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if folder.exists():  # another process was faster
            return folder
        raise UserError(f"{folder}: the graph cannot be written: {error.strerror or error}") from error
    return folder


def load_graph(folder: Path) -> ConceptGraph:
    """Read what `save_graph` wrote. Raises UserError when it is missing, incomplete, damaged, or of another name."""
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(folder / "nodes.parquet").to_pydict()
        with np.load(folder / "graph.npz", allow_pickle=False) as arrays:
            address, epsilon = str(arrays["address"]), float(arrays["epsilon"])
            parts = {name: [arrays[f"{name}/{part}"] for part in ("data", "indices", "indptr")] for name in SUB_GRAPHS}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = "no such folder" if not folder.is_dir() else " ".join(str(error).split())
        raise UserError(f"{folder}: no concept graph can be read here: {reason}") from error
    if not address.startswith(folder.name):
        raise UserError(f"{folder}: holds the graph {address[:16]}, not {folder.name}; a graph's folder bears its address, so rename it")
    kinds = np.array(table["kind"])
    words = {kind: [[table[column][i] for i in np.flatnonzero(kinds == kind)] for column in ("name", "surface", "documents")]
             for kind in ("topic", "concept")}  # fmt: skip
    topics, concepts = (Vocabulary(words[kind][0], words[kind][1]) for kind in ("topic", "concept"))
    sizes = {"topic": len(topics), "concept": len(concepts)}
    edges = {}
    for name, arrays_of in parts.items():
        rows, columns = name.split("_")
        freq = sparse.csr_matrix(tuple(arrays_of), shape=(sizes[rows], sizes[columns]))
        freq.has_canonical_format = True
        edges[name] = Edges(freq, epsilon)
    counts = [np.array(words[kind][2], dtype=np.int64) for kind in ("topic", "concept")]
    return ConceptGraph(topics, concepts, counts[0], counts[1], **edges, address=address)


def write_graphml(graph: ConceptGraph, path: Path) -> None:
    """Write the three sub-graphs as one undirected GraphML file: nodes t0.. and c0.. with kind, label and documents, edges with freq."""
    with path.open("w", encoding="utf-8") as file:
        file.write('<?xml version="1.0" encoding="UTF-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n')
        for key, owner, kind in (
            ("kind", "node", "string"),
            ("label", "node", "string"),
            ("documents", "node", "long"),
            ("freq", "edge", "long"),
        ):
            file.write(f'<key id="{key}" for="{owner}" attr.name="{key}" attr.type="{kind}"/>\n')
        file.write('<graph edgedefault="undirected">\n')
        for kind, words, documents in _kinds(graph):
            for place, (surface, count) in enumerate(zip(words.surfaces, documents.tolist())):
                label = quoteattr(_printable(surface))[1:-1]
                file.write(f'<node id="{kind[0]}{place}"><data key="kind">{kind}</data><data key="label">{label}</data>')
                file.write(f'<data key="documents">{count}</data></node>\n')
        for name, source, target, freq in _edge_blocks(graph):
            first, second = (part[0] for part in name.split("_"))
            file.writelines(
                f'<edge source="{first}{u}" target="{second}{v}"><data key="freq">{n}</data></edge>\n'
                for u, v, n in zip(source.tolist(), target.tolist(), freq.tolist())
            )
        file.write("</graph>\n</graphml>\n")


def _kinds(graph: ConceptGraph) -> list[tuple[str, Vocabulary, np.ndarray]]:
    return [("topic", graph.topics, graph.topic_documents), ("concept", graph.concepts, graph.concept_documents)]


def _printable(text: str) -> str:
    """Without the control characters that XML does not allow."""
    return "".join(character if character >= " " else " " for character in text if character not in "\ufffe\uffff")


def _edge_blocks(graph: ConceptGraph) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(sub-graph, sources, targets, freq) in blocks; of the symmetric ones the half above the diagonal."""
    for name in SUB_GRAPHS:
        freq = getattr(graph, name).freq
        ends = freq.indptr
        first = 0
        while first < freq.shape[0]:
            last = max(int(np.searchsorted(ends, ends[first] + _EDGES_AT_ONCE, side="right")) - 1, first + 1)
            source = np.repeat(np.arange(first, last, dtype=np.int32), np.diff(ends[first : last + 1]))
            target, counts = freq.indices[ends[first] : ends[last]], freq.data[ends[first] : ends[last]]
            keep = slice(None) if name == "topic_concept" else source < target
            yield name, source[keep], target[keep], counts[keep]
            first = last


def _write_nodes(graph: ConceptGraph, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns: dict[str, list[Any]] = {"kind": [], "id": [], "name": [], "surface": [], "documents": []}
    for kind, words, documents in _kinds(graph):
        columns["kind"] += [kind] * len(words)
        columns["id"] += range(len(words))
        columns["name"] += words.names
        columns["surface"] += words.surfaces
        columns["documents"] += documents.tolist()
    text, number = pa.string(), pa.int64()
    schema = pa.schema([("kind", text), ("id", number), ("name", text), ("surface", text), ("documents", number)])
    parquet.write_table(pa.table(columns, schema=schema), path)


def _write_edges(graph: ConceptGraph, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    number = pa.int32()
    schema = pa.schema([("kind", pa.string()), ("source", number), ("target", number), ("freq", number)])
    with parquet.ParquetWriter(path, schema) as writer:
        for name, source, target, freq in _edge_blocks(graph):
            columns = [pa.array([name] * len(source), pa.string()), *(pa.array(part, number) for part in (source, target, freq))]
            writer.write_table(pa.table(columns, schema=schema))
