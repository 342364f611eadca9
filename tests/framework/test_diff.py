"""Two run directories written by hand: what the comparison must find in them, and nothing else."""

import json

import pytest
import yaml

from components.contracts import UserError
from framework import diff
from framework.diff import compare


def write_run(folder, config=None, metrics=None, csv="", **state):
    folder.mkdir(parents=True)
    base = {"seed": 1, "optimizer": {"_target_": "a.B", "lr": 0.1, "betas": [0.9, 0.95]}, "paths": {"output_dir": str(folder)}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**base, **(config or {})}))
    whole = {"status": "done", "choices": {"optimizer": "b"}, "versions": {"torch": "2.11"}, "git": {"sha": "0" * 40, "dirty": False}}
    (folder / "run_state.json").write_text(json.dumps({**whole, "data": {"train": "f00"}, **state}))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if csv:
        (folder / "metrics.csv").write_text(csv)
    return folder


def test_equal_setups_have_no_rows_though_their_folders_differ(tmp_path):
    found = compare(write_run(tmp_path / "a", metrics={"val/loss": 1.0}), write_run(tmp_path / "b", metrics={"val/loss": 2.0}))
    assert found.same_setup
    assert found.results == [("val/loss", 1.0, 2.0)]


def test_every_difference_has_one_row(tmp_path):
    a = write_run(tmp_path / "a", metrics={"val/loss": 2.0, "seed": 1, "only": 1.0})
    other = {"_target_": "a.C", "lr": 0.1, "betas": [0.9, 0.99]}
    b = write_run(
        tmp_path / "b", {"seed": 2, "optimizer": other, "new": {"key": None}}, {"val/loss": 1.5}, choices={"optimizer": "c"},
        versions={"torch": "2.12", "numpy": "2.0"}, git={"sha": "1" * 40, "dirty": True}, data={"train": "ba4"},
    )  # fmt: skip
    found = compare(a, b)
    assert found.choices == [("optimizer", "b", "c")]
    assert found.config == [
        ("optimizer._target_", "a.B", "a.C"), ("optimizer.betas", [0.9, 0.95], [0.9, 0.99]), ("seed", 1, 2), ("new.key", "-", None),
    ]  # fmt: skip
    assert found.software == [("torch", "2.11", "2.12"), ("git", "0" * 12, "1" * 12 + " (changed)"), ("numpy", "-", "2.0")]
    assert found.data == [("train", "f00", "ba4")]
    assert found.results == [("val/loss", 2.0, 1.5), ("only", 1.0, None)]
    assert diff.change(2.0, 1.5) == ("-0.5", "-25.0%") and diff.change(1.0, None) == ("", "")


def test_an_unfinished_run_shows_the_newest_value_of_every_column(tmp_path):
    csv = "step,train/loss,val/loss\n1,3.0,4.0\n2,2.5,\n3,2.0"  # the last line was cut short by a kill
    found = compare(write_run(tmp_path / "a", csv=csv, status="running"), write_run(tmp_path / "b", metrics={}))
    assert found.a.results == {"step": 2.0, "train/loss": 2.5, "val/loss": 4.0}


def test_what_is_printed(tmp_path, capsys):
    a = write_run(tmp_path / "a", metrics={"val/loss": 2.0, "diagnostics/x": 1.0})
    b = write_run(tmp_path / "b", {"seed": 2}, {"val/loss": 1.5, "diagnostics/x": 2.0})
    assert diff.main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert ["seed", "1", "2"] in [line.split() for line in out.splitlines()]
    assert ["val/loss", "2", "1.5", "-0.5", "-25.0%"] in [line.split() for line in out.splitlines()]
    assert "options: the same" in out and "1 further figures with --all" in out and "diagnostics/x" not in out
    diff.main([str(a), str(b), "--all"])
    assert "diagnostics/x" in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    a, sweep = write_run(tmp_path / "sweep" / "a"), tmp_path / "sweep"
    (tmp_path / "empty").mkdir()
    broken = write_run(tmp_path / "broken", metrics={})
    (broken / "metrics.json").write_text("{")
    unborn = write_run(tmp_path / "unborn")
    (unborn / "config.yaml").unlink()
    for folder, words in (
        (tmp_path / "nowhere", "is not a directory"), (tmp_path / "empty", "is not a run"), (sweep, f"1 runs below it, such as {a}"),
        (broken, "metrics.json: cannot be read"), (unborn, "stopped before it had a configuration"),
    ):  # fmt: skip
        assert diff.main([str(a), str(folder)]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and "Traceback" not in err
    with pytest.raises(UserError):
        compare(a, sweep)
