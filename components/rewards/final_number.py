"""Verifies an answer by its final number."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class FinalNumber:
    """Is the final number of an answer that of the solution? The verifier of reasoning recipes: exact match, nothing else is read.

    mark: what stands before the final number, such as `#` or GSM8K's `####`: the first number after its last occurrence counts, and an
    answer without it has none. None: the last number of the text.

    Example:
        >>> FinalNumber("#")("7*3=21 12+21=33 #33", "#33.0"), FinalNumber(None)("it is 1,024", "1024"), FinalNumber("#")("33", "#33")
        (True, True, False)
    """

    def __init__(self, mark: str | None) -> None:
        self.mark = mark

    def __call__(self, answer: str, solution: str) -> bool:
        """Whether both have a final number, and the same."""
        found = self.number(answer)
        return found is not None and found == self.number(solution)

    def number(self, text: str) -> Decimal | None:
        """The final number of a text; commas between its digits are left out. None where there is none."""
        if self.mark is not None:
            _, mark, text = text.rpartition(self.mark)
            found = NUMBER.match(text.strip()) if mark else None
        else:
            found = next(reversed([*NUMBER.finditer(text)]), None)
        return Decimal(found[0].replace(",", "")) if found else None
