"""A report of a real sweep: its figures are those of the runs' own files, and its page needs nothing else."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
from commands import ROOT, SMALL, environment, run, shakespeare_like

pytestmark = pytest.mark.slow  # seven real trainings
WORDS = ["trainer.max_steps=4", "validate.every_steps=2", "samples.every_steps=0", "logger=none"]


def report(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "framework.report", *words]
    env = environment(1) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two rates that train and one that diverges, two seeds each."""
    folder = tmp_path_factory.mktemp("report")
    data = f"data.path={shakespeare_like(folder / 'text.txt', 30)}"
    rates = ["optimizer=adamw", "optimizer.lr=0.001,0.01,1e12"]
    done = run(folder, "-m", *SMALL, *WORDS, data, *rates, "seed=1,2", "hydra.sweep.dir=sweep")
    assert done.returncode != 0, done.stdout  # two jobs diverged
    made = report(folder, "sweep")
    assert made.returncode == 0, made.stderr
    assert made.stdout == "report: sweep/report.html (also report.md and table.csv)\n"
    return folder / "sweep"


def test_table_equals_the_runs_own_files(sweep):
    rows = list(csv.DictReader((sweep / "table.csv").read_text().splitlines()))
    assert len(rows) == 2
    for row in rows:
        runs = [p for p in sweep.glob("*/metrics.json") if f"lr: {row['optimizer.lr']}\n" in (p.parent / "config.yaml").read_text()]
        losses = [json.loads(p.read_text())["val/loss"] for p in runs]
        assert len(losses) == 2
        assert (float(row["val/loss mean"]), float(row["val/loss std"])) == pytest.approx((mean(losses), stdev(losses)), rel=1e-12)


def test_jobs_that_diverged_are_listed(sweep):
    for name in ("report.md", "report.html"):
        assert (sweep / name).read_text().count("diverged") >= 2


def test_the_command_of_a_row_makes_the_same_run(sweep):
    """The line of the report, run again, gives bit-identical losses."""
    line = re.search(r"- seed 1: `python train.py (.*?)` \((.*?)\)", (sweep / "report.md").read_text())
    again = run(sweep.parent, *line[1].split())
    assert again.returncode == 0, again.stderr
    (made,) = (sweep.parent / "outputs").glob("**/metrics.json")
    original = sweep.parent / line[2] / "metrics.json"
    assert json.loads(made.read_text())["val/loss"] == json.loads(original.read_text())["val/loss"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
def test_page_is_drawn_without_network(sweep, tmp_path):
    """A real browser, its network cut, lays out every figure and asks for nothing."""
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    browser = ["chromium", *quiet.split(), "--disable-sync", f"--user-data-dir={tmp_path}", "--proxy-server=127.0.0.1:9", "--dump-dom"]
    dom = subprocess.run([*browser, (sweep / "report.html").as_uri()], capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert dom.returncode == 0, dom.stderr
    assert dom.stdout.count("<svg") == (sweep / "report.html").read_text().count("<svg") > 0
