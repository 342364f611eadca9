"""The filter of documents finds a domain in a made-up corpus; what it is asked and told is checked."""

from __future__ import annotations

import builtins
import random

import numpy as np
import pytest

from components.errors import UserError
from components.synthesis.diversity import HashedTfIdf
from components.synthesis.filter import DocumentFilter

SETTINGS = {
    "embedder": HashedTfIdf(512), "trees": 30, "depth": None, "threshold": 6.5, "rounds": 2, "random_documents": 20, "seed": 0,
}  # fmt: skip
MATHS, OTHER, SHARED = (
    ["sum", "angle", "prime", "proof", "integral"],
    ["garden", "song", "river", "goal", "film"],
    ["the", "a", "is", "of", "it"],
)


def texts(count, domain, seed):
    source = random.Random(seed)
    return [" ".join(source.choices(domain, k=8) + source.choices(SHARED, k=8)) for _ in range(count)]


@pytest.fixture
def corpus():
    """(documents, indices of the maths ones)."""
    documents = [*texts(60, MATHS, 1), *texts(140, OTHER, 2)]
    order = np.random.default_rng(0).permutation(len(documents))
    return [documents[i] for i in order], np.flatnonzero(order < 60)


def sklearn():
    return pytest.importorskip("sklearn", reason="random forests are scikit-learn's, which is an extra")


def test_cold_start_finds_the_domain(corpus):
    sklearn()
    documents, maths = corpus
    found = DocumentFilter(**SETTINGS).cold_start(documents, texts(40, MATHS, 3), texts(40, OTHER, 4))
    assert found.tolist() == maths.tolist()
    assert len(DocumentFilter(**SETTINGS).cold_start([], ["a"], ["b"])) == 0


def test_refining_keeps_what_is_rated_above_the_threshold(corpus):
    sklearn()
    documents, maths = corpus
    asked = []

    def rate(places):
        asked.extend(places)
        return [9.0 if place in set(maths[::2].tolist()) else 2.0 for place in places]

    # of the maths documents only every other one is rated high, by a word that stands in it
    documents = [text + " clear clear clear" if place in set(maths[::2].tolist()) else text for place, text in enumerate(documents)]
    found = DocumentFilter(**SETTINGS).refine(documents, maths[: len(maths) // 2], rate)
    assert found.tolist() == maths[::2].tolist()  # also those that were not kept at first
    assert len(asked) == len(set(asked)) and set(maths[: len(maths) // 2].tolist()) < set(asked)  # each once
    assert DocumentFilter(**{**SETTINGS, "rounds": 0}).refine(documents, maths[:3], rate).tolist() == maths[:3].tolist()


def test_bad_ratings(corpus):
    sklearn()
    documents, maths = corpus
    with pytest.raises(UserError, match="a rating of 11; allowed is a number from 1 to 10"):
        DocumentFilter(**SETTINGS).refine(documents, maths, lambda places: [11] * len(places))
    with pytest.raises(UserError, match="the rater must give one each"):
        DocumentFilter(**SETTINGS).refine(documents, maths, lambda places: [5.0])
    with pytest.raises(UserError, match="nothing to rate"):
        DocumentFilter(**{**SETTINGS, "random_documents": 0}).refine(documents, maths[:0], lambda places: [])


@pytest.mark.parametrize("change", [{"trees": 0}, {"rounds": -1}, {"random_documents": 1.5}, {"threshold": 10}])
def test_bad_settings(change):
    with pytest.raises(UserError, match=rf"filter\.{next(iter(change))}"):
        DocumentFilter(**{**SETTINGS, **change})


def test_one_line_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def no_sklearn(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(UserError, match=r"scikit-learn is not installed; pip install 'patchbay\[synthesis\]'"):
        DocumentFilter(**SETTINGS)
