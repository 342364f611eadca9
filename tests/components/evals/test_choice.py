"""eval=choice: labels read from answers, both matchers, what is asked under which task, counts of answers that name nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from exams import TOKENIZER, Scripted, exam

from components.contracts import UserError
from components.evals.choice import Choice
from components.evals.extraction import FAMILIES, family_of, label_of, picked

CONF = Path(__file__).parents[3] / "conf" / "eval" / "choice.yaml"
QUESTIONS = {
    "boolq": [("is it true or false 1? ", "true"), ("is it true or false 2? ", "false"), ("is it true or false 3? ", "true")],
    "obqa": [("answer1 or answer2 1? ", "answer2"), ("answer1 or answer2 2? ", "the correct answer is answer1")],
}
REPLIES = {
    "is it true or false 1? ": "the correct answer is true", "is it true or false 2? ": "true, not false", "is it true or false 3? ": "yes",
    "answer1 or answer2 1? ": "it is 2", "answer1 or answer2 2? ": "answer1.",
}  # fmt: skip


def option(**changes: Any) -> Choice:
    node = yaml.safe_load(CONF.read_text())
    del node["_target_"]
    return Choice(**{**node, **changes})


def asked(chosen=None, **changes):
    """(rows, figures, line) of the scripted replies; `chosen` collects which task was chosen before each reply."""
    now = []
    engine = Scripted(lambda prompt: REPLIES[prompt])
    if chosen is not None:
        engine = Scripted(lambda prompt: chosen.append((now[-1], prompt)) or REPLIES[prompt])
    evaluation = option(**changes)
    rows = list(evaluation.rows(exam(engine, questions=lambda: {k: iter(v) for k, v in QUESTIONS.items()}, choose=now.append)))
    return rows, *evaluation.summary(rows)


def scores(rows):
    return {task: sorted(row.values["score"] for row in rows if row.task == task) for task in QUESTIONS}


def test_strict_counts_the_first_label_alone():
    rows, figures, line = asked()
    assert scores(rows) == {"boolq": [0.0, 0.0, 1.0], "obqa": [0.0, 1.0]}
    unread = {"boolq/unparsable": 1.0, "obqa/unparsable": 1.0, "unparsable": 2.0}
    assert figures == unread | {"boolq/commonest_label": 2 / 3, "obqa/commonest_label": 1 / 2, "commonest_label": (2 / 3 + 1 / 2) / 2}
    assert line == "matcher strict; 2 of 5 answers name no label (boolq 1, obqa 1); always the commonest label: 58.3%"
    assert {row.record["picked"] for row in rows} == {"true", "", "answer1"}


def test_lenient_takes_a_number_for_an_answer():
    rows, figures, line = asked(matcher="lenient")
    assert scores(rows) == {"boolq": [0.0, 0.0, 1.0], "obqa": [1.0, 1.0]}
    assert (figures["boolq/unparsable"], figures["obqa/unparsable"], figures["unparsable"]) == (1.0, 0.0, 1.0) and "lenient" in line
    assert option(matcher="lenient").score(option().items(exam(questions=lambda: QUESTIONS))[3], "it is 1") == 0.0


def test_each_question_is_asked_under_its_task_with_the_prompt_as_it_is():
    seen: list = []
    asked(chosen=seen)
    assert [task for task, _ in seen] == ["boolq"] * 3 + ["obqa"] * 2
    assert all(prompt in dict(QUESTIONS[task]) for task, prompt in seen)
    (first, *_) = option().items(exam(questions=lambda: QUESTIONS))
    assert list(first.prompt) == [TOKENIZER.eot_id, *TOKENIZER.encode("is it true or false 1? ")]


def test_items_limits_each_task():
    rows, _, _ = asked(items=1)
    assert [row.task for row in rows] == ["boolq", "obqa"]


@pytest.mark.parametrize(
    ("label", "family"), [("true", 0), ("solution2", 1), ("answer5", 2), ("ending4", 3), ("option1", 4), ("answer6", None), ("Oslo", None)]
)
def test_families(label, family):
    assert family_of(label) == (None if family is None else FAMILIES[family])
    if family is not None:
        assert label_of(f"the correct answer is {label}") == label == picked(f"so {label} is it", FAMILIES[family], "strict")


def test_a_label_of_another_family_is_no_answer():
    assert picked("answer1", FAMILIES[0], "strict") == "" == picked("1", FAMILIES[1], "lenient") == picked("3", FAMILIES[2], "strict")


def test_refusals():
    with pytest.raises(UserError, match="choice cannot ask task maths, where a right answer is '42'"):
        option().items(exam(questions=lambda: {"maths": [("6*7=", "42")]}))
    with pytest.raises(UserError, match=r"eval.matcher: 'strikt' is not one of strict, lenient; did you mean 'strict'"):
        option(matcher="strikt")
    for key in ("items", "max_new_tokens"):
        with pytest.raises(UserError, match=f"eval.{key}: 0; must be a whole number of at least 1"):
            option(**{key: 0})
    with pytest.raises(UserError, match=r"eval.max_new_tokens: 56 tokens; this engine takes at most 40"):
        option().items(exam(questions=lambda: QUESTIONS, limit=40))
