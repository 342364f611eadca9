"""The final number of an answer, by hand."""

import pytest

from components.rewards.final_number import FinalNumber


@pytest.mark.parametrize(
    ("mark", "answer", "solution", "right"),
    [
        ("#", "7*3=21 12+21=33 #33", "#33", True),
        ("#", "7*3=21 12+21=33 #32", "#33", False),
        ("#", "12+21=33", "#33", False),  # no mark: no final number
        ("#", "#33 #4", "#4", True),  # the last one counts
        ("#", "#4 and then 33", "#4", True),
        ("#", "#-12", "#-12", True),
        ("#", "#12", "#-12", False),
        ("#", "#", "#33", False),
        ("#", "#33", "33", False),  # a solution without a number verifies nothing
        ("####", "She has 5.\n#### 1,024", "#### 1024", True),
        ("####", "#### 0.50", "#### 0.5", True),
        ("####", "#### five", "#### 5", False),
        (None, "first 3, then it is 7.", "7", True),
        (None, "7, but first 3", "7", False),
        (None, "no number", "7", False),
    ],
)
def test_final_number(mark, answer, solution, right):
    assert FinalNumber(mark)(answer, solution) is right
