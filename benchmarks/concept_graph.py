"""The concept graph at full size: seconds and peak memory of building it and of sampling walks, and how fast sets find their documents.

`python -m benchmarks.concept_graph` (one thread; minutes). The documents are made up: of each, the names of its topics and key concepts are
drawn from a Zipf law, p(rank) ~ 1 / rank^exponent, and repeated names of a document count once. So the commonest concept is in about half
of the documents, and the graph is denser in its middle than one of extracted names, whose tails are longer. Numbers to meet at the default
size: a graph of a million documents with ten concepts, and a million walks on it, in at most 600 seconds and 8 GiB; 1,000 sets a second
that find the nearest two of 100,000 documents with thirty concepts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import append_row, environment, peak_memory, reset_peak_memory, table, verdict
from components.synthesis.corpus import Corpus, Vocabulary, ones_at
from components.synthesis.graph import ConceptGraph, build_graph
from components.synthesis.retrieval import nearest_documents
from components.synthesis.walks import WalkRule, sample_epochs

SECONDS, GIBIBYTES, SETS = 600.0, 8.0, 1000.0  # the numbers to meet; memory is that of the whole process
STEPS: dict[str, Any] = {"topic_steps": (1, 2), "concept_steps": (3, 4)}  # of the paper


def zipf_ids(rows: int, each: int, names: int, exponent: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Names that are drawn for each row, (rows, each); one may be drawn twice."""
    sums = np.cumsum(np.arange(1, names + 1, dtype=np.float64) ** -exponent)
    return np.searchsorted(sums, generator.random((rows, each)) * sums[-1], side="right")


def made_up_corpus(options: argparse.Namespace, documents: int, concepts_each: int) -> Corpus:
    """Documents with names that are numbers of equal width, so that their order is that of the ids."""
    generator = np.random.default_rng(options.seed)
    sizes = {"topics": (options.topics, options.topics_each), "concepts": (options.concepts, concepts_each)}
    names = {kind: [f"{kind[:-1]} {place:07d}" for place in range(size)] for kind, (size, _) in sizes.items()}
    rows = {kind: ones_at(zipf_ids(documents, each, size, options.exponent, generator), size) for kind, (size, each) in sizes.items()}
    vocabulary = {kind: Vocabulary(given, given) for kind, given in names.items()}
    return Corpus(vocabulary["topics"], vocabulary["concepts"], rows["topics"], rows["concepts"])


def stage(found: list[dict[str, Any]], name: str, run: Callable[[], Any]) -> Any:
    """Run one stage and note its wall and processor seconds, and the peak of the whole process during it."""
    device = torch.device("cpu")
    reset_peak_memory(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    found.append({"stage": name, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_memory(device)})
    print(f"{name}: {seconds:.1f} s", flush=True)
    return result


def sample(graph: ConceptGraph, options: argparse.Namespace, crossing: str, self_avoiding: bool) -> np.ndarray:
    """Epochs of walks until there are `options.walks`; returns how many concepts each set has."""
    rule = WalkRule(**STEPS, crossing=crossing, self_avoiding=self_avoiding)
    epochs = -(-options.walks // options.topics)
    sizes = []
    for first in range(0, epochs, 8):  # eight epochs at a time, a quarter of a million walks
        walks = sample_epochs(graph, rule, options.seed, range(first, min(first + 8, epochs)))
        sizes.append(walks.sets(graph, "all").sum(axis=1))
    return np.asarray(np.concatenate(sizes)).ravel()[: options.walks]


def retrieve(options: argparse.Namespace, found: list[dict[str, Any]]) -> float:
    """Sets a second that find their two nearest documents among 100,000 with thirty concepts, by processor time."""
    corpus = made_up_corpus(options, 100_000, 30)
    graph = build_graph(corpus, 1e-5)
    walks = sample_epochs(graph, WalkRule(**STEPS, crossing="uniform", self_avoiding=False), options.seed, [0])
    sets = walks.sets(graph, "all")[: options.sets]
    stage(found, f"nearest two of 100,000 documents for {options.sets:,} sets", lambda: nearest_documents(sets, corpus.sets("all"), 2))
    return sets.shape[0] / found[-1]["cpu_seconds"]


def main() -> None:
    """Measure, print the table, append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--concepts", type=int, default=200_000, help="key concepts that names are drawn from")
    parser.add_argument("--topics", type=int, default=32_000)
    parser.add_argument("--concepts-each", type=int, default=10, help="drawn for a document")
    parser.add_argument("--topics-each", type=int, default=2)
    parser.add_argument("--exponent", type=float, default=1.0, help="of the Zipf law")
    parser.add_argument("--walks", type=int, default=1_000_000)
    parser.add_argument("--sets", type=int, default=10_000, help="that look for their nearest documents")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    corpus = stage(found, "make up documents (not counted)", lambda: made_up_corpus(options, options.documents, options.concepts_each))
    graph = stage(found, "build graph and its address", lambda: build_graph(corpus, 1e-5))
    graph_edges = [graph.topic_topic.freq.nnz // 2, graph.topic_concept.freq.nnz, graph.concept_concept.freq.nnz // 2]
    sizes = stage(found, f"{options.walks:,} walks, revisits allowed", lambda: sample(graph, options, "uniform", False))
    counted = list(found[1:])
    stage(found, f"{options.walks:,} walks, self-avoiding (not counted)", lambda: sample(graph, options, "uniform", True))
    per_second = retrieve(options, found)
    lines = [
        [row["stage"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{(row['peak_bytes'] or 0) / 2**30:.2f}"] for row in found
    ]
    print(table(["stage", "seconds", "CPU seconds", "peak GiB of the process"], lines))
    names = ("topic-topic", "topic-concept", "concept-concept")
    print(
        "edges: " + ", ".join(f"{name} {count:,}" for name, count in zip(names, graph_edges)) + f"; mean size of a set {sizes.mean():.2f}"
    )
    seconds, peak = sum(row["seconds"] for row in counted), max(row["peak_bytes"] or 0 for row in counted) / 2**30
    print(f"{seconds:.1f} s, {verdict(seconds, SECONDS, at_least=False)}; {peak:.2f} GiB, {verdict(peak, GIBIBYTES, at_least=False)}")
    print(f"{per_second:,.0f} sets a CPU second, {verdict(per_second, SETS, at_least=True)}")
    row = {**environment("numpy", "scipy"), **vars(options), "stages": found, "edges": dict(zip(names, graph_edges))}
    print(
        f"row appended to {append_row('concept_graph', {**row, 'seconds': seconds, 'peak_gib': peak, 'sets_per_cpu_second': per_second})}"
    )


if __name__ == "__main__":
    main()
