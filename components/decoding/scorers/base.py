"""What options of the group `decode/scorer` share: they judge the samples of a query for decode=best_of_n."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from components.contracts import Completion, UserError
from components.decoding.rounds import Ask, Query, Setting

Score = float | None  # higher is better; None: not judged, which is worse than any number
Judged = tuple[list[Score], dict[str, object]]  # one score a sample, and notes on how, as JSON
Judging = Generator[list[Ask], list[Completion], Judged | None]


class Scorer:
    """Base of scorers. A subclass has `scores`; one that asks the model too has `judge` instead."""

    def scores(self, query: Query, candidates: Sequence[Completion]) -> list[Score]:
        """One score a sample, in their order."""
        raise NotImplementedError

    def judge(self, query: Query, candidates: Sequence[Completion], setting: Setting) -> Judging:
        """Yields rounds of calls as a method does (`Rounds`); returns scores and notes, None where the context has no room for them."""
        yield from ()
        return self.scores(query, candidates), {}


def failed(completion: Completion) -> bool:
    """Whether a call has no answer."""
    return completion.finish_reason in ("error", "abort")


def logprob(completion: Completion) -> float:
    """Nats of the whole completion under the model's own distribution, stop token included. Raises UserError for an engine without them."""
    if not completion.logprobs:
        raise UserError("decode.scorer: it takes log-probabilities of the samples, and this engine gives none; take decode/scorer=rule")
    return math.fsum(completion.logprobs)


def mean_logprob(completion: Completion) -> float:
    """`logprob` a token."""
    return logprob(completion) / len(completion.logprobs)
