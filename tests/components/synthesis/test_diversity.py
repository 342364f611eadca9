"""Measures of diversity against their definitions, and the part of a graph that is drawn."""

from __future__ import annotations

import zlib
from collections import Counter
from itertools import combinations
from math import log, sqrt

import numpy as np
import pytest

from components.errors import UserError
from components.synthesis.corpus import index_documents
from components.synthesis.diversity import (
    HashedTfIdf,
    compression_ratio,
    distinct_n,
    graph_view,
    histogram,
    pair_coverage,
    within_document_cosines,
)
from components.synthesis.graph import build_graph
from components.synthesis.text import words

DOCUMENTS = [["Add two and two.", "add TWO and three", "What is a prime?"], [], ["alone"], ["", "a prime is a number"]]


def tf_idf(texts):
    """Vectors as dicts, by the definition."""
    found = [Counter(words(text)) for text in texts]
    present = Counter(word for counts in found for word in counts)
    weights = [{w: (1 + log(n)) * (log((1 + len(texts)) / (1 + present[w])) + 1) for w, n in counts.items()} for counts in found]
    lengths = [sqrt(sum(x * x for x in vector.values())) or 1.0 for vector in weights]
    return [{w: x / length for w, x in vector.items()} for vector, length in zip(weights, lengths)]


def test_cosines_are_those_of_tf_idf():
    vectors = tf_idf([text for questions in DOCUMENTS for text in questions])
    expected, first = [], 0
    for questions in DOCUMENTS:
        own = vectors[first : first + len(questions)]
        expected += [sum(x * b.get(w, 0.0) for w, x in a.items()) for a, b in combinations(own, 2)]
        first += len(questions)
    found = within_document_cosines(DOCUMENTS, HashedTfIdf(features=1 << 20))  # so many columns that no two of these words share one
    assert expected[0] > 0.5 > expected[1] == 0
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_any_embedder_will_do():
    found = within_document_cosines(DOCUMENTS, lambda texts: np.eye(len(texts)) + 0.0)
    assert found.tolist() == [0.0] * 4 and within_document_cosines([], HashedTfIdf(8)).tolist() == []


def test_rows_have_length_one():
    matrix = HashedTfIdf(features=4)(["a b c d e f", "a a a", "", "a"])  # words share columns, and may cancel out
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    assert np.isclose(lengths, 1).sum() >= 2 and lengths[2] == 0 and ((lengths < 1e-9) | np.isclose(lengths, 1)).all()
    with pytest.raises(UserError, match=r"embedder\.features: 0"):
        HashedTfIdf(0)


def test_histogram_is_a_density():
    edges, density = histogram(np.array([-0.5, 0.1, 0.1, 0.9, 1.0, 3.0]), bins=4, low=0.0, high=1.0)
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1] and density.tolist() == [2, 0, 0, 2]
    assert histogram(np.empty(0), 2, 0.0, 1.0)[1].tolist() == [0, 0]


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b", "A b!"], 1) == 2 / 6
    assert distinct_n(["a b a b", "A b!"], 2) == 2 / 4
    assert np.isnan(distinct_n(["a"], 2))


def test_compression_ratio():
    assert compression_ratio(["ab", "cd"]) == 5 / len(zlib.compress(b"ab\ncd", 9))
    assert compression_ratio(["the same question"] * 50) > 10 > 1.5 > compression_ratio(["different", "words", "only"])
    assert np.isnan(compression_ratio([]))


def test_pairs_of_concepts():
    assert pair_coverage([["a", "b"], ["b", "a"], ["a", "b", "c"], ["a", "x"], ["d"]], ["a", "b", "c", "d"]) == (3, 6)
    assert pair_coverage([], ["a"]) == (0, 0)


def test_view_holds_the_commonest_and_their_edges():
    documents = [{"A": ["x", "y"], "B": ["x"]}, {"A": ["X", "z"], "B": []}, {"C": ["y"]}, {"A": ["y"]}]
    view = graph_view(build_graph(index_documents(documents, {}), 1e-5), topics=2, concepts=2)
    assert view.labels == ["A", "B", "X", "y"] or view.labels == ["A", "B", "x", "y"]
    assert view.kinds == ["topic", "topic", "concept", "concept"] and view.sizes == [3, 2, 2, 3]
    assert sorted(view.edges) == [(0, 1, 2), (0, 2, 2), (0, 3, 2), (1, 2, 2), (1, 3, 1), (2, 3, 1)]
