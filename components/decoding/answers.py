"""How a method that compares answers reads them, with the extraction of the evaluations (components/evals/extraction.py)."""

from __future__ import annotations

from components.contracts import UserError
from components.data.errors import choice
from components.evals.extraction import boxed, flexible_number, label_of, same_expression, same_number, strict_number

KINDS = ("number", "boxed", "label", "text")


class Reader:
    """What a text answers, None for nothing, and whether two answers are the same.

    answers: number (after `mark`, or the last one where mark is None), boxed (`\\boxed{...}`, compared as expressions; where there is none
    the last number), label (such as answer2 or true), or text (all of it).
    Raises UserError for another kind, and an empty mark.

    Example:
        >>> Reader("number", None).read("7 + 3 = 10"), Reader("number", "#### ").read("7 + 3 = 10")
        ('10', None)
    """

    def __init__(self, answers: str, mark: str | None) -> None:
        self.answers, self.mark = choice("decode.read.answers", answers, KINDS), mark
        if mark == "" or (mark is not None and answers != "number"):
            raise UserError(f"decode.read.mark: {mark!r}; null, or a text before the number with decode.read.answers=number")

    def read(self, text: str) -> str | None:
        if self.answers == "number":
            return flexible_number(text) if self.mark is None else strict_number(text, self.mark)
        if self.answers == "boxed":
            return boxed(text) or flexible_number(text)
        return label_of(text) if self.answers == "label" else text.strip() or None

    def same(self, answer: str, other: str) -> bool:
        if self.answers in ("number", "boxed"):
            return (same_number if self.answers == "number" else same_expression)(answer, other)
        return answer == other
