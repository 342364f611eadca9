"""Option decode=best_of_n: the sample with the highest score."""

from __future__ import annotations

import math

from components.contracts import Completion, UserError
from components.decoding.rounds import Answer, Candidates, Query, Rounds, Sampler, Setting, described, no_room
from components.decoding.scorers.base import Scorer, failed


class BestOfN(Candidates):
    """The best of n samples; of equals the first. n calls in one round, and those of the scorer.

    n: samples. sampler: draws them. scorer: judges them. Notes: scores, and what the scorer notes; unscored, samples without a score. Where
    none has one the answer is an error, never a sample that nobody judged.
    Raises UserError for scores of another number, and what the scorer raises.
    """

    def __init__(self, n: int, sampler: Sampler, scorer: Scorer) -> None:
        super().__init__(n, sampler)
        self.scorer = scorer

    def answer(self, query: Query, setting: Setting) -> Rounds:
        candidates = yield self.sampled(query, setting)
        judged = yield from self.scorer.judge(query, candidates, setting)
        if judged is None:
            return no_room(described(candidates), candidates)
        scores, about = judged
        if len(scores) != self.n:
            raise UserError(f"decode.scorer: {len(scores)} scores for {self.n} answers; it must give one each")
        known = {i: score for i, score in enumerate(scores) if score is not None and not math.isnan(score)}
        notes = {**described(candidates), **about, "scores": [known.get(i) for i in range(self.n)], "unscored": self.n - len(known)}
        if not known:
            reasons = [one.stop_reason for one in candidates if failed(one)] + [about.get("why")]
            error = f"no sample could be scored{next((f': {one}' for one in reasons if one), '')}"
            return Answer(Completion([], "", [], "error", stop_reason=error), candidates, None, notes)
        best = max(known, key=known.__getitem__)
        return Answer(candidates[best], candidates, best, notes)
