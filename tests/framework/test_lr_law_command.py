"""The command that fits a learning-rate law: from a table and from run folders, and what it refuses."""

import json
import math

import pytest
from omegaconf import OmegaConf

from framework.lr_law import main

RATES, BUDGETS = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], [1e6, 2e6, 4e6]


def loss(tokens, lr, b=0.4, slope=-0.32):
    return 3 + 0.1 * (math.log(lr) - math.log(b * tokens**slope)) ** 2


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("run,tokens,lr,loss\n" + "".join(f"x,{d},{lr},{loss(d, lr)}\n" for d in BUDGETS for lr in RATES))
    return path


def test_planted_law_from_a_table(table, tmp_path, capsys):
    assert main(["--csv", str(table), "--tokens", "1e9"]) == 0
    stored = json.loads((tmp_path / "lr_law.json").read_text())
    assert stored["B"] == pytest.approx(0.4, rel=1e-6) and stored["free_slope"] == pytest.approx(-0.32, abs=1e-6)
    assert stored["lr"] == pytest.approx(0.4 * 1e9**-0.32, rel=1e-6) and (tmp_path / "lr_law.png").stat().st_size > 5000
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"for 1,000,000,000 tokens, 250.0 times the longest run: optimizer.lr={0.4 * 1e9**-0.32:.3g}"


def test_the_same_from_run_folders(tmp_path, capsys):
    for d in BUDGETS:
        for lr in RATES:
            run = tmp_path / "sweep" / f"{d:.0f}_{lr:g}"
            run.mkdir(parents=True)
            OmegaConf.save({"optimizer": {"lr": lr}}, run / "config.yaml")
            (run / "run_state.json").write_text('{"status": "done"}')
            (run / "metrics.json").write_text(json.dumps({"tokens": d, "val/loss": loss(d, lr)}))
    (run / "run_state.json").write_text('{"status": "failed"}')  # the last one does not count
    assert main([str(tmp_path / "sweep"), "--slope", "-0.2"]) == 0
    stored = json.loads((tmp_path / "sweep" / "lr_law.json").read_text())
    assert stored["slope"] == -0.2 and stored["free_slope"] == pytest.approx(-0.32, abs=1e-6)
    said = capsys.readouterr().out
    assert "the slope -0.2 lies outside that interval: these runs do not follow it" in said
    assert said.splitlines()[-1].startswith("for 4,000,000 tokens: optimizer.lr=")


def test_budgets_without_a_minimum_are_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    rows = [*((d, lr, loss(d, lr)) for d in BUDGETS[:2] for lr in RATES), *((9e6, lr, 1 / lr) for lr in RATES), (5e6, 1e-3, 3.0)]
    path.write_text("tokens,lr,loss\n" + "".join(f"{d},{lr},{value}\n" for d, lr, value in rows))
    assert main(["--csv", str(path)]) == 0
    said = capsys.readouterr().out
    assert "9,000,000 tokens: left out, since no minimum lies between the rates tried; try more above 0.016" in said
    assert "5,000,000 tokens: left out, since it has 1 rate(s) and a parabola needs 3" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tokens,lr\n1,2\n", "has no column loss; its columns are tokens, lr"),
        ("tokens,lr,loss\n1e6,-1,2\n", "line 2 is 1e6, -1, 2; tokens and lr are above 0, loss a number"),
        ("tokens,lr,loss\n1e6,1,nan\n", "line 2 is 1e6, 1, nan"),
        ("tokens,lr,loss\n", "has no rows"),
        ("tokens,lr,loss\n1e6,1,2\n", "no law: fit_law: 0 budget(s) with an optimum inside the grid; at least 2"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "runs.csv"
    path.write_text(content)
    assert main(["--csv", str(path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("words", [[], ["somewhere", "--csv", "runs.csv"]])
def test_one_source_is_asked_for(words, capsys):
    assert main(words) == 2
    assert "give folders of a sweep, or --csv FILE, and not both" in capsys.readouterr().err


def test_folders_without_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "holds no runs" in capsys.readouterr().err
