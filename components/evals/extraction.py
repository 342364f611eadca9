"""What an answer says, read from its text: numbers, `\\boxed{}` expressions, labels of choices, code. Pure functions, the one place for it.

Rewards and evaluations read answers with the same functions. None is "the answer names nothing", which is not the same as a wrong answer.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
FAMILIES = ("true|false", "solution1|solution2", "|".join(f"answer{i}" for i in range(1, 6)), "|".join(f"ending{i}" for i in range(1, 5)),
            "option1|option2")  # fmt: skip
NUMBERED = FAMILIES[2]


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of `stops` in it; the whole of it where there is none.

    >>> cut("#### 5\\nQuestion: and then?", ("Question:", "</s>"))
    '#### 5\\n'
    """
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def final_number(text: str, mark: str | None) -> Decimal | None:
    """The number right after the last `mark`, or the last number of the text where mark is None; commas between digits are left out.

    >>> final_number("7*3=21 12+21=33 #33", "#"), final_number("it is 1,024.", None), final_number("33", "#")
    (Decimal('33'), Decimal('1024'), None)
    """
    if mark is None:
        found = next(reversed([*NUMBER.finditer(text)]), None)
    else:
        _, there, after = text.rpartition(mark)
        found = NUMBER.match(after.strip()) if there else None
    return Decimal(found[0].replace(",", "")) if found else None


def strict_number(text: str, mark: str) -> str | None:
    """What stands right after the first `mark`; with "#### " it is what GSM8K's own code reads: `#### (\\-?[0-9\\.\\,]+)`.

    >>> strict_number("She has 5.\\n#### 1,024", "#### "), strict_number("It is 5.", "#### ")
    ('1,024', None)
    """
    found = re.search(re.escape(mark) + r"(\-?[0-9\.\,]+)", text)
    return found[1] if found and re.search(r"\d", found[1]) else None


def flexible_number(text: str) -> str | None:
    """The last thing like a number, as `flexible-extract` of lm-evaluation-harness reads GSM8K; not what has no digit, such as `...`.

    >>> flexible_number("That is 3 + 4 = $7."), flexible_number("no idea ...")
    ('$7.', None)
    """
    found = next(reversed([*FLEXIBLE.finditer(text)]), None)
    return found[0] if found and re.search(r"\d", found[0]) else None


def plain_number(answer: str) -> str:
    """An answer without `,`, `$`, all up to a `#### ` and a last `.`, which lm-evaluation-harness does not compare.

    >>> plain_number("#### $1,024.")
    '1024'
    """
    return re.sub(r"\.$", "", re.sub(r"(?s)^.*#### ", "", answer).replace(",", "").replace("$", "").strip())


def same_number(answer: str, other: str) -> bool:
    """Whether two answers are equal: as decimals where both are some, else as texts.

    >>> same_number("18.00", "$18"), same_number("18", "81")
    (True, False)
    """
    a, b = plain_number(answer), plain_number(other)
    return a == b if (x := _decimal(a)) is None or (y := _decimal(b)) is None else x == y


def _decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def boxed(text: str) -> str | None:
    """What is inside the last `\\boxed{...}` or `\\fbox{...}`, braces matched; None for none, or one that never closes.

    >>> boxed(r"so \\boxed{1} or \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    found = next(reversed([*re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]), None)
    if found is None:
        return None
    depth = 1
    for i in range(found.end(), len(text)):
        if text[i - 1] != "\\" or text[i] not in "{}":  # \{ and \} are signs, such as those of a set
            depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[found.end() : i].strip()
    return None


_SPELLINGS = (  # LaTeX that means the same; after MATH's own comparison (Hendrycks et al. 2021, arXiv 2103.03874)
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|~|\\?\$", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\{?\\circ\}?|\\%|%|°", ""),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r" \1"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\frac(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\(le|ge|ne)q?(?![A-Za-z])", r"\\\1"),
    (r"(?<=\d),(?=\d{3}(?!\d))(?![^([]*[)\]])", ""),  # of thousands, not of pairs
    (r"^[A-Za-z]\w?\s*=\s*", ""),
    (r"[.\s]+$", ""),
)
_UNIT = re.compile(r"(?<=[\d}])\s+[A-Za-z][A-Za-z .]*(?:\^\{?[23]\}?)?$")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_MIXED = re.compile(r"(-?)(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_DECIMAL = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:/-?\d+)?")


def plain_expression(answer: str) -> str:
    """A mathematical answer in one spelling: a rational number as `p/q` in lowest terms, else LaTeX without what does not matter.

    >>> plain_expression(r"\\dfrac{2}{4}"), plain_expression("0.5"), plain_expression(r"x = 3\\sqrt2 \\text{ cm}")
    ('1/2', '1/2', '3\\\\sqrt{2}')
    """
    text = answer.strip()
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = re.sub(r"\s+", "", _UNIT.sub("", text.strip()))
    value = _rational(text)
    return text if value is None else str(value)


def _rational(text: str) -> Fraction | None:
    """The number that a text without blanks is: a decimal, a/b, \\frac{a}{b} or a mixed number."""
    try:
        if found := _MIXED.fullmatch(text):
            value = int(found[2]) + Fraction(int(found[3]), int(found[4]))
            return -value if found[1] else value
        if found := _FRACTION.fullmatch(text):
            value = Fraction(int(found[2]), int(found[3]))
            return -value if found[1] else value
        if _DECIMAL.fullmatch(text):
            above, _, below = text.partition("/")
            return Fraction(above) / Fraction(below or 1)
    except ZeroDivisionError:
        return None
    return None


def same_expression(answer: str, other: str) -> bool:
    """Whether two answers are one expression in one spelling. Equal expressions of other forms, such as x+1 and 1+x, are not seen.

    >>> same_expression(r"\\frac12", "0.5"), same_expression("(1, 2)", "(1,2)"), same_expression("1,200", "1200")
    (True, True, True)
    """
    return plain_expression(answer) == plain_expression(other)


def family_of(label: str) -> str | None:
    """The labels that an answer may name, as a regex, where `label` is one of them.

    >>> family_of("option2")
    'option1|option2'
    """
    return next((family for family in FAMILIES if re.fullmatch(family, label)), None)


def label_of(answer: str) -> str | None:
    """The label that a right answer is, or else names first; None for neither.

    >>> label_of("the correct answer is answer3"), label_of("false"), label_of("Oslo")
    ('answer3', 'false', None)
    """
    found = re.search("|".join(FAMILIES), answer)
    return found[0] if found else None


def picked(text: str, family: str, matcher: str) -> str:
    """The first label of the family in a text, '' for none. lenient: of answer1 to answer5 its number will do.

    >>> picked("I say answer2, not answer1", NUMBERED, "strict"), picked("it is 4", NUMBERED, "lenient")
    ('answer2', '4')
    """
    found = re.search(family, text)
    if found is None and matcher == "lenient" and family == NUMBERED:
        found = re.search("[1-5]", text)
    return found[0] if found else ""


def code_block(text: str) -> str | None:
    """The first fenced block that is Python or says no language, without its fence; one that never closes goes to the end. None for none.

    >>> code_block("Sure:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = re.finditer(r"^```[ \t]*(\w*)[^\n]*\n(.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE)
    return next((block[2] for block in blocks if block[1].lower() in ("", "python", "python3", "py")), None)
