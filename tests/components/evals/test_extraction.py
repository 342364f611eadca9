"""Answers read from texts, by hand: numbers, expressions, code; published solutions with known flags where they are at hand."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest

from components.evals.extraction import (
    boxed,
    code_block,
    cut,
    final_number,
    flexible_number,
    plain_expression,
    plain_number,
    same_expression,
    same_number,
    strict_number,
)  # fmt: skip

EXCERPT = Path(__file__).parent / "files" / "model_solutions.jsonl"
DATA = os.environ.get("PATCHBAY_DATA")  # a folder with gsm8k/ and humaneval/ as their authors publish them
PUBLISHED = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458, "175b_verification": 742}


def agree_with_flags(path: Path, models: dict[str, int]) -> None:
    """Two readings, the number after the last `A:` as a decimal and as GSM8K's own code reads it, give every flag."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for model, right in models.items():
        flags = [row[model]["is_correct"] for row in rows]
        read = [(row[model]["solution"], row["ground_truth"]) for row in rows]
        numbers = [(final_number(text, "A:"), final_number(gold, "A:")) for text, gold in read]
        assert [a is not None and a == b for a, b in numbers] == flags and sum(flags) == right, model
        strict = [[strict_number(text[text.rfind("A: ") :], "A: ") for text in pair] for pair in read]
        assert [a is not None and b is not None and same_number(a, b) for a, b in strict] == flags, model


def test_solutions_agree_with_their_flags():
    agree_with_flags(EXCERPT, {"small": 2, "large": 3})


@pytest.mark.skipif(DATA is None, reason="PATCHBAY_DATA names no folder with gsm8k/example_model_solutions.jsonl")
def test_published_solutions_agree_with_their_flags():
    agree_with_flags(Path(str(DATA)) / "gsm8k" / "example_model_solutions.jsonl", PUBLISHED)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7", "7"),
        ("#### -1,024.50", "-1,024.50", "-1,024.50"),
        ("#### 18\n#### 20", "18", "20"),  # the first mark, the last number
        ("#### $18", None, "$18"),
        ("####18", None, "18"),
        ("The answer is 18.", None, "18."),
        ("It costs $1,200 in all", None, "$1,200"),
        ("7 and then ...", None, None),  # the last thing like a number has no digit, and there lm-evaluation-harness is wrong too
        ("5-3", None, "-3"),
        ("#### .", None, None),
        ("none", None, None),
        ("", None, None),
    ],
)
def test_numbers_of_answers(text, strict, flexible):
    assert (strict_number(text, "#### "), flexible_number(text)) == (strict, flexible)


@pytest.mark.parametrize(
    ("answer", "right", "same"),
    [("18", "18", True), ("18.", "18", True), ("$18.00", "18", True), ("#### 18", "18", True), ("1,024", "1024", True),
     ("0.50", ".5", True),
     ("-0", "0", True), ("18", "-18", False), ("1.2.3", "1.2.3", True), ("1.2.3", "1.23", False), ("", "0", False), ("NaN", "NaN", True),
     ("Infinity", "Infinity", True), ("1e2", "100", True)],
)  # fmt: skip
def test_equal_numbers(answer, right, same):
    assert same_number(answer, right) is same is same_number(right, answer)


def test_plain_numbers():
    assert plain_number("so\n#### $1,000.") == "1000" and plain_number("7..") == "7."  # one point only, as in lm-evaluation-harness
    assert final_number("a #1 b #-2.5 c", "#") == Decimal("-2.5") and final_number("#", "#") is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{42}", "42"),
        (r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}} at last", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \mid x > 0 \right\}}", r"\left\{ x \mid x > 0 \right\}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{\text{no}", None),  # cut off before it closes
        ("42", None),
        (r"\boxed{}", ""),
    ],
)
def test_what_is_in_the_box(text, inside):
    assert boxed(text) == inside


SAME = [
    (r"\frac12", "0.5"), (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac{2}{4}", "1/2"), (r"-\frac{3}{4}", "-0.75"), (r"\frac{-3}{4}", "-3/4"),
    (r"1\frac{1}{2}", "1.5"), ("1,000,000", "1000000"), ("(1, 2)", "(1,2)"), (r"\left(1, 2\right)", "(1,2)"), (r"\sqrt2", r"\sqrt{2}"),
    (r"3\sqrt{5}", r"3 \sqrt 5"), ("x = 7", "7"), ("7.", "7"), (r"\$12", "12"), (r"50\%", "50"), (r"90^\circ", "90"), (r"90^{\circ}", "90"),
    (r"12\text{ cm}", "12"), (r"12 \text{ cm}^2", "12"), (r"12\mbox{ inches}", "12"), (r"5 meters", "5"), (r"x \le 3", r"x\leq 3"),
    (r"2 \times 3^4", r"2\cdot 3^4"), (r"\text{even}", "even"), (".25", "0.25"), ("3.0", "3"), ("4/6", r"\frac{2}{3}"), (r"2\!\,3", "23"),
    (r"\frac{x}2", r"\frac{x}{2}"), ("007", "7"), (r"\frac 1 2", "1/2"),
]  # fmt: skip
DIFFERENT = [
    ("1/2", "1/3"), ("(1,2)", "(2,1)"), ("(1,200)", "1200"), ("(1,2)", "[1,2]"), (r"\sqrt{2}", "2"), ("-7", "7"),
    ("x+1", "x-1"), ("1/0", "0"),
    (r"\frac{1}{0}", r"\frac{2}{0}"), ("3x", "3"), ("even", "odd"), ("", "0"), ("12", "1.2"), (r"x<3", r"x\le 3"), ("2^3", "23"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "right", "same"), [*((*pair, True) for pair in SAME), *((*pair, False) for pair in DIFFERENT)])
def test_equal_expressions(answer, right, same):
    assert same_expression(answer, right) is same is same_expression(right, answer), (plain_expression(answer), plain_expression(right))


@pytest.mark.parametrize("answer", [pair[0] for pair in SAME + DIFFERENT])
def test_a_plain_expression_stays_as_it_is(answer):
    assert plain_expression(plain_expression(answer)) == plain_expression(answer)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```\nand ```y```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("```bash\nls\n```\n```Python\nx = 1\n```", "x = 1\n"),
        ("x = 1", None),
        ("```js\nx\n```", None),
    ],
)
def test_code_blocks(text, code):
    assert code_block(text) == code


def test_a_text_ends_before_its_first_stop():
    assert cut("a b c", ("c", "b")) == "a " and cut("abc", ()) == "abc" == cut("abc", ("x",)) and cut("bc", ("b",)) == ""
