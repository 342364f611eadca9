"""Questions parsed from the numbered blocks that a model writes (SynthLLM, sec. 2.3): one form for the levels 1 to 3.

    <Q1>
    Selected concepts:
    - Linear equations
    - Powers (squares, cubes: by hand)
    School level: High School
    Origin: newly created
    Question: Solve ... for x.
    </Q1>

Every field but the question may be missing; their order does not matter, and the question may have several lines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from components.synthesis.concepts import Status, answer_part, normal_name, same_words

Origin = Literal["original", "new"]
_OPENING = re.compile(r"<\s*Q\s*(\d+)\s*>", re.IGNORECASE)
_CLOSING = re.compile(r"<\s*/\s*Q\s*\d*\s*>", re.IGNORECASE)
_FIELD = re.compile(
    r"^[ \t]*[*_#\[<(]*(?P<name>(?:selected |key )*concepts?|(?:school |education(?:al)? )?level|(?:question )?origin|question(?: text)?)"
    r"[\])>*_]*[ \t]*:[*_]*[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_TAG = re.compile(
    r"<\s*(?P<name>level|origin|question|concepts?|key_concepts?|selected_concepts?)\s*>(?P<value>.*?)<\s*/\s*(?P=name)\s*>",
    re.I | re.S,
)
_ORIGIN_TAG = re.compile(r"<\s*/?\s*(?P<value>(?:original|newly[ _-]?created|new|created)(?:[ _-]question)?)\s*/?\s*>", re.IGNORECASE)
_ORIGINS: dict[str, Origin] = {"original": "original", "existing": "original", "new": "new", "newly created": "new", "created": "new"}
_MARK = re.compile(r"(?:[-*•]|\d+[.)])\s+")


@dataclass(frozen=True)
class Question:
    """One question. concepts: those that the model says it combined, as written; None or empty where a reply does not say."""

    text: str
    school_level: str | None
    origin: Origin | None
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """What was found in one reply. malformed: closed blocks without a question. A last block that was cut off is dropped."""

    status: Status
    questions: tuple[Question, ...]
    malformed: int


def parse_questions(text: str, refusal: str) -> Reply:
    """Parse the reply of a model. Never raises.

    A block that another one follows counts as closed. The last one without its closing tag was cut off: it is dropped and the status is
    "truncated", with the questions before it.

    Args:
        text: the whole reply.
        refusal: the sentence that the prompt asks for when the document is not suitable.
    """
    body = answer_part(text)
    openings = list(_OPENING.finditer(body))
    if not openings:
        refused = bool(refusal) and same_words(refusal) in same_words(body)
        return Reply("refused" if refused else "malformed", (), 0)
    questions, malformed, cut = [], 0, False
    for place, opening in enumerate(openings):
        end = openings[place + 1].start() if place + 1 < len(openings) else None
        block = body[opening.end() : end]
        closing = _CLOSING.search(block)
        if closing is None and end is None:
            cut = True
            break
        question = _question(block[: closing.start()] if closing else block)
        questions += [question] if question else []
        malformed += question is None
    status: Status = "truncated" if cut else ("parsed" if questions else "malformed")
    return Reply(status, tuple(questions), malformed)


def render_questions(questions: Iterable[Question]) -> str:
    """Write what `parse_questions` reads: the inverse for stripped texts without our tags or field names at the start of a line."""
    blocks = []
    for number, question in enumerate(questions, 1):
        lines = ["Selected concepts:", *(f"- {name}" for name in question.concepts)] if question.concepts else []
        lines += [f"School level: {question.school_level}"] if question.school_level else []
        lines += [f"Origin: {'newly created' if question.origin == 'new' else 'original'}"] if question.origin else []
        blocks.append("\n".join([f"<Q{number}>", *lines, f"Question: {question.text}", f"</Q{number}>"]))
    return "\n".join(blocks)


def adherence(questions: Iterable[Question], offered: Iterable[str], aliases: Mapping[str, str]) -> tuple[int, int]:
    """(concepts that were in the offered list, concepts that were named) over all questions, by their normal forms."""
    known = {normal_name(name, aliases) for name in offered}
    named = [normal_name(name, aliases) in known for question in questions for name in question.concepts]
    return sum(named), len(named)


def status_counts(results: Iterable[object]) -> dict[str, int]:
    """How many replies had each status; results: `Reply` or `Extraction`."""
    found = Counter(str(getattr(result, "status", "")) for result in results)
    return {status: found[status] for status in ("parsed", "refused", "malformed", "truncated")}


def _question(block: str) -> Question | None:
    """The question of a block, None when there is no text."""
    fields: dict[str, str] = {}
    origin = _ORIGIN_TAG.search(block)
    if origin:
        fields["origin"] = origin["value"]
        block = block[: origin.start()] + block[origin.end() :]
        block = _ORIGIN_TAG.sub("", block)  # its closing tag
    for tag in _TAG.finditer(block):
        fields.setdefault(_kind(tag["name"]), tag["value"].strip())
    rest = _TAG.sub("", block)
    marks = list(_FIELD.finditer(rest))
    lead = rest[: marks[0].start()] if marks else rest
    for mark, after in zip(marks, [*marks[1:], None]):
        kind, value = _kind(mark["name"]), rest[mark.end() : after.start() if after else None].strip()
        if kind in ("level", "origin"):  # of one line; what follows is a question without a name
            value, _, more = value.partition("\n")
            lead += "\n" + more
        fields.setdefault(kind, value)
    text = fields.get("question") or lead.strip()
    if not text:
        return None
    return Question(text, _line(fields.get("level")), _origin(fields.get("origin")), _names(fields.get("concepts", "")))


def _kind(name: str) -> str:
    kinds = (("concept", "concepts"), ("level", "level"), ("origin", "origin"))
    return next((kind for word, kind in kinds if word in name.lower()), "question")


def _line(value: str | None) -> str | None:
    """First line of a field without brackets or marks, None when it is empty."""
    return (value or "").strip().split("\n")[0].strip(" .*_[]<>") or None


def _origin(value: str | None) -> Origin | None:
    """ "original" or "new", whichever way it is spelled."""
    plain = " ".join(re.sub(r"[-_]", " ", (_line(value) or "").lower()).removesuffix("question").replace(" question", "").split())
    return _ORIGINS.get(plain)


def _names(value: str) -> tuple[str, ...]:
    """Names of a list, one a line or parted by semicolons, or in one line by commas outside brackets."""
    lines = [line.strip() for line in value.split("\n") if line.strip()]
    marked = [_MARK.match(line) for line in lines]
    if len(lines) > 1 or any(marked):
        parts = [line[mark.end() :] if mark else line for line, mark in zip(lines, marked)]
    else:
        parts = _split(value.strip().removeprefix("[").removesuffix("]"))
    return tuple(name for part in parts if (name := part.strip().rstrip(" .,;:")))


def _split(line: str) -> list[str]:
    """Parts between semicolons, else between commas, that stand outside brackets."""
    found: dict[str, list[str]] = {}
    for sign in ";,":
        depth, parts = 0, [""]
        for character in line:
            depth = max(depth + (character in "([{") - (character in ")]}"), 0)
            if character == sign and not depth:
                parts.append("")
            else:
                parts[-1] += character
        found[sign] = parts
    return found[";"] if len(found[";"]) > 1 else found[","]
