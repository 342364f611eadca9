"""The words of a synthesis: one prompt for each kind of call, filled in one pass, so that braces in a document stay as they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from components.errors import UserError
from components.synthesis.concepts import Concepts

FIELDS: dict[str, tuple[str, ...]] = {
    "compose": ("subject", "style"),
    "rate": ("document",),
    "extract": ("document",),
    "level1": ("n", "document"),
    "level2": ("n", "concepts", "document"),
    "level2_drawn": ("n", "concepts", "document"),
    "level3": ("n", "concepts", "document"),
    "answer": ("question",),
}
_FIELD = re.compile(r"\{(" + "|".join(sorted({field for fields in FIELDS.values() for field in fields})) + r")\}")


class Prompts:
    """Prompts of the stages (SynthLLM, app. A; the wording is ours). The instruction comes first, so that calls share a prefix.

    Args:
        refusal: what a model is to say of a document that teaches nothing, or suits no question.
        compose: asks for a document of a `{subject}` in a `{style}`. rate: for a rating from 1 to 10 of a `{document}`.
        extract: for the topics and key concepts of a `{document}`. level1: for `{n}` questions on a `{document}`.
        level2: for questions on 2 or 3 of its `{concepts}`, chosen by the model; level2_drawn: on combinations that are given.
        level3: on `{concepts}` of several documents, which stand in `{document}`. answer: for the answer to a `{question}`.

    Raises UserError for a prompt without one of its fields, or without `{n}` where it says how many.
    """

    def __init__(
        self, refusal: str, compose: str, rate: str, extract: str, level1: str, level2: str, level2_drawn: str, level3: str, answer: str
    ) -> None:
        self.refusal = refusal
        self.texts = {
            "compose": compose, "rate": rate, "extract": extract, "level1": level1, "level2": level2, "level2_drawn": level2_drawn,
            "level3": level3, "answer": answer,
        }  # fmt: skip
        for name, text in self.texts.items():
            for field in FIELDS[name]:
                if field != "n" and text.count(f"{{{field}}}") != 1:
                    raise UserError(f"task.prompts.{name}: {text[:60]!r}...; it needs {{{field}}} once")

    def fill(self, name: str, **fields: str) -> str:
        """The prompt of a kind of call; a sentence about the refusal is filled in as {refusal}."""
        text = self.texts[name].replace("{refusal}", self.refusal)
        return _FIELD.sub(lambda found: fields.get(found[1], found[0]), text)

    def address(self, name: str) -> str:
        """Name and 8 hex digits of its words: what a row says it was asked by.

        >>> Prompts("", *("{subject}{style}", "{document}", "{document}", "{document}", "{concepts}{document}", "{concepts}{document}",
        ...     "{concepts}{document}", "{question}")).address("rate")
        'rate-9c9a4d4d'
        """
        words = f"{self.texts[name]}\0{self.refusal}".encode()
        return f"{name}-{hashlib.blake2b(words, digest_size=4).hexdigest()}"


def listed(names: Sequence[str]) -> str:
    """Names as a list, one a line."""
    return "\n".join(f"- {' '.join(name.split())}" for name in names)


def outline(concepts: Concepts) -> str:
    """Topics with their key concepts under them."""
    return "\n".join(f"{' '.join(topic.split())}:\n{listed(names)}" for topic, names in concepts.items() if names)


def combinations_listed(combinations: Sequence[Sequence[str]]) -> str:
    """Which concepts each question is to combine: `Q1: a; b`."""
    return "\n".join(f"Q{number}: {'; '.join(' '.join(name.split()) for name in names)}" for number, names in enumerate(combinations, 1))


def joined(documents: Sequence[str]) -> str:
    """Several documents, numbered where there are more than one."""
    if len(documents) == 1:
        return documents[0]
    return "\n\n".join(f"[Document {number}]\n{text}" for number, text in enumerate(documents, 1))
