"""Prompts that show a model its own earlier answers: fenced, so that no answer can end its fence, and cut to the room that there is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from components.contracts import UserError
from components.decoding.rounds import Query, Said, Setting, seed_of

FIELD = re.compile(r"\{(query|candidates|n|label|nonce)\}")
Block = tuple[str, str]  # what it is, such as `attempt 2`, and its text


@dataclass(frozen=True)
class Shown:
    """A prompt with blocks. dropped: tokens cut from the front of each block."""

    said: Said
    nonce: str
    dropped: list[int]


class Template:
    """A prompt with the query and blocks of text.

    text: has {query} and {candidates} once each, and {n}, the number of blocks, if need be. before, after: what stands round a block, with
    {label}, what it is, and {nonce}, 16 hex digits that occur neither in the query nor in a block; with a nonce in both, blocks can be
    read back whatever stands in them. Raises UserError for a text without its fields.
    """

    def __init__(self, text: str, before: str, after: str) -> None:
        for name in ("query", "candidates"):
            if text.count(f"{{{name}}}") != 1:
                raise UserError(f"decode.template.text: {text[:60]!r}...; it needs {{{name}}} once")
        self.text, self.before, self.after = text, before, after

    def fill(self, query: str, blocks: Sequence[Block], nonce: str) -> str:
        """The prompt. Braces in what is filled in stay as they are."""
        parts = [
            filled(self.before, label=label, nonce=nonce) + text + filled(self.after, label=label, nonce=nonce) for label, text in blocks
        ]
        return filled(self.text, query=query, candidates="".join(parts), n=str(len(blocks)), nonce=nonce)

    def parse(self, text: str, nonce: str) -> list[Block]:
        """The blocks of a prompt, in their order."""
        before, after = (
            self._pattern(part, nonce, group) for part, group in ((self.before, r"(?P<label>.+?)"), (self.after, "(?P=label)"))
        )
        return [(found["label"], found["text"]) for found in re.finditer(rf"{before}(?P<text>.*?){after}", text, re.DOTALL)]

    def _pattern(self, part: str, nonce: str, label: str) -> str:
        return re.escape(filled(part, nonce=nonce)).replace(re.escape("{label}"), label)

    def show(self, query: Query, blocks: Sequence[Block], setting: Setting, cap_tokens: int | None = None) -> Shown | None:
        """The prompt, with blocks of at most cap_tokens tokens, and of fewer where the context would overflow; None where nothing fits.

        Longer blocks lose their front, since conclusions stand at the end. All are cut to one length, so that the longest lose first.
        """
        said = [query.text, *(text for _, text in blocks)]
        nonces = (f"{seed_of(setting.seed, query.id, 'nonce', attempt):016x}" for attempt in count())
        nonce = next(one for one in nonces if not any(one in text for text in said))
        lengths = [len(setting.encode(text)) for _, text in blocks]

        def cut(cap: int) -> list[Block]:
            return [(label, setting.tail(text, cap)) for label, text in blocks]

        def prompt(cap: int) -> Said:
            return query.reworded(self.fill(query.text, cut(cap), nonce))

        def fits(cap: int) -> bool:
            return setting.limit is None or setting.count(prompt(cap)) + setting.max_new_tokens <= setting.limit

        longest = max(lengths, default=0)
        cap = longest if cap_tokens is None else min(cap_tokens, longest)
        if not fits(cap):
            low, high = 0, cap  # fits(high) is false; the largest that fits, where more tokens never need less room
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            if low == 0:
                return None
            cap = low
        return Shown(prompt(cap), nonce, [max(0, length - cap) for length in lengths])


def filled(pattern: str, **fields: str) -> str:
    """The pattern with the fields that are given, in one pass.

    >>> filled("{query} {n}", query="{n}?")
    '{n}? {n}'
    """
    return FIELD.sub(lambda found: fields.get(found[1], found[0]), pattern)
