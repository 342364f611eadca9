"""Option decode/scorer=judge: how sure the model is that its sample is right, P(True) of Kadavath et al. 2022, arXiv 2207.05221."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from components.contracts import Completion, Constraint, SamplingParams, UserError
from components.decoding.constraints import automaton
from components.decoding.rounds import Ask, Query, Setting, seed_of
from components.decoding.scorers.base import Judging, Scorer, failed, logprob
from components.decoding.templates import Template


class Judge(Scorer):
    """The log-probability that the model, shown one sample and asked about it, replies with `reply` and nothing else.

    One more call for each sample, in one round: a greedy answer held to `reply` (decode.choice), with log-probabilities of the model's
    own distribution. So it is that of one spelling in tokens and of the end after it, and it is counted as any call. A call that fails, or
    says something else, leaves its sample without a score.

    template: shows the sample, with {label} attempt. reply: the word of a good sample, with the space that the model puts before it.
    Notes: dropped_tokens of each sample where the context would overflow; why a sample has no score.
    Raises UserError for an empty reply; an engine without decode.choice refuses the calls.
    """

    def __init__(self, template: Template, reply: str) -> None:
        if not reply:
            raise UserError("decode.scorer.reply: ''; the word of a good sample is needed, such as Yes")
        self.template, self.reply, self.constraint = template, reply, Constraint(choice=(reply,))
        automaton(self.constraint)
        self.tokens = len(reply.encode()) + 1  # of bytes, the longest spelling, and the stop token

    def judge(self, query: Query, candidates: Sequence[Completion], setting: Setting) -> Judging:
        room = replace(setting, max_new_tokens=self.tokens)
        shown = [self.template.show(query, [("attempt", one.text)], room) for one in candidates]
        fitting = [one for one in shown if one is not None]
        if len(fitting) < len(shown):
            return None
        seeds = [seed_of(setting.seed, query.id, "judge", i) for i in range(len(shown))]
        params = [SamplingParams(self.tokens, temperature=0.0, seed=seed, constraint=self.constraint) for seed in seeds]
        replies = yield [Ask("judge", one.said, own) for one, own in zip(fitting, params, strict=True)]
        held = [not failed(one) and one.text.strip() == self.reply.strip() for one in replies]  # not every server does what it is told
        scores = [logprob(replies[i]) if held[i] and not failed(one) else None for i, one in enumerate(candidates)]
        notes: dict[str, object] = {"dropped_tokens": [one.dropped for one in fitting]}
        if not all(held):
            other = replies[held.index(False)]
            notes["why"] = other.stop_reason if failed(other) else f"the judge said {other.text!r}, not {self.reply!r}"
        return scores, notes
