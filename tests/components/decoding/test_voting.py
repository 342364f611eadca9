"""The vote against its exact theory by enumeration, ties, samples that say nothing; pass@k against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest

from components.decoding.voting import Vote, majority, pass_at_k
from components.evals.extraction import same_number

Q = 0.6  # chance that a sample is right


def accuracy(samples: int, wrong: list[str]) -> float:
    """Chance that the vote is right: every pattern of right and wrong samples, the i-th wrong one of which says wrong[i]."""
    total = 0.0
    for rights in itertools.product([True, False], repeat=samples):
        spare = iter(wrong)
        answers = ["right" if right else next(spare) for right in rights]
        total += math.prod(Q if right else 1 - Q for right in rights) * (answers[majority(answers).winner] == "right")
    return total


def test_three_votes_where_wrong_answers_are_all_distinct():
    """q^3 + 3q^2(1-q) + q(1-q)^2: of a tie of three the right one came first in a third of the cases."""
    assert accuracy(3, ["a", "b", "c"]) == pytest.approx(Q**3 + 3 * Q**2 * (1 - Q) + Q * (1 - Q) ** 2, rel=1e-12)
    assert accuracy(3, ["a", "b", "c"]) == pytest.approx(0.744, rel=1e-12)


def test_three_votes_where_wrong_answers_are_one():
    assert accuracy(3, ["a", "a", "a"]) == pytest.approx(Q**3 + 3 * Q**2 * (1 - Q), rel=1e-12)
    assert accuracy(3, ["a", "a", "a"]) == pytest.approx(0.648, rel=1e-12)


def test_four_votes_of_which_half_are_right_go_to_whoever_came_first():
    """2-2 against one shared wrong answer: the first sample decides, right in half of the 6 patterns."""
    expected = Q**4 + 4 * Q**3 * (1 - Q) + 3 * Q**2 * (1 - Q) ** 2
    assert accuracy(4, ["a"] * 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("answers", "vote"),
    [
        (["7"], Vote(0, 1, 1, False)),
        (["7", "8", "8"], Vote(1, 2, 3, False)),
        (["7", "8", "9"], Vote(0, 1, 3, True)),
        (["8", "7", "7", "8"], Vote(0, 2, 4, True)),
        (["9", "7", "8", "8", "7"], Vote(1, 2, 5, True)),  # of those that lead
        ([None, None, "7"], Vote(2, 1, 1, False)),  # most say nothing, and that is no answer
        ([None, "7", "8", None, "8"], Vote(2, 2, 3, False)),
        ([None, None], Vote(0, 0, 0, False)),
    ],
)
def test_votes_by_hand(answers, vote):
    assert majority(answers) == vote


def test_equal_answers_of_different_spelling_vote_together():
    assert majority(["7", "$8", "8.0", "7.5"], same_number) == Vote(1, 2, 4, False)
    with pytest.raises(ValueError, match="no answers"):
        majority([])


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_equals_enumeration(samples):
    """The share of all choices of k samples that hold a right one."""
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        chosen = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), rel=1e-12)


def test_pass_at_k_is_unbiased():
    """Its mean over all outcomes of 5 samples is the chance that one of k is right."""
    for k in range(1, 6):
        mean = sum(math.comb(5, c) * Q**c * (1 - Q) ** (5 - c) * pass_at_k(5, c, k) for c in range(6))
        assert mean == pytest.approx(1 - (1 - Q) ** k, rel=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(2000, 3, 1) == pytest.approx(3 / 2000) and pass_at_k(2000, 1990, 100) == 1.0


@pytest.mark.parametrize(("samples", "right", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses(samples, right, k):
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(samples, right, k)
