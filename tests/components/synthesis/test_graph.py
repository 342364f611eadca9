"""The concept graph against brute force from the documents, and its files."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from components.errors import UserError
from components.synthesis.corpus import index_documents, slices
from components.synthesis.graph import build_graph, co_occurrence, content_address, summary
from components.synthesis.walks import WalkRule, sample_epochs
from tests.components.synthesis.made_up import random_corpus, random_documents

EPSILONS = [1e-5, 1e-2, 1.0]


def dense_freq(documents, kind):
    """freq by pairs of names of each document, straight from the definition; returns (freq, rows, columns)."""
    topics = sorted({topic for document in documents for topic in document})
    concepts = sorted({name for document in documents for names in document.values() for name in names})
    rows, columns = {"tt": (topics, topics), "tc": (topics, concepts), "cc": (concepts, concepts)}[kind]
    freq = np.zeros((len(rows), len(columns)))
    for document in documents:
        mine = {"t": set(document), "c": {name for names in document.values() for name in names}}
        for u, v in itertools.product(mine[kind[0]], mine[kind[1]]):
            if kind[0] != kind[1] or u != v:
                freq[rows.index(u), columns.index(v)] += 1
    return freq


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", ["tt", "tc", "cc"])
def test_transitions_are_the_softmax_of_log_frequencies(kind, epsilon):
    documents = random_documents(25, seed=1, topics=12, concepts=20)
    graph = build_graph(index_documents(documents, {}), epsilon)
    edges = {"tt": graph.topic_topic, "tc": graph.topic_concept, "cc": graph.concept_concept}[kind]
    freq = dense_freq(documents, kind)
    assert np.array_equal(edges.freq.toarray(), freq)
    assert len(set(freq[freq > 0])) > 2 and (freq == 1).any()  # single co-occurrences are where a wrong weight shows
    w = np.where(freq > 0, np.log(freq + epsilon), -np.inf)
    softmax = np.exp(w - w.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(edges.transition().toarray(), softmax, rtol=0, atol=1e-12)


def test_frequencies_of_one_keep_their_share():
    """At a small epsilon log(1 + epsilon) is nearly 0: normalising w itself would make such edges unreachable."""
    documents = [{"a": [], "b": []}] * 3 + [{"a": [], "c": []}, {"a": [], "d": []}]
    graph = build_graph(index_documents(documents, {}), 1e-5)
    np.testing.assert_allclose(graph.topic_topic.transition().toarray()[0], [0, 0.6, 0.2, 0.2], atol=1e-5)


def test_concepts_are_linked_to_every_topic_of_their_document():
    graph = build_graph(index_documents([{"a": ["x", "X "], "b": []}, {"a": ["x"]}], {}), 1.0)
    assert graph.topic_concept.freq.toarray().tolist() == [[2], [1]]  # a mention that is repeated in a document counts once
    assert graph.concept_concept.freq.nnz == 0 and graph.topic_documents.tolist() == [2, 1] and graph.concept_documents.tolist() == [2]


def test_blocks_of_rows_change_nothing():
    matrix = random_corpus(80, seed=2).doc_concepts
    whole = co_occurrence(matrix, matrix)
    parts = co_occurrence(matrix, matrix, rows=5)
    assert (whole != parts).nnz == 0 and whole.has_sorted_indices and not whole.diagonal().any() and (whole.data > 0).all()


def test_a_row_without_neighbours_is_empty():
    graph = build_graph(index_documents([{"a": []}, {"b": ["x", "y"]}, {"c": []}], {}), 1e-5)
    assert graph.topic_topic.transition().nnz == 0
    np.testing.assert_array_equal(graph.topic_concept.transition().toarray(), [[0, 0], [0.5, 0.5], [0, 0]])


def test_address_is_that_of_the_content():
    documents = random_documents(30, seed=3)
    address = build_graph(index_documents(documents, {}), 1e-5).address
    shuffled = [{t: list(reversed(names)) for t, names in reversed(document.items())} for document in reversed(documents)]
    assert len(address) == 64 and build_graph(index_documents(shuffled, {}), 1e-5).address == address
    others = [
        build_graph(index_documents(documents, {}), 1e-4).address,
        build_graph(index_documents(documents[1:], {}), 1e-5).address,
        build_graph(index_documents(documents, {"concept 1": "concept 2"}), 1e-5).address,
    ]
    assert len({address, *others}) == 4


def test_address_tells_which_document_has_a_name():
    first, second = ([{"a": ["x"], "b": []}, {"a": [], "b": []}], [{"a": [], "b": ["x"]}, {"a": ["x"], "b": []}])
    assert content_address(index_documents(first, {}), 1.0) != content_address(index_documents(second, {}), 1.0)


def test_names_that_mean_the_same_are_one_node():
    corpus = index_documents(
        [{"Algebra": ["Powers."]}, {"algebra:": ["POWERS"]}, {"Algebra": ["Exponents", "..."]}], {"exponents": "powers"}
    )
    assert corpus.topics.names == ["algebra"] and corpus.topics.surfaces == ["Algebra"]
    assert corpus.concepts.names == ["powers"] and corpus.concepts.surfaces == ["Exponents"]  # the first in the alphabet among equals
    assert corpus.doc_concepts.toarray().tolist() == [[1], [1], [1]]


def test_slices_cover_all_documents():
    parts = slices(10, 3)
    assert [len(range(10)[part]) for part in parts] == [3, 3, 4] and [i for part in parts for i in range(10)[part]] == list(range(10))
    with pytest.raises(UserError, match=r"graph.shards: 11; allowed are 1 to 10"):
        slices(10, 11)


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan"), float("inf"), True, "1e-5"])
def test_epsilon_is_above_zero(epsilon):
    with pytest.raises(UserError, match=r"graph\.epsilon"):
        build_graph(random_corpus(5, seed=0), epsilon)


def test_documents_without_topics_are_refused():
    with pytest.raises(UserError, match="2 documents without a single topic"):
        build_graph(index_documents([{}, {}], {}), 1e-5)


def test_documents_without_concepts_make_a_graph_of_topics():
    graph = build_graph(index_documents([{"a": [], "b": []}, {"b": []}], {}), 1e-5)
    assert summary(graph)["graph/concepts"] == 0 and summary(graph)["graph/whole/components"] == 1
    for self_avoiding in (False, True):
        walks = sample_epochs(graph, WalkRule((1, 2), (3, 4), "each", self_avoiding), 0, range(3))
        assert (walks.concepts == -1).all() and (walks.topics[:, 1] >= 0).all()


def test_summary_counts_as_networkx_does():
    networkx = pytest.importorskip("networkx", reason="networkx is the oracle of degrees and components")
    graph = build_graph(random_corpus(14, seed=5, topics=9, concepts=30), 1e-5)
    found = summary(graph)
    for name, edges in (("topic_topic", graph.topic_topic), ("concept_concept", graph.concept_concept)):
        other = networkx.from_scipy_sparse_array(sparse.csr_array(edges.freq))
        degrees = [degree for _, degree in other.degree()]
        assert found[f"graph/{name}/edges"] == other.number_of_edges() and found[f"graph/{name}/degree_max"] == max(degrees)
        assert found[f"graph/{name}/degree_mean"] == pytest.approx(np.mean(degrees)) and found[f"graph/{name}/isolated"] == degrees.count(0)
        components = [len(part) for part in networkx.connected_components(other)]
        assert (found[f"graph/{name}/components"], found[f"graph/{name}/largest_component"]) == (len(components), max(components))
    assert found["graph/topic_concept/edges"] == graph.topic_concept.freq.nnz and found["graph/whole/components"] >= 1
