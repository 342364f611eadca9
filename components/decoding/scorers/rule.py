"""Option decode/scorer=rule: a sample that says an answer is better than one that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from components.contracts import Completion
from components.decoding.answers import Reader
from components.decoding.rounds import Query
from components.decoding.scorers.base import Score, Scorer, failed, mean_logprob


class Rule(Scorer):
    """1 where `read` finds an answer in a sample, else 0; plus the geometric mean of its tokens' probabilities, 0 to 1.

    The latter parts those that are alike; it is left out for an engine without log-probabilities, where the first of equals counts.
    """

    def __init__(self, read: Reader) -> None:
        self.reader = read

    def scores(self, query: Query, candidates: Sequence[Completion]) -> list[Score]:
        def score(one: Completion) -> float:
            return float(self.reader.read(one.text) is not None) + (math.exp(mean_logprob(one)) if one.logprobs else 0.0)

        return [None if failed(one) else score(one) for one in candidates]
