"""Nearest documents against brute force, ties included."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from components.errors import UserError
from components.synthesis import retrieval
from components.synthesis.corpus import incidence
from components.synthesis.graph import build_graph
from components.synthesis.retrieval import nearest_documents
from components.synthesis.walks import WalkRule, sample_epochs
from tests.components.synthesis.made_up import random_corpus

FRACTIONS = {(common, either): Fraction(common, max(either, 1)) for either in range(40) for common in range(either + 1)}


def brute_force(sets, documents, count):
    """By exact fractions, the lower index first among equals."""
    found = []
    for one in sets:
        scores = [FRACTIONS[len(one & other), len(one | other)] for other in documents]
        order = sorted(range(len(documents)), key=lambda i: (-scores[i], i))[:count]
        found.append((order, [float(scores[i]) for i in order]))
    return found


def random_sets(count, names, sizes, seed):
    source = random.Random(seed)
    return [set(source.sample(range(names), source.randint(*sizes))) for _ in range(count)]


@pytest.mark.parametrize("block_pairs", [5000, 1 << 22])
def test_equal_to_brute_force_on_two_thousand_documents(block_pairs, monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK_PAIRS", block_pairs)
    sets, documents = random_sets(40, 40, (1, 7), seed=1), random_sets(2000, 40, (0, 12), seed=2)
    found = nearest_documents(incidence(sets, 40), incidence(documents, 40), 2)
    expected = brute_force(sets, documents, 2)
    assert found.documents.tolist() == [ids for ids, _ in expected]
    assert found.similarities.tolist() == [scores for _, scores in expected]
    assert sum(scores[0] == scores[1] for _, scores in expected) > 15  # ties are common here


def test_fewer_matches_than_asked_for():
    sets = [set(), {0}, {3}, {0, 1}]
    documents = [{1}, set(), {0, 2}, {1}, {2}]
    found = nearest_documents(incidence(sets, 4), incidence(documents, 4), 3)
    expected = brute_force(sets, documents, 3)
    assert found.documents.tolist() == [ids for ids, _ in expected] == [[0, 1, 2], [2, 0, 1], [0, 1, 2], [0, 3, 2]]
    assert found.similarities.tolist() == [scores for _, scores in expected]


@pytest.mark.parametrize("members", ["all", "concepts"])
def test_sets_of_walks(members):
    corpus = random_corpus(300, seed=8, topics=12, concepts=40)
    graph = build_graph(corpus, 1e-5)
    walks = sample_epochs(graph, WalkRule((1, 2), (3, 4), "uniform", False), 0, range(4))
    sets, documents = walks.sets(graph, members), corpus.sets(members)
    found = nearest_documents(sets, documents, 2)
    rows = [[set(row.indices.tolist()) for row in matrix] for matrix in (sets, documents)]
    assert found.documents.tolist() == [ids for ids, _ in brute_force(*rows, 2)]


def test_bad_input():
    one = incidence([{0}], 1)
    with pytest.raises(UserError, match=r"retrieval.documents: 2; allowed are 1 to 1"):
        nearest_documents(one, one, 2)
    with pytest.raises(UserError, match=r"retrieval\.members"):
        random_corpus(3, seed=0).sets("topics")
    assert np.array_equal(nearest_documents(one[:0], one, 1).documents, np.empty((0, 1)))
