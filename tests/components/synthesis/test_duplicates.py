"""Repeated texts: exact and near, against the definition by sets; MinHash against its theory and against datasketch."""

from __future__ import annotations

import random

import numpy as np
import pytest

from components.errors import UserError
from components.synthesis.duplicates import NearDuplicates, band_rows, exact_duplicates, minhash
from components.synthesis.text import gram_hashes, normal_text, words

HASHES = [7728434389653764190, 5974822122681540963, 2629916421361922232]
SETTINGS = {"words": 5, "permutations": 128, "threshold": 0.8}
WORDS = [f"w{number}" for number in range(400)]


def made_text(source, length=60):
    return source.choices(WORDS, k=length)


def grams(text, size=5):
    """Set of word n-grams, by the definition."""
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)} or ({tuple(found)} if found else set())


def jaccard(a, b):
    return len(a & b) / len(a | b)


def test_normal_text_keeps_signs():
    same = ["Add 3 + 4.", " add\n3+4 .", "ADD 3 +4."]
    assert len({normal_text(text) for text in same}) == 1
    assert len({normal_text(text) for text in ["3+4", "3-4", "34", "3 4", "(3)+4"]}) == 5


def test_exact_duplicates_name_the_first():
    assert exact_duplicates(["A b.", "c", "a  B .", "C", "a b", "a b."]).tolist() == [-1, -1, 0, 1, -1, 0]
    assert exact_duplicates([]).tolist() == []


def test_hashes_of_runs_are_equal_exactly_for_equal_runs():
    source = random.Random(0)
    texts = [" ".join(source.choices("ab", k=source.randint(0, 9))) for _ in range(60)]
    for short in (True, False):
        hashes, ends = gram_hashes(texts, 3, short)
        runs = [run for text in texts for run in _runs(words(text), 3, short)]
        assert len(runs) == len(hashes) and ends[-1] == len(runs)
        assert len(set(zip(hashes.tolist(), runs))) == len(set(runs)) == len(set(hashes.tolist()))
    assert gram_hashes(["", "!"], 3, True)[1].tolist() == [0, 0, 0] and gram_hashes([], 3, True)[1].tolist() == [0]


def _runs(found, size, short):
    if 0 < len(found) < size:
        return [tuple(found)] if short else []
    return [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]


def test_hashes_are_fixed_for_good():
    """Python's own hash of a text differs from process to process; these must not."""
    assert gram_hashes(["one two three", "Ä"], 2, True)[0].tolist() == HASHES


def near_pair(source, changes):
    """A text and its copy with some words changed."""
    text = made_text(source)
    copy = list(text)
    for place in source.sample(range(len(text)), changes):
        copy[place] = "changed"
    return " ".join(text), " ".join(copy)


def test_share_of_equal_minhashes_is_the_jaccard_similarity():
    source = random.Random(1)
    permutations, errors = 128, []
    for changes in [0, 1, 1, 2, 2, 3, 4, 5, 8, 12] * 12:
        pair = near_pair(source, changes)
        hashes, ends = gram_hashes(pair, 5, True)
        first, second = minhash(hashes, ends, permutations)
        j = jaccard(*map(grams, pair))
        errors.append(((first == second).mean() - j) / max(np.sqrt(j * (1 - j) / permutations), 1e-9) if 0 < j < 1 else 0.0)
    errors = np.array([error for error in errors if error])
    # a share of independent draws: mean 0 and variance 1 in units of its standard error; bounds of five standard errors of each
    assert abs(errors.mean()) < 5 / np.sqrt(len(errors)) and abs(errors.var() - 1) < 5 * np.sqrt(2 / len(errors))


def test_minhash_in_parts_is_the_same(monkeypatch):
    texts = [" ".join(made_text(random.Random(seed), seed)) for seed in range(12)]
    hashes, ends = gram_hashes(texts, 5, True)
    whole = minhash(hashes, ends, 16)
    monkeypatch.setattr("components.synthesis.duplicates._GRAMS_AT_ONCE", 3)
    assert np.array_equal(minhash(hashes, ends, 16), whole)
    assert (whole[0] == np.uint64(2**64 - 1)).all()  # no word, no value


def test_near_duplicates_are_those_of_brute_force():
    source = random.Random(2)
    texts = [text for changes in [0, 0, 1, 1, 1, 2, 2, 3, 6, 20] * 12 for text in near_pair(source, changes)]
    texts += ["", "short one", "Short ONE!", "..."]
    source.shuffle(texts)
    sets, kept, expected = [grams(text) for text in texts], [], []
    for place, own in enumerate(sets):
        near = [number for number in kept if own and jaccard(own, sets[number]) >= SETTINGS["threshold"]]
        expected.append(near[0] if near else -1)
        kept += [place] if not near and own else []
    found = NearDuplicates(**SETTINGS).add(texts).tolist()
    wrong = sum(a != b for a, b in zip(found, expected))
    assert sum(number >= 0 for number in expected) > 40 and wrong <= 1  # the bands may miss one pair in a hundred, never add one
    assert all(number == -1 or number == other for number, other in zip(found, expected))


def test_a_corpus_may_come_in_parts():
    source = random.Random(3)
    texts = [text for changes in [0, 1, 2, 20] * 10 for text in near_pair(source, changes)]
    whole, parts = NearDuplicates(**SETTINGS), NearDuplicates(**SETTINGS)
    assert np.concatenate([parts.add(texts[:31]), parts.add([]), parts.add(texts[31:])]).tolist() == whole.add(texts).tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_bands_meet_their_recall(threshold):
    rows = band_rows(128, threshold)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99
    assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99


def test_datasketch_agrees():
    datasketch = pytest.importorskip("datasketch", reason="datasketch is the oracle of MinHash")
    source = random.Random(4)
    for changes in (0, 1, 2, 4, 8):
        pair = near_pair(source, changes)
        theirs = []
        for text in pair:
            signature = datasketch.MinHash(num_perm=128)
            for gram in grams(text):
                signature.update(" ".join(gram).encode())
            theirs.append(signature)
        hashes, ends = gram_hashes(pair, 5, True)
        first, second = minhash(hashes, ends, 128)
        # each share has a standard error of at most 0.044: five of their difference
        assert abs(theirs[0].jaccard(theirs[1]) - (first == second).mean()) < 5 * 0.044 * np.sqrt(2)


@pytest.mark.parametrize(
    "change, words_", [({"words": 0}, "duplicates.words"), ({"permutations": 1.5}, "permutations"), ({"threshold": 0}, "0.8")]
)
def test_bad_settings(change, words_):
    with pytest.raises(UserError, match=words_):
        NearDuplicates(**{**SETTINGS, **change})
