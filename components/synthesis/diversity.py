"""How different questions are (SynthLLM, sec. 4.3): similarity within a document, repetition, coverage of pairs of concepts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from components.errors import UserError
from components.synthesis.graph import ConceptGraph
from components.synthesis.text import gram_hashes, word_hashes

Embedder = Callable[[Sequence[str]], Any]  # texts -> (texts, features), array or CSR, rows of length 1, or 0 for a text without content


@dataclass(frozen=True)
class HashedTfIdf:
    """Embeds texts by their words: (1 + log count) * idf, hashed into `features` columns with signs (Weinberger et al. 2009).

    idf is log((1 + texts) / (1 + texts with the word)) + 1 over the texts of the same call.
    """

    features: int

    def __post_init__(self) -> None:
        if not isinstance(self.features, int) or isinstance(self.features, bool) or self.features < 1:
            raise UserError(f"embedder.features: {self.features!r}; allowed is a whole number of at least 1, such as 65536")

    def __call__(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """(texts, features) float64 with rows of length 1; a row without words is empty."""
        counts = self._counts(texts)
        present = np.bincount(counts.indices, minlength=self.features)
        idf = np.log((1 + len(texts)) / (1 + present)) + 1
        weights = np.sign(counts.data) * (1 + np.log(np.abs(counts.data))) * idf[counts.indices]
        matrix = sparse.csr_matrix((weights, counts.indices, counts.indptr), shape=counts.shape)
        lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        matrix.data /= np.repeat(np.where(lengths > 0, lengths, 1.0), np.diff(matrix.indptr))
        return matrix

    def _counts(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Signed counts by column, without columns whose words cancel out."""
        hashes, begins = word_hashes(texts)
        columns = (hashes % np.uint64(self.features)).astype(np.int64)
        signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
        matrix = sparse.csr_matrix((signs, columns, begins), shape=(len(texts), self.features))
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return matrix


def within_document_cosines(documents: Sequence[Sequence[str]], embedder: Embedder) -> NDArray[np.float64]:
    """Cosine similarity of every pair of questions of the same document, document after document: (pairs,).

    documents: questions of each. All are embedded in one call, so that idf is that of the whole.
    """
    vectors = embedder([question for questions in documents for question in questions])
    found, first = [np.empty(0)], 0
    for questions in documents:
        own = vectors[first : first + len(questions)]
        product = own @ own.T
        square = product.toarray() if sparse.issparse(product) else np.asarray(product)
        found.append(square[np.triu_indices(len(questions), k=1)])
        first += len(questions)
    return np.concatenate(found)


def histogram(values: NDArray[np.float64], bins: int, low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(edges (bins + 1,), density (bins,)) of values within low..high, what lies outside counted at the ends; density sums to 1 / width."""
    density, edges = np.histogram(np.clip(values, low, high), bins=bins, range=(low, high))
    return edges, density / max(density.sum(), 1) * bins / (high - low)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams (Li et al. 2016), nan when there is none."""
    grams, _ = gram_hashes(texts, n, short=False)
    return len(np.unique(grams)) / len(grams) if len(grams) else float("nan")


def compression_ratio(texts: Iterable[str]) -> float:
    """Bytes over bytes after zlib, one text a line: the higher, the more they repeat (Shaib et al. 2024); nan without text."""
    data = "\n".join(texts).encode("utf-8", "surrogatepass")
    return len(data) / len(zlib.compress(data, 9)) if data else float("nan")


def pair_coverage(selected: Iterable[Sequence[str]], offered: Sequence[str]) -> tuple[int, int]:
    """(distinct pairs of offered names that were combined, pairs that are possible).

    selected: names of each question. Names are compared as they are: bring them into normal form first.
    """
    known = set(offered)
    used = {pair for names in selected for pair in combinations(sorted(known.intersection(names)), 2)}
    return len(used), len(known) * (len(known) - 1) // 2


@dataclass(frozen=True)
class GraphView:
    """A part of a graph that can be drawn. labels, kinds, sizes (documents): one a node; edges: (node, node, freq)."""

    labels: list[str]
    kinds: list[str]
    sizes: list[int]
    edges: list[tuple[int, int, int]]


def graph_view(graph: ConceptGraph, topics: int, concepts: int) -> GraphView:
    """The topics and key concepts that occur in the most documents, and all edges between them."""
    t, c = (np.sort(np.argsort(-count, kind="stable")[:most]) for count, most in (
        (graph.topic_documents, topics), (graph.concept_documents, concepts)))  # fmt: skip
    labels = [graph.topics.surfaces[i] for i in t] + [graph.concepts.surfaces[i] for i in c]
    sizes = [*graph.topic_documents[t].tolist(), *graph.concept_documents[c].tolist()]
    edges: list[tuple[int, int, int]] = []
    for part, rows, columns, down, right in (
        (graph.topic_topic, t, t, 0, 0), (graph.topic_concept, t, c, 0, len(t)), (graph.concept_concept, c, c, len(t), len(t)),
    ):  # fmt: skip
        chosen = part.freq[rows][:, columns].tocoo()
        found = zip((chosen.row + down).tolist(), (chosen.col + right).tolist(), chosen.data.tolist())
        edges += [(u, v, freq) for u, v, freq in found if u < v]
    return GraphView(labels, ["topic"] * len(t) + ["concept"] * len(c), sizes, edges)
