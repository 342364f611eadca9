"""Verifies an answer by its final number."""

from __future__ import annotations

from components.evals.extraction import final_number


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
        found = final_number(answer, self.mark)
        return found is not None and found == final_number(solution, self.mark)
