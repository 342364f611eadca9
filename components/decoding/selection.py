"""What options of the group `decode` share that show a model its samples and let it name one of them."""

from __future__ import annotations

import re

from components.data.errors import choice
from components.decoding.rounds import Answer, Ask, Candidates, Query, Rounds, Sampler, Setting, arranged, described, no_room, seed_of
from components.decoding.templates import Template

ORDERS = ("shuffle", "given")


class Selection(Candidates):
    """n samples, then one call that names a number from 1 to n. n + 1 calls in two rounds.

    n: samples. sampler: draws them. final: decodes the choice. template: asks for it. order: in which the samples are shown.
    Notes: order, dropped_tokens of each sample where the context would overflow, unparsed: 1 where the reply names no sample and the first
    one of all counts.
    """

    def __init__(self, n: int, sampler: Sampler, final: Sampler, template: Template, order: str) -> None:
        super().__init__(n, sampler, least=2)
        self.final, self.template, self.order = final, template, choice("decode.order", order, ORDERS)

    def answer(self, query: Query, setting: Setting) -> Rounds:
        candidates = yield self.sampled(query, setting)
        order, notes = arranged(self.n, self.order, setting, query), described(candidates)
        shown = self.template.show(query, [(f"attempt {i + 1}", candidates[j].text) for i, j in enumerate(order)], setting)
        if shown is None:
            return no_room(notes, candidates)
        seed = seed_of(setting.seed, query.id, "select")
        (reply,) = yield [Ask("select", shown.said, self.final.params(setting.max_new_tokens, seed))]
        number = named(reply.text, self.n)
        chosen = 0 if number is None else order[number - 1]
        dropped = [shown.dropped[order.index(i)] for i in range(self.n)]
        notes |= {"order": order, "dropped_tokens": dropped, "nonce": shown.nonce, "unparsed": int(number is None)}
        return Answer(candidates[chosen], candidates, chosen, notes)


def named(reply: str, n: int) -> int | None:
    """The last number from 1 to n in a reply.

    >>> named("Not 1. Attempt 3, for its 12 steps.", 3), named("none of them", 3)
    (3, None)
    """
    numbers = [int(found) for found in re.findall(r"(?<![\d.])\d+(?!\.?\d)", reply)]
    return next((number for number in reversed(numbers) if 1 <= number <= n), None)
