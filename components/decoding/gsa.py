"""Option decode=gsa: Generative Self-Aggregation, a new answer written with the model's own samples as material (arXiv 2503.04104)."""

from __future__ import annotations

from components.contracts import Completion
from components.data.errors import at_least, choice
from components.decoding.answers import Reader
from components.decoding.rounds import (
    Answer,
    Ask,
    Candidates,
    Query,
    Rounds,
    Sampler,
    Setting,
    arranged,
    described,
    no_room,
    other_of,
    seed_of,
)
from components.decoding.templates import Template

ORDERS = ("shuffle", "given")
CONTROLS = ("none", "foreign", "reask", "answers_only")
REDRAWN = ("empty", "cut_off", "repeated")


class GSA(Candidates):
    """n samples, then one call that writes a new answer from the query and all of them. n + 1 calls in two rounds.

    Nothing is picked, judged or voted on: the final answer is written anew, and one that is cut off stays cut off.

    Args:
        n: samples; 1 is the query asked again with one reference.
        sampler: draws them. final: decodes the new answer.
        template: the second prompt. order: in which the samples are shown, shuffle or given.
        cap_tokens: of a sample that are shown, its last; None: all. Fewer where the context would overflow.
        redraw: which samples are drawn once more: empty, cut_off (at max_new_tokens), repeated; [] keeps all as they are.
        control: none; foreign: samples of another query are shown, which must cost what the samples are worth; reask: the query alone is
            asked once more, as the new answer is decoded; answers_only: what `read` finds in the samples is shown without their reasoning.
        read: see control.

    Notes: control, n_distinct, empty, cut_off, failed, redrawn, order, dropped_tokens (cut from the front of each sample), nonce.
    Raises UserError for values that are not allowed, and control=foreign with a single query.
    """

    def __init__(
        self, n: int, sampler: Sampler, final: Sampler, template: Template, order: str, cap_tokens: int | None, redraw: list[str],
        control: str, read: Reader,
    ) -> None:  # fmt: skip
        super().__init__(n, sampler)
        self.final, self.template, self.reader = final, template, read
        self.order, self.control = choice("decode.order", order, ORDERS), choice("decode.control", control, CONTROLS)
        self.cap_tokens = None if cap_tokens is None else at_least("decode.cap_tokens", cap_tokens, 1)
        self.redraw = [choice("decode.redraw", one, REDRAWN) for one in redraw]

    def answer(self, query: Query, setting: Setting) -> Rounds:
        params = self.final.params(setting.max_new_tokens, seed_of(setting.seed, query.id, "aggregate"))
        if self.control == "reask":
            (again,) = yield [Ask("reask", query.said, params)]
            return Answer(again, [], None, {"control": self.control})
        source = other_of(query) if self.control == "foreign" else query
        candidates = yield self.sampled(source, setting)
        if redrawn := self.unwanted(candidates):
            fresh = yield self.sampled(source, setting, [self.n + i for i in redrawn])
            candidates = [fresh[redrawn.index(i)] if i in redrawn else one for i, one in enumerate(candidates)]
        notes = {"control": self.control, **described(candidates), "redrawn": redrawn}
        texts = [one.text for one in candidates]
        if self.control == "answers_only":
            texts = [self.reader.read(text) or "" for text in texts]
            notes["unparsed"] = texts.count("")
        if self.n == 1:
            notes["variant"] = "asked again with one reference"
        order = arranged(self.n, self.order, setting, query)
        shown = self.template.show(query, [(f"attempt {i + 1}", texts[j]) for i, j in enumerate(order)], setting, self.cap_tokens)
        if shown is None:
            return no_room(notes, candidates)
        notes |= {"order": order, "dropped_tokens": [shown.dropped[order.index(i)] for i in range(self.n)], "nonce": shown.nonce}
        (final,) = yield [Ask("aggregate", shown.said, params)]
        return Answer(final, candidates, None, notes)

    def unwanted(self, candidates: list[Completion]) -> list[int]:
        """Which samples are to be drawn once more."""
        texts, about = [one.text for one in candidates], described(candidates)
        repeated = [i for i, text in enumerate(texts) if text in texts[:i]]
        found = {"empty": about["empty"], "cut_off": about["cut_off"], "repeated": repeated}
        return sorted({i for kind in self.redraw for i in found[kind]})
