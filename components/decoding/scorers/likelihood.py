"""Options decode/scorer=likelihood and mean_likelihood: how likely the model finds its own samples, at no further call."""

from __future__ import annotations

from collections.abc import Sequence

from components.contracts import Completion
from components.data.errors import choice
from components.decoding.rounds import Query
from components.decoding.scorers.base import Score, Scorer, failed, logprob, mean_logprob

PER = {"answer": logprob, "token": mean_logprob}


class Likelihood(Scorer):
    """The log-probability of a sample under the model's own distribution (temperature 1, nothing cut off), stop token included.

    per: answer, of all its tokens, which favours short ones; token, their mean, which does not. Raises UserError for another word, and for
    an engine without log-probabilities.
    """

    def __init__(self, per: str) -> None:
        self.of = PER[choice("decode.scorer.per", per, tuple(PER))]

    def scores(self, query: Query, candidates: Sequence[Completion]) -> list[Score]:
        return [None if failed(one) else self.of(one) for one in candidates]
