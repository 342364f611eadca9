"""metrics.csv and metrics.json."""

import csv
import json
import math

import pytest

from framework.logging import LocalLogger, masked, read_rows, write_summary


def lines(folder):
    return (folder / "metrics.csv").read_text().splitlines()


def test_rows_are_on_disk_at_once_and_columns_are_the_union(tmp_path):
    logger = LocalLogger(tmp_path)
    logger.log_metrics({"a": 0.1}, 1)
    assert lines(tmp_path) == ["step,a", "1,0.1"]
    logger.log_metrics({"a": 0.2}, 2)
    assert lines(tmp_path)[-1] == "2,0.2"
    logger.log_metrics({"a": 0.3, "b": 5.0}, 3)
    logger.log_metrics({"a": 0.4}, 4)
    assert lines(tmp_path) == ["step,a,b", "1,0.1,", "2,0.2,", "3,0.3,5.0", "4,0.4,"]
    assert read_rows(tmp_path)[2] == {"step": 3.0, "a": 0.3, "b": 5.0}
    assert read_rows(tmp_path)[3] == {"step": 4.0, "a": 0.4}


def test_values_come_back_exactly(tmp_path):
    values = [1 / 3, 1e-300, 123456789.123456789, 2.0**0.5, float("inf")]
    logger = LocalLogger(tmp_path)
    for step, value in enumerate(values):
        logger.log_metrics({"x": value}, step)
    assert [row["x"] for row in read_rows(tmp_path)] == values
    logger.log_metrics({"x": float("nan")}, 9)
    assert math.isnan(read_rows(tmp_path)[-1]["x"])


def test_rows_after_the_checkpoint_are_cut(tmp_path):
    logger = LocalLogger(tmp_path)
    for step in range(1, 8):
        logger.log_metrics({"x": float(step)}, step)
    again = LocalLogger(tmp_path, keep_up_to=4)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]
    again.log_metrics({"x": 5.0}, 5)
    assert lines(tmp_path)[-1] == "5,5.0"
    assert LocalLogger(tmp_path).rows == [] and lines(tmp_path) == ["step"]  # a run that starts over


def test_line_that_a_kill_cut_short_is_dropped(tmp_path):
    LocalLogger(tmp_path).log_metrics({"x": 1.0, "y": 2.0}, 1)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("2,3.14")
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    LocalLogger(tmp_path, keep_up_to=5).log_metrics({"x": 1.5, "y": 2.5}, 2)
    assert lines(tmp_path) == ["step,x,y", "1,1.0,2.0", "2,1.5,2.5"]


def test_file_is_plain_csv(tmp_path):
    LocalLogger(tmp_path).log_metrics({"a": 1.0}, 1)
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"step": "1", "a": "1.0"}]


def test_summary_is_valid_json_even_when_a_value_is_not_finite(tmp_path):
    write_summary(tmp_path, {"val/loss": float("nan"), "seed": 3, "x": 0.5})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == {"val/loss": None, "seed": 3, "x": 0.5}


def test_secrets_are_masked_by_key_and_nothing_else_is():
    node = {"api_key": "abc", "a": [{"hub_token": "x", "password": "y"}], "tokenizer": {"kind": "bpe"}, "max_new_tokens": 5, "key": "kept"}
    assert masked(node) == {
        "api_key": "***", "a": [{"hub_token": "***", "password": "***"}], "tokenizer": {"kind": "bpe"}, "max_new_tokens": 5, "key": "kept",
    }  # fmt: skip
    assert node["api_key"] == "abc"
