"""What the commonest label and the frequencies of labels are worth, by hand and through the command."""

import json
import math

import pytest

from benchmarks import common, label_baselines
from benchmarks.label_baselines import TASKS, baselines
from components.contracts import UserError


def test_of_one_task_by_hand():
    """Training says answer2; the test has it twice in five, once among the first two, and answer1 three times."""
    train, test = ["answer2"] * 3 + ["answer1"], ["answer1", "answer2", "answer1", "answer2", "answer1"]
    found = baselines(train, test, tokens=35, first=2)
    assert (found["train"], found["test"], found["label"]) == (4, 5, "answer2")
    assert (found["accuracy"], found["first_accuracy"], found["best_accuracy"], found["best_first_accuracy"]) == (0.4, 0.5, 0.6, 0.5)
    assert found["answer_loss"] == pytest.approx((3 * math.log(4) + 2 * math.log(4 / 3)) / 35, rel=1e-12)


def test_a_label_that_training_lacks_is_refused():
    with pytest.raises(UserError, match="no training row has the label 'answer5'"):
        baselines(["answer1"], ["answer5"], tokens=7, first=1)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "commonsense").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("Some words that stand in no question .\n" * 30)
    for file in TASKS.values():
        for split, labels in (("train", ("true", "true", "false")), ("test", ("false", "true", "true", "true"))):
            rows = [{"instruction": f"Is it {i}?", "input": "", "output": f"the correct answer is {a}"} for i, a in enumerate(labels)]
            (tmp_path / "commonsense" / f"{file}.{split}.json").write_text(json.dumps(rows))
    return tmp_path


def test_the_command_writes_a_row(texts, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", texts / "results")
    label_baselines.main([f"texts={texts}", "--first", "2"])
    assert "boolq          true   0.7500    0.5000" in capsys.readouterr().out
    (row,) = map(json.loads, (texts / "results" / "label_baselines.jsonl").read_text().splitlines())
    assert row["mean"]["accuracy"] == 0.75 and row["mean"]["first_accuracy"] == 0.5 and row["first"] == 2
    loss = (3 * math.log(3 / 2) + math.log(3)) / 4  # of an answer, which has at least two tokens, and no more than letters and an end mark
    assert loss / 29 <= row["mean"]["answer_loss"] <= loss / 2


def test_a_row_that_names_no_label_is_one_line(texts, capsys):
    (texts / "commonsense" / "boolq.test.json").write_text(json.dumps([{"instruction": "Who?", "output": "Nobody"}]))
    with pytest.raises(SystemExit) as caught:
        label_baselines.main([str(texts)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("boolq.test.json, row 1: output is 'Nobody'; it must name a label, such as 'the correct answer is true'")
