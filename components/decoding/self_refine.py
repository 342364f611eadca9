"""Option decode=self_refine: an answer, feedback on it by the same model, a revised answer (Madaan et al. 2023, arXiv 2303.17651)."""

from __future__ import annotations

from components.data.errors import at_least
from components.decoding.rounds import Answer, Ask, Candidates, Query, Rounds, Sampler, Setting, described, no_room, seed_of
from components.decoding.templates import Template


class SelfRefine(Candidates):
    """One sample, the first of those that other methods have, then feedback and revision in turn. Up to 1 + 2 revisions calls in a row.

    revisions: at most. sampler: draws the first answer. final: decodes feedback and revisions. feedback, revise: templates, shown the
    answer, and the answer and the feedback. enough: words in feedback, upper and lower case alike, that end it; None: never.
    Candidates are all answers in turn, the last of which counts. Notes: enough, whether the feedback ended it; dropped_tokens of each
    prompt.
    """

    def __init__(self, revisions: int, sampler: Sampler, final: Sampler, feedback: Template, revise: Template, enough: str | None) -> None:
        super().__init__(1, sampler)
        self.revisions, self.final, self.enough = at_least("decode.revisions", revisions, 1), final, enough
        self.feedback, self.revise = feedback, revise

    def answer(self, query: Query, setting: Setting) -> Rounds:
        candidates = yield self.sampled(query, setting)
        enough, dropped = False, []
        for revision in range(self.revisions):
            blocks = [("attempt", candidates[-1].text)]
            for role, template in (("feedback", self.feedback), ("revise", self.revise)):
                shown = template.show(query, blocks, setting)
                if shown is None:
                    return no_room(described(candidates), candidates)
                dropped.append(shown.dropped)
                seed = seed_of(setting.seed, query.id, role, revision)
                (said,) = yield [Ask(role, shown.said, self.final.params(setting.max_new_tokens, seed))]
                enough = role == "feedback" and self.enough is not None and self.enough.lower() in said.text.lower()
                if enough:
                    break
                blocks.append(("feedback", said.text))
            if enough:
                break
            candidates = [*candidates, said]
        notes = {**described(candidates), "enough": enough, "dropped_tokens": dropped}
        return Answer(candidates[-1], candidates, len(candidates) - 1, notes)
