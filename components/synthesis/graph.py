"""The global concept graph (SynthLLM, sec. 2.2): which topics and key concepts occur in the same documents, and how often."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from components.errors import UserError
from components.synthesis.corpus import Corpus, Vocabulary


@dataclass(frozen=True)
class Edges:
    """One sub-graph: freq(u, v), the number of documents with both ends, as CSR with sorted columns; an edge exists where freq >= 1.

    Args:
        freq: (rows, columns) int32, no zero stored. epsilon: > 0, added to each freq before normalising.
    """

    freq: sparse.csr_matrix
    epsilon: float

    @property
    def degree(self) -> NDArray[np.int64]:
        """Neighbours of each row, (rows,)."""
        return np.diff(self.freq.indptr).astype(np.int64)

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """Sums of freq + epsilon over all edges up to each one, (edges,), through all rows: one search finds an edge of any row.

        A probability read from it is exact to 2^-53 of the whole sum: 1e-8 of a single co-occurrence among 1e8 edges.
        """
        sums = np.cumsum(self.freq.data, dtype=np.int64).astype(np.float64)
        return sums + self.epsilon * np.arange(1, len(sums) + 1)

    def transition(self) -> sparse.csr_matrix:
        """p(u -> v), (rows, columns) float64; a row without neighbours is empty.

        w(u, v) = log(freq + epsilon) and p is its softmax over the neighbours of u, where exp and log cancel:
        p = (freq + epsilon) / sum(freq + epsilon).
        """
        weights = self.freq.data + self.epsilon
        totals = np.add.reduceat(np.append(weights, 0.0), np.minimum(self.freq.indptr[:-1], len(weights)))
        share = weights / np.repeat(totals, self.degree)
        return sparse.csr_matrix((share, self.freq.indices, self.freq.indptr), shape=self.freq.shape)


@dataclass(frozen=True)
class ConceptGraph:
    """Topics (T) and key concepts (C) with three undirected sub-graphs.

    Args:
        topics, concepts: names; ids are their places.
        topic_documents, concept_documents: documents with each, (T,) and (C,) int64.
        topic_topic, topic_concept, concept_concept: (T, T), (T, C), (C, C); the square ones are symmetric without a diagonal.
        address: hash of the documents' concept sets and of epsilon, whatever the order of the documents.
    """

    topics: Vocabulary
    concepts: Vocabulary
    topic_documents: NDArray[np.int64]
    concept_documents: NDArray[np.int64]
    topic_topic: Edges
    topic_concept: Edges
    concept_concept: Edges
    address: str

    @property
    def epsilon(self) -> float:
        """What is added to each freq."""
        return self.topic_topic.epsilon


def build_graph(corpus: Corpus, epsilon: float) -> ConceptGraph:
    """Count co-occurrences by documents: a concept listed under one topic is linked to every topic of its document.

    corpus: of one shard (see `corpus.slices`). Raises UserError when epsilon is not above 0 or there is no topic.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
        raise UserError(f"graph.epsilon: {epsilon!r}; allowed is a finite number above 0, such as 1e-5")
    if not len(corpus.topics):
        raise UserError(f"graph: {len(corpus):,} documents without a single topic; walks start at topics, so extract concepts first")
    topics, concepts = corpus.doc_topics, corpus.doc_concepts
    return ConceptGraph(
        corpus.topics,
        corpus.concepts,
        _column_sums(topics),
        _column_sums(concepts),
        Edges(co_occurrence(topics, topics), float(epsilon)),
        Edges(co_occurrence(topics, concepts), float(epsilon)),
        Edges(co_occurrence(concepts, concepts), float(epsilon)),
        content_address(corpus, float(epsilon)),
    )


def co_occurrence(left: sparse.csr_matrix, right: sparse.csr_matrix, rows: int = 16_384) -> sparse.csr_matrix:
    """Documents with both, (columns of left, columns of right) int32 with sorted columns, by X^T X; without a diagonal when left is right.

    left, right: (documents, names) of ones. rows: of the result that are made at once, which bounds what is held besides it.
    """
    turned = left.T.tocsr()
    parts: list[sparse.csr_matrix] = []
    for first in range(0, max(turned.shape[0], 1), rows):
        part = turned[first : first + rows] @ right
        if left is right:
            own = np.repeat(np.arange(first, first + part.shape[0]), np.diff(part.indptr))
            part.data[part.indices == own] = 0
            part.eliminate_zeros()
        part.sort_indices()
        parts.append(part)
    return sparse.csr_matrix(sparse.vstack(parts, format="csr"))


def content_address(corpus: Corpus, epsilon: float) -> str:
    """SHA-256 of the names, of the sorted concept sets of the documents and of epsilon: 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([epsilon, corpus.topics.names, corpus.concepts.names]).encode())
    both = corpus.doc_topics, corpus.doc_concepts
    halves = [(matrix.indices.astype("<i4").tobytes(), (4 * matrix.indptr.astype(np.int64)).tolist()) for matrix in both]
    rows = []
    for place in range(len(corpus)):
        topics, concepts = (ids[ends[place] : ends[place + 1]] for ids, ends in halves)
        rows.append(len(topics).to_bytes(4, "little") + len(concepts).to_bytes(4, "little") + topics + concepts)
    for row in sorted(rows):
        digest.update(row)
    return digest.hexdigest()


def summary(graph: ConceptGraph) -> dict[str, float]:
    """Nodes, and of each sub-graph its edges, degrees, isolated nodes and connected components; `whole` is their union."""
    found: dict[str, float] = {"graph/topics": len(graph.topics), "graph/concepts": len(graph.concepts)}
    for name, edges in (("topic_topic", graph.topic_topic), ("concept_concept", graph.concept_concept)):
        found |= _components(f"graph/{name}", edges.freq) | {f"graph/{name}/edges": edges.freq.nnz // 2}
        found |= _degrees(f"graph/{name}", edges.degree)
    across = graph.topic_concept
    found |= {"graph/topic_concept/edges": across.freq.nnz} | _degrees("graph/topic_concept", across.degree)
    whole = sparse.bmat([[graph.topic_topic.freq, across.freq], [None, graph.concept_concept.freq]], format="csr")
    return found | _components("graph/whole", whole)


def _degrees(name: str, degree: NDArray[np.int64]) -> dict[str, float]:
    mean, most = (float(degree.mean()), int(degree.max())) if len(degree) else (0.0, 0)
    return {f"{name}/degree_mean": mean, f"{name}/degree_max": most, f"{name}/isolated": int((degree == 0).sum())}


def _components(name: str, freq: sparse.csr_matrix) -> dict[str, float]:
    count, labels = csgraph.connected_components(freq, directed=False)
    return {f"{name}/components": int(count), f"{name}/largest_component": int(np.bincount(labels).max()) if count else 0}


def _column_sums(matrix: sparse.csr_matrix) -> NDArray[np.int64]:
    return np.asarray(matrix.sum(axis=0, dtype=np.int64)).ravel()
