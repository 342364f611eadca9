"""What several samples of one problem come to: a majority vote (self-consistency, Wang et al. 2022, arXiv 2203.11171), and pass@k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Vote:
    """What a vote came to.

    winner: index of the first sample that says what most say. votes: for it. parsed: samples that say anything. tied: another answer has as
    many votes, and the winner came first.
    """

    winner: int
    votes: int
    parsed: int
    tied: bool


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool] = str.__eq__) -> Vote:
    """The answer that most samples give; of a tie the one that appeared first. None, an answer that says nothing, wins only where all are.

    answers: what was extracted from each sample, in order. same: whether two answers are one; compared with the first that said it.
    Raises ValueError for no answers.

    Example:
        >>> majority(["7", None, "8", "8", None]), majority(["7", "8"]).tied
        (Vote(winner=2, votes=2, parsed=3, tied=False), True)
    """
    if not answers:
        raise ValueError("majority: no answers")
    votes: dict[int, int] = {}  # by the index of the first sample that said it
    for i, answer in enumerate(answers):
        if answer is not None:
            first = next((j for j in votes if same(str(answers[j]), answer)), i)
            votes[first] = votes.get(first, 0) + 1
    if not votes:
        return Vote(0, 0, 0, False)
    most = max(votes.values())
    leaders = [i for i, count in votes.items() if count == most]  # in the order of first appearance
    return Vote(leaders[0], most, sum(votes.values()), len(leaders) > 1)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that of k different ones of the n samples, c of them right, one is: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    Unbiased for the chance that one of k independent samples is right. Raises ValueError for k > n.

    >>> round(pass_at_k(5, 2, 2), 3)
    0.7
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: {right} of {samples} right, k={k}; 0 <= right <= samples and 1 <= k <= samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
