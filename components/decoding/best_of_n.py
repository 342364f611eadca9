"""Option decode=best_of_n: the sample with the highest score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from components.contracts import Completion, UserError
from components.decoding.rounds import Answer, Candidates, Query, Rounds, Sampler, Setting, described


class Scorer(Protocol):
    """Judges answers, e.g. a reward model."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """One number an answer, higher for better ones."""
        ...


class BestOfN(Candidates):
    """The best of n samples; of equals the first. n calls of the model in one round.

    n: samples. sampler: draws them. scorer: judges them; None: the mean log-probability of a sample's tokens under the model's own
    distribution, which the engine gives with them. Notes: scores.
    Raises UserError for an engine without log-probabilities where no scorer is given, and for scores of another number.
    """

    def __init__(self, n: int, sampler: Sampler, scorer: Scorer | None) -> None:
        super().__init__(n, sampler)
        self.scorer = scorer

    def answer(self, query: Query, setting: Setting) -> Rounds:
        candidates = yield self.sampled(query, setting)
        if self.scorer is None:
            scores = [mean_logprob(one) for one in candidates]
        else:
            scores = [float(score) for score in self.scorer.score([query.text] * self.n, [one.text for one in candidates])]
            if len(scores) != self.n:
                raise UserError(f"decode.scorer: {len(scores)} scores for {self.n} answers; it must give one each")
        # a score that is not a number is worse than all
        best = max(range(self.n), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
        return Answer(candidates[best], candidates, best, {**described(candidates), "scores": scores})


def mean_logprob(completion: Completion) -> float:
    """Nats a token, stop token included; minus infinity for a call that failed."""
    if completion.finish_reason in ("error", "abort"):
        return -math.inf
    if not completion.logprobs:
        raise UserError("decode.scorer: null takes the mean log-probability of an answer, and this engine gives none; name a scorer")
    return math.fsum(completion.logprobs) / len(completion.logprobs)
