"""The command that fits laws of loss over data: from a table and from run folders, and what it refuses."""

import json

import pytest
from omegaconf import OmegaConf

from framework import scaling
from framework.scaling import main

SIZES = [1e6, 2e6, 4e6, 8e6, 1.6e7, 3.2e7]


@pytest.fixture(autouse=True)
def few_points_in_the_band(monkeypatch):
    monkeypatch.setattr(scaling, "BAND", 3)


def loss(size, b=2e5, d_l=4e4, beta=0.8, e=1.5):
    return b / (d_l + size**beta) + e


def make_run(folder, tokens, value, seed=1, status="done", **config):
    folder.mkdir(parents=True)
    OmegaConf.save({"seed": seed, "trainer": {"max_steps": int(tokens / 1000)}, **config}, folder / "config.yaml")
    (folder / "run_state.json").write_text(json.dumps({"status": status, "choices": {"model": "a"}}))
    (folder / "metrics.json").write_text(json.dumps({"tokens": tokens, "val/loss": value, "nothing": 0.0}))


def sweep(folder, sizes=SIZES, seeds=(1, 2), **others):
    for i, (size, seed) in enumerate((size, seed) for size in sizes for seed in seeds):
        make_run(folder / f"{i}_x", size, loss(size) * (1 + 1e-4 * (-1) ** seed), seed, **others)
    return folder


def stored(folder, group="all"):
    return json.loads((folder / "scaling.json").read_text())["groups"][group]


def test_a_group_without_a_law_is_left_out_and_named(tmp_path, capsys):
    rows = [f"{arm},{size:g},{value:.9g}" for size in SIZES for arm, value in (("falls", loss(size)), ("rises", size))]
    table = tmp_path / "points.csv"
    table.write_text("\n".join(["arm,size,error", *rows]))
    assert main([str(table), "--x", "size", "--y", "error", "--by", "arm"]) == 0
    assert "warning: left out: no law of error over size, arm=rises: the loss does not fall as the size grows" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "scaling.json").read_text())["groups"]) == ["arm=falls"]


def test_planted_law_from_a_table(tmp_path, capsys):
    table = tmp_path / "points.csv"
    table.write_text("size,error,note\n" + "".join(f"{size},{loss(size)},x\n" for size in SIZES))
    assert main([str(table), "--at", "1e9"]) == 0
    law = stored(tmp_path)["rectified_law"]
    assert list(law["law"].values()) == pytest.approx([2e5, 4e4, 0.8, 1.5], rel=1e-6)
    assert law["at"] == {"size": 1e9, "loss": pytest.approx(loss(1e9)), "interval": [pytest.approx(loss(1e9), rel=1e-5)] * 2}
    assert abs(law["error"]) < 1e-6 < 1e-3 < abs(stored(tmp_path)["power_law"]["error"])
    assert (tmp_path / "scaling.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "predicted better by the rectified law" in out and "32,000,000 from the others" in out
    assert out.splitlines()[-1].endswith(f"for another size: python -m framework.scaling {table} --at N")


def test_runs_of_a_sweep_and_what_is_left_out(tmp_path, capsys):
    folder = sweep(tmp_path / "sweep")
    make_run(folder / "90_x", 6.4e7, 9.0, status="failed")
    make_run(folder / "91_x", 6.4e7, float("nan"))
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    found, captured = stored(tmp_path / "out"), capsys.readouterr()
    assert len(found["runs"]) == 12 and found["rectified_law"]["law"]["beta"] == pytest.approx(0.8, abs=0.01)
    assert captured.err == "warning: 2 of 14 runs left out: 1 failed, 1 without val/loss\n"
    line = next(line for line in captured.out.splitlines() if line.startswith(" 1,000,000")).split()
    assert line[:2] == ["1,000,000", "2"] and float(line[2]) == pytest.approx(loss(1e6), rel=1e-4)
    assert "held out" not in captured.err and not (folder / "scaling.json").exists()


def test_groups_are_fitted_apart_and_mixed_ones_are_said(tmp_path, capsys):
    for lr in (0.1, 0.2):
        sweep(tmp_path / "sweep" / f"lr_{lr}", seeds=[1], optimizer={"lr": lr})
    assert main([str(tmp_path / "sweep"), "--by", "optimizer.lr", "--x", "trainer.max_steps"]) == 0
    captured = capsys.readouterr()
    assert not captured.err and captured.out.splitlines()[-1].endswith("--x=trainer.max_steps --by=optimizer.lr --at N")
    content = json.loads((tmp_path / "sweep" / "scaling.json").read_text())
    assert list(content["groups"]) == ["optimizer.lr=0.1", "optimizer.lr=0.2"] and content["x"] == "trainer.max_steps"
    law = content["groups"]["optimizer.lr=0.1"]["rectified_law"]["law"]
    assert law["D_l"] == pytest.approx(4e4 / 1000**0.8, rel=0.01)  # in thousands of tokens
    assert main([str(tmp_path / "sweep"), "--x", "seed"]) == 2
    said = capsys.readouterr().err
    assert "warning: runs of one size differ in trainer.max_steps, optimizer.lr; --by trainer.max_steps fits them apart" in said


def test_columns_by_name(tmp_path):
    table = tmp_path / "points.csv"
    rows = "".join(f"{arm},{2 * loss(size) if arm == 'b' else loss(size)},{size}\n" for size in SIZES for arm in "ab")
    table.write_text("arm,error,size\n" + rows)
    assert main([str(table), "--x", "size", "--y", "error", "--by", "arm"]) == 0
    for arm, e in (("a", 1.5), ("b", 3.0)):
        assert stored(tmp_path, f"arm={arm}")["rectified_law"]["law"]["E"] == pytest.approx(e, rel=1e-6)


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("size,loss\n1,2\n", [], "no law of loss over size: 1 different size(s); the law has 4 parameters and needs at least 5"),
        ("size,loss\n1,nan\n", [], "line 2 has size '1' and loss 'nan'; both must be numbers above 0"),
        ("size,loss\n1\n", [], "line 2 has size '1' and loss ''"),
        ("size,loss\n1,2,3\n", [], "line 2 has more cells than the first line names columns"),
        ("size,loss\n0,2\n", [], "line 2 has size '0'"),
        ("size,loss\n", [], "has no rows below the names of its columns"),
        ("", [], "has no rows"),
        ("size\n1\n", [], "has the column size; it needs two, the size and the loss"),
        ("1,2\n3,4\n", [], "the first line of"),
        ("size,loss\n1,2\n", ["--y", "los"], "has no column los; its columns are size, loss"),
        ("size,loss\n" + "".join(f"{i},2\n" for i in range(1, 7)), [], "all losses are 2; there is nothing to fit"),
        ("size,loss\n" + "".join(f"{i},{i}\n" for i in range(1, 7)), [], "the loss does not fall as the size grows"),
        ("size,loss\n1,2\n", ["--at", "0"], "--at: 0.0; must be a number above 0"),
        ("size,loss\n1,2\n", ["folder"], "give one table, or folders"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, capsys, content, words, message):
    table = tmp_path / "points.csv"
    table.write_text(content)
    assert main([str(table), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err and not captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--x", "train/tokens"], "--x train/tokens: no run has it; did you mean 'tokens'?"),
        (["--y", "val/los"], "--y val/los: no run has it; did you mean 'val/loss'?"),
        (["--by", "modle"], "--by modle: no run has it; did you mean 'model'?"),
        (["--y", "nothing"], "nothing 0; both must be above 0"),
    ],
)
def test_keys_that_no_run_has(tmp_path, capsys, words, message):
    assert main([str(sweep(tmp_path / "sweep", SIZES[:1])), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err


def test_folders_without_finished_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "no runs in it" in capsys.readouterr().err
    assert main([str(tmp_path / "points.csv")]) == 2 and "cannot be read" in capsys.readouterr().err
    assert main([str(sweep(tmp_path / "sweep", SIZES[:2], [1], status="failed"))]) == 2
    assert "none of 2 run(s) is finished" in capsys.readouterr().err
