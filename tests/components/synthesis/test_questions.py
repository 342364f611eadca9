"""Blocks of questions: the tolerant parser, its inverse, replies that are cut off anywhere, adherence to the offered concepts."""

from __future__ import annotations

import random

import pytest

from components.synthesis.concepts import parse_concepts
from components.synthesis.questions import Question, Reply, adherence, parse_questions, render_questions, status_counts

REFUSAL = "The article is not suitable for questions."
TEXTS = [
    "Find x with 3x + 5 = 11.", "A train leaves at 7:30 (local time).\nIt travels 5.5 h.\n\nWhen does it arrive?",
    "Show: $a < b$ and b > c, d?",
    "Selected numbers are 1; 2; 3. Compute $\\sum_{i} i^2$.", "Origin and end: how far?", "1. Add.\n2. Multiply (a, b: given).",
]  # fmt: skip
CONCEPTS = ["Linear equations", "Powers (squares, cubes: by hand)", "a, b and c", "Law of cosines", "2.5 % rule", "Speed: distance, time"]
ONE = Question("What is 2+2?", "Primary School", "new", ("Addition", "Numbers"))


def random_questions(source):
    return tuple(
        Question(
            source.choice(TEXTS), source.choice([None, "High School"]), source.choice([None, "new", "original"]),
            tuple(source.sample(CONCEPTS, source.choice([0, 2, 3]))),
        )
        for _ in range(source.randint(1, 5))
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_round_trip(seed):
    questions = random_questions(random.Random(seed))
    assert parse_questions(render_questions(questions), REFUSAL) == Reply("parsed", questions, 0)


@pytest.mark.parametrize("seed", range(12))
def test_cut_at_every_character(seed):
    """Never raises, and the block that was cut off is dropped, whatever is left of it."""
    questions = random_questions(random.Random(seed))
    text = render_questions(questions)
    for end in range(len(text)):
        cut = parse_questions(text[:end], REFUSAL)
        whole = text[:end].count("</Q") - (not text[:end].endswith(">") and text[:end].rfind("</Q") > text[:end].rfind(">"))
        assert cut.questions == questions[: len(cut.questions)] and len(cut.questions) == whole and not cut.malformed
        open_block = text[:end].count("<Q") > whole and text[:end].rfind(">") > text[:end].rfind("<Q")
        assert cut.status == ("truncated" if open_block else "parsed" if whole else "malformed"), text[:end]


@pytest.mark.parametrize(
    "block",
    [
        "Selected concepts: Addition; Numbers\nSchool level: Primary School\nOrigin: newly created\nQuestion: What is 2+2?",
        "Selected Concepts: [Addition, Numbers]\nQuestion: What is 2+2?\nSchool Level: [Primary School]\nOrigin: [Newly created question]",
        "**Selected Concepts:**\n1. Addition\n2. Numbers\n**School level:** Primary School\n**Origin:** new\n**Question:** What is 2+2?",
        "<selected_concepts>Addition, Numbers</selected_concepts><level>Primary School</level><origin>newly_created</origin>What is 2+2?",
        "<newly_created_question>\nWhat is 2+2?\n</newly_created_question>\nLevel: Primary School\nKey concepts: Addition, Numbers",
        "<newly created>\nWhat is 2+2?\nLevel: Primary School.\nConcepts:\n- Addition\n- Numbers.",
        "Key concepts:\nAddition\nNumbers\nOrigin: Created\nLevel: Primary School\nWhat is 2+2?",
    ],
)
def test_what_models_do_to_the_form(block):
    assert parse_questions(f"Here you are:\n<Q1>\n{block}\n</Q1>\nGood luck!", REFUSAL) == Reply("parsed", (ONE,), 0)


@pytest.mark.parametrize("spelling", ["original", "Original Question", "[original]", "ORIGINAL"])
def test_both_origins(spelling):
    assert parse_questions(f"<Q1>Origin: {spelling}\nQuestion: x?</Q1>", REFUSAL).questions[0].origin == "original"
    assert parse_questions("<Q1>Origin: from a book\nQuestion: x?</Q1>", REFUSAL).questions[0].origin is None


def test_tags_that_are_spelled_otherwise():
    texts = [question.text for question in parse_questions("<q1>a?</q1><Q2>b?</Q><Q3>c?<Q4>d?</Q9>", REFUSAL).questions]
    assert texts == ["a?", "b?", "c?", "d?"]  # the third was not closed, but another one follows


@pytest.mark.parametrize(
    "text, status, questions, malformed",
    [
        ("", "malformed", 0, 0),
        ("the ARTICLE is not\nsuitable for questions.", "refused", 0, 0),
        (f"<think>{REFUSAL}</think><Q1>x?</Q1>", "parsed", 1, 0),
        ("<think><Q1>x?</Q1>", "malformed", 0, 0),
        ("<Q1></Q1>", "malformed", 0, 1),
        ("<Q1>Level: College\nQuestion:</Q1><Q2>x?</Q2>", "parsed", 1, 1),
        ("<Q1>x?</Q1><Q2>y", "truncated", 1, 0),
    ],
)
def test_status(text, status, questions, malformed):
    found = parse_questions(text, REFUSAL)
    assert (found.status, len(found.questions), found.malformed) == (status, questions, malformed)


def test_nothing_raises_on_noise():
    source = random.Random(0)
    pieces = [
        "<Q1>",
        "</Q1>",
        "<Q2>",
        "\n",
        "Question:",
        "Origin:",
        "Level:",
        "Concepts:",
        "- ",
        ";",
        ",",
        "(",
        "]",
        "<new>",
        "<level>",
        "x?",
        "\x00",
    ]
    for _ in range(3000):
        found = parse_questions("".join(source.choices(pieces, k=source.randint(0, 25))), REFUSAL)
        assert all(question.text == question.text.strip() != "" for question in found.questions)


def test_adherence_compares_normal_forms():
    questions = [Question("x?", None, None, ("linear EQUATIONS.", "Made up")), Question("y?", None, None, ()), ONE]
    assert adherence(questions, ["Linear equations", "addition"], {}) == (2, 4)
    assert adherence(questions, ["Linear equations", "addition"], {"numbers": "addition"}) == (3, 4)


def test_status_counts():
    replies = [parse_questions(text, REFUSAL) for text in ("<Q1>x?</Q1>", "<Q1>x?</Q1>", "<Q1>x", "", REFUSAL)]
    assert status_counts(replies) == {"parsed": 2, "refused": 1, "malformed": 1, "truncated": 1}
    assert status_counts([parse_concepts("<topic>", REFUSAL)]) == {"parsed": 0, "refused": 0, "malformed": 0, "truncated": 1}
