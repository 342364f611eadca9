"""eval=gsm8k: what is asked, with and without examples; scripted answers read in both ways; figures by hand; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from exams import TOKENIZER, Scripted, exam

from components.contracts import Completion, UserError
from components.evals.gsm8k import Gsm8k

CONF = Path(__file__).parents[3] / "conf" / "eval" / "gsm8k.yaml"
PROBLEMS = [("2 + 3?", "2 + 3 = 5\n#### 5"), ("9 - 3?", "#### 6"), ("500 * 3?", "#### 1,500"), ("1 / 2?", "#### 0.5")]
SHOTS = [("1 + 1?", "#### 2"), ("9 - 3?", "#### 6"), ("{question}{answer}?", "#### 7")]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    for name, rows in (("path", PROBLEMS), ("shots", SHOTS)):
        text = "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("path", "shots")}


def option(path: str, **changes: Any) -> Gsm8k:
    node = yaml.safe_load(CONF.read_text())
    del node["_target_"]
    return Gsm8k(**{**node, "path": path, **changes})


def prompts(evaluation: Gsm8k, **changes: Any) -> list[str]:
    return [TOKENIZER.decode(item.prompt[1:]) for item in evaluation.items(exam(**changes))]


INSTRUCTED = ([TOKENIZER.eot_id], [TOKENIZER.special_id("<|assistant|>")])


def test_a_run_on_plain_text_is_asked_in_words(files):
    assert prompts(option(files["path"]))[:2] == ["Question: 2 + 3?\nAnswer:", "Question: 9 - 3?\nAnswer:"]
    assert prompts(option(files["path"], template="{question}={answer}", items=1)) == ["2 + 3?="]


def test_a_run_that_knows_conversations_is_asked_the_question_alone(files):
    said: list[str] = []
    (item, *_) = option(files["path"]).items(exam(frame=INSTRUCTED, render=lambda text: said.append(text) or [7, 8]))
    assert said[0] == "2 + 3?" and item.prompt == (7, 8)  # ids are those of the run's own renderer


def test_examples_come_first_and_never_hold_the_question(files):
    evaluation = option(files["path"], shots=files["shots"], n_shot=2)
    first, second, *_ = prompts(evaluation)
    before = "Question: 1 + 1?\nAnswer: #### 2\n\n"
    assert first == before + "Question: 9 - 3?\nAnswer: #### 6\n\nQuestion: 2 + 3?\nAnswer:"
    assert second == before + "Question: {question}{answer}?\nAnswer: #### 7\n\nQuestion: 9 - 3?\nAnswer:"
    said: list[str] = []
    evaluation.items(exam(frame=INSTRUCTED, render=lambda text: said.append(text) or [7]))
    assert said[0] == first  # examples need their form in a conversation too
    assert prompts(option(files["path"], shots=files["shots"], n_shot=0)) == prompts(option(files["path"]))
    with pytest.raises(UserError, match=r"eval.n_shot: 5, but .*shots.jsonl holds 3 problem\(s\); lower it"):
        option(files["path"], shots=files["shots"])  # null is 5


REPLIES = {
    "2 + 3?": "2 + 3 = 5\n#### 5.\nQuestion: 9?\nAnswer: 1 #### 9",  # right up to the stop
    "9 - 3?": "That makes 6 apples.",  # right, but not in form
    "500 * 3?": "It is $1,500.00\n#### 1,400",  # a wrong one
    "1 / 2?": "half",  # no answer
}


def measured(files, **changes):
    evaluation = option(files["path"], template="{question}{answer}", **changes)
    rows = list(evaluation.rows(exam(Scripted(lambda prompt: REPLIES[prompt.strip()]))))
    return {row.record["asked"]: row for row in rows}, *evaluation.summary(rows)


def test_both_readings_and_what_cannot_be_read(files):
    rows, figures, words = measured(files)
    found = {asked: (row.record["strict"], row.record["flexible"], *row.values.values()) for asked, row in rows.items()}
    assert found == {
        "2 + 3?": ("5.", "5.", 1.0, 1.0), "9 - 3?": (None, "6", 0.0, 1.0), "500 * 3?": ("1,400", "1,400", 0.0, 0.0),
        "1 / 2?": (None, None, 0.0, 0.0),
    }  # fmt: skip
    assert rows["2 + 3?"].record["got"] == "2 + 3 = 5\n#### 5.\n" and rows["2 + 3?"].record["expected"] == "5"
    assert list(rows["2 + 3?"].values) == ["strict_score", "flexible_score"]
    assert figures["strict_unparsable"] == 2 and figures["flexible_unparsable"] == 1
    assert figures["strict_score_parsed"] == 1 / 2 and figures["flexible_score_parsed"] == 2 / 3
    # 1 of 4: s^2 = 4 (1/4)(3/4) / 3; Wilson's ends are 0.0456 and 0.6994
    assert figures["strict_score_se"] == pytest.approx(0.25)
    assert (figures["strict_score_low"], figures["strict_score_high"]) == pytest.approx((0.0456, 0.6994), abs=5e-5)
    assert words.splitlines()[0] == "strict: 1 of 4 right (95 % interval 4.6 to 69.9 %); 2 name no answer, which counts as wrong"


def test_what_failed_has_no_score_and_nothing_else_than_answers_is_asked(files):
    class Failing:  # it has no `score`
        def generate(self, prompts, params):
            assert params.stop == ("Question:", "</s>", "<|im_end|>")
            return [Completion([], "", [], "error", "http_400: no"), *[Completion([1], "#### 6", [], "stop")] * (len(prompts) - 1)]

    failed, *others = sorted(option(files["path"]).rows(exam(Failing())), key=lambda row: row.error is None)
    assert failed.error == "http_400: no" and failed.values == {} and failed.record["asked"] == "2 + 3?"
    assert len(others) == 3 and all(row.error is None and "strict_score" in row.values for row in others)


def test_nothing_to_read_has_no_share_among_what_was_read(files):
    evaluation = option(files["path"])
    rows = list(evaluation.rows(exam(Scripted(lambda prompt: "?"))))
    figures, _ = evaluation.summary(rows)
    assert "strict_score_parsed" not in figures and figures["strict_unparsable"] == 4


def test_expressions_in_boxes(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text(json.dumps({"problem": "Half of 3?", "solution": r"It is $\boxed{\frac{3}{2}}$."}) + "\n")
    evaluation = option(str(path), answers="boxed")
    for reply, scores in ((r"\boxed{1.5}", [1.0, 1.0]), ("so 1.5", [0.0, 1.0]), (r"\boxed{3}, not 1.5", [0.0, 0.0])):
        (row,) = evaluation.rows(exam(Scripted(lambda prompt, reply=reply: reply)))
        assert list(row.values.values()) == scores, reply


def test_a_mark_of_ones_own(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"question": "12+7*3=", "answer": "7*3=21 12+21=33 #33"}) + "\n")
    (row,) = option(str(path), mark="#", template="{question}{answer}").rows(exam(Scripted(lambda prompt: "7*3=21 12+21=33 #33")))
    assert row.values["strict_score"] == 1.0


def test_long_questions_are_mentioned(files, capfd):
    option(files["path"]).items(exam(trained_length=8))
    assert "questions have up to" in capfd.readouterr().err
    option(files["path"]).items(exam(trained_length=800))
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"answers": "boxd"}, r"eval.answers: 'boxd' is not one of number, boxed; did you mean 'boxed'\?"),
        ({"mark": ""}, "eval.mark: holds an empty text"),
        ({"stop": [""]}, "eval.stop: holds an empty text"),
        ({"template": "Q: {question}"}, r"eval.template: 'Q: \{question\}'; it needs \{question\} and \{answer\}, each once"),
        ({"template": "{answer} to {question}"}, r"it must end with \{answer\}"),
        ({"items": 0}, "eval.items: 0; must be a whole number of at least 1"),
        ({"max_new_tokens": 0}, "eval.max_new_tokens: 0; must be"),
        ({"n_shot": 3}, "eval.n_shot: 3, but eval.shots is null"),
        ({"path": None}, r"eval.path: null; give a file of problems: eval.path=FILE.jsonl with question and answer"),
        ({"path": "nowhere.jsonl"}, "eval.path: nowhere.jsonl: no such file or folder"),
        ({"shots": "nowhere.jsonl"}, "eval.shots: nowhere.jsonl: no such file or folder"),
    ],
)
def test_bad_values_are_refused(files, changes, line):
    with pytest.raises(UserError, match=line):
        option(**{**files, "shots": None, **changes})


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ('{"question": "2?", "answr": "2"}', r"line 2 has only question, answr; it needs question, answer; did you mean 'answr'\?"),
        ('{"question": "2?", "answer": 2}', "line 2: answer holds int, not text"),
        ("{", "line 2 is not valid JSON"),
        ('{"question": "2?", "answer": "2"}', r"line 2: its answer has no '#### ' before a number; see eval.answers and eval.mark"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "1?", "answer": "#### 1"}\n' + row + "\n")
    with pytest.raises(UserError, match=line):
        option(str(path)).items(exam())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no row in it"):
        option(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"eval.max_new_tokens: \d+ tokens; this engine takes at most 40"):
        option(str(path), items=1).items(exam(limit=40))
