"""Option decode=self_consistency: the answer that most samples give (Wang et al. 2022, arXiv 2203.11171)."""

from __future__ import annotations

from components.decoding.answers import Reader
from components.decoding.rounds import Answer, Candidates, Query, Rounds, Sampler, Setting, described
from components.decoding.voting import majority


class SelfConsistency(Candidates):
    """A vote over n samples; of a tie the answer that appeared first. n calls in one round.

    n: samples. sampler: draws them. read: what a sample answers; one that answers nothing has no vote.
    Notes: answers (of each sample), votes, tied, unparsed (samples without an answer).
    """

    def __init__(self, n: int, sampler: Sampler, read: Reader) -> None:
        super().__init__(n, sampler)
        self.reader = read

    def answer(self, query: Query, setting: Setting) -> Rounds:
        candidates = yield self.sampled(query, setting)
        answers = [self.reader.read(one.text) for one in candidates]
        vote = majority(answers, self.reader.same)
        notes = {**described(candidates), "answers": answers, "votes": vote.votes, "tied": vote.tied, "unparsed": self.n - vote.parsed}
        return Answer(candidates[vote.winner], candidates, vote.winner, notes)
