"""The report of runs: grouping, spread, paired intervals, curves, failures; on folders whose figures are known by hand."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from components.contracts import UserError
from framework.report import text
from framework.report.__main__ import main
from framework.report.curves import curve, quantity
from framework.report.group import group
from framework.report.markdown import markdown
from framework.report.page import page
from framework.report.read import read_all, read_run
from framework.report.summary import Spread, paired, summarise


def make_run(
    folder: Path, number: int, *, rate=0.1, seed=1, loss=2.0, kind="first", status="done", words=None, seconds=1.0, **state
) -> Path:
    """A run directory with three rows; its loss falls to `loss` in steps of 1."""
    run = folder / f"{number}_job-s{seed}"
    (run / ".hydra").mkdir(parents=True)
    words = [f"optimizer={kind}", f"optimizer.lr={rate}", f"seed={seed}"] if words is None else words
    config = {
        "seed": seed, "name": "x", "optimized_metric": "val/loss", "paths": {"output_dir": str(run)},
        "optimizer": {"_target_": kind, "lr": rate}, "data": {"seed": seed, "rows": 4},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    hydra = {
        "mode": "MULTIRUN",
        "job": {"name": "train"},
        "runtime": {"choices": {"optimizer": kind, "logger": "none"}},
        "overrides": {"task": words},
    }
    (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    known = {"status": status, "seed": seed, "created": f"2026-01-01T00:00:{number:02d}", "wandb_id": f"id{number}", **state}
    (run / "run_state.json").write_text(json.dumps(known))
    rows = "".join(f"{step},{loss + 3 - step},{loss + 3 - step},{step * 100},{step * seconds}\n" for step in (1, 2, 3))
    (run / "metrics.csv").write_text("step,train/loss,val/loss,tokens,seconds\n" + rows)
    if status == "done":
        figures = {
            "val/loss": loss,
            "tokens": 300.0,
            "seconds": 3 * seconds,
            "perf/flops_per_token": 50.0,
            "params/total": 1234,
            "gap": None,
        }
        (run / "metrics.json").write_text(json.dumps(figures))
    return run


@pytest.fixture
def sweep(tmp_path):
    """Two rates, three seeds: losses 2.0 2.1 2.2 and 2.5 2.7 2.9."""
    folder = tmp_path / "sweep"
    for i, (rate, losses) in enumerate([(0.1, (2.0, 2.1, 2.2)), (0.2, (2.5, 2.7, 2.9))]):
        for j, loss in enumerate(losses):
            make_run(folder, 3 * i + j, rate=rate, seed=j + 1, loss=loss, seconds=1.0 + j)
    return folder


def summary_of(folder: Path, **options):
    return summarise([folder], read_all([folder]), **options)


def test_groups_by_everything_but_the_seed_and_what_follows_it(sweep):
    summary = summary_of(sweep)
    assert [c.label for c in summary.configurations] == ["optimizer.lr=0.1", "optimizer.lr=0.2"]
    assert [c.seeds for c in summary.configurations] == [[1, 2, 3]] * 2
    assert summary.differing == [("optimizer.lr", ["0.1", "0.2"])]


def test_mean_spread_and_best_by_hand(sweep):
    found = summary_of(sweep).results[1]["val/loss"]
    assert found.mean == pytest.approx(2.7)
    assert found.std == pytest.approx(0.2)  # sqrt((0.04 + 0 + 0.04) / 2)
    assert found.best() == 2.5
    assert found.best(higher=True) == 2.9


def test_paired_interval_by_hand(sweep):
    """Differences -0.5, -0.6, -0.7: mean -0.6, sd 0.1; t(0.975, 2) = 4.302653 (a published table)."""
    pair = summary_of(sweep).pairs[0]
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (pair.mean, pair.low, pair.high) == pytest.approx((-0.6, -0.6 - half, -0.6 + half), rel=1e-6)
    assert pair.clear
    assert pair.sure
    assert text.reading(pair, False, 1) == "optimizer.lr=0.1 is better"
    assert text.reading(pair, True, 1) == "optimizer.lr=0.2 is better"


def test_many_comparisons_ask_for_more(sweep):
    """The same differences at level 1 - 0.05/20: t(0.99875, 2) = 19.96 (from t^2 = 2 q^2 / (1 - q^2), q = 0.9975): half 1.152 > 0.6."""
    a, b = summary_of(sweep).configurations
    pair = paired(a, b, "val/loss", comparisons=20)
    assert pair.clear
    assert not pair.sure
    assert "not among all 20" in text.reading(pair, False, 20)


def test_pairs_use_common_seeds_only(tmp_path):
    for number, (rate, seed, loss) in enumerate([(0.1, 1, 1.0), (0.1, 2, 2.0), (0.2, 2, 5.0), (0.2, 3, 9.0)]):
        make_run(tmp_path, number, rate=rate, seed=seed, loss=loss)
    pair = summary_of(tmp_path).pairs[0]
    assert pair.seeds == (2,)
    assert pair.mean == pytest.approx(-3.0)
    assert text.interval(pair) == "one seed: no spread"
    assert text.reading(pair, False, 1) == "no interval from one seed"


def test_one_seed_has_no_spread(tmp_path):
    make_run(tmp_path, 0)
    summary = summary_of(tmp_path)
    assert summary.results[0]["val/loss"].std is None
    for form in (markdown(summary), page(summary)):
        assert "one seed: no spread" in form


def test_with_many_configurations_all_are_compared_with_the_best(tmp_path):
    for number in range(7):
        make_run(tmp_path, number, rate=number + 1, loss=5.0 - number)
    pairs = summary_of(tmp_path).pairs
    assert len(pairs) == 6
    assert {pair.first for pair in pairs} == {"optimizer.lr=7"}


def test_options_name_a_configuration_and_hide_the_keys_they_bring(tmp_path):
    make_run(tmp_path, 0, kind="first", rate=0.1, words=["optimizer=first"])
    make_run(tmp_path, 1, kind="second", rate=0.2, words=["optimizer=second"])
    assert [c.label for c in group(read_all([tmp_path]))] == ["optimizer=first", "optimizer=second"]


def test_an_option_whose_key_is_swept_is_told_apart_by_it(tmp_path):
    for number, (kind, rate) in enumerate([("first", 0.1), ("first", 0.2), ("second", 0.1)]):
        make_run(tmp_path, number, kind=kind, rate=rate, words=[])
    assert [c.label for c in group(read_all([tmp_path]))] == [
        "optimizer=first optimizer.lr=0.1", "optimizer=first optimizer.lr=0.2", "optimizer=second optimizer.lr=0.1"
    ]  # fmt: skip


def test_a_repeated_run_replaces_the_older_one(tmp_path):
    make_run(tmp_path, 0, loss=9.0)
    make_run(tmp_path, 1, loss=2.0)
    summary = summary_of(tmp_path)
    assert summary.results[0]["val/loss"].values == (2.0,)
    assert [run.path.name for run in summary.repeated] == ["0_job-s1"]
    assert "0_job-s1" in markdown(summary)


def test_failed_jobs_are_listed_with_their_error_and_take_no_part(sweep):
    make_run(sweep, 6, rate=0.1, seed=4, loss=99.0, status="failed", error="loss is not finite at step 2")
    make_run(sweep, 7, rate=0.3, seed=1, loss=0.0, status="running")
    with_file = make_run(sweep, 8, rate=0.1, seed=5, status="failed")
    (with_file / "error.txt").write_text("Traceback (most recent call last):\n  File x\nRuntimeError: <boom> | pipe\n")
    summary = summary_of(sweep)
    assert [(run.status, run.error) for run in summary.unfinished] == [
        ("failed", "loss is not finite at step 2"), ("killed", "its process is gone; resume it"), ("failed", "RuntimeError: <boom> | pipe"),
    ]  # fmt: skip
    assert summary.results[0]["val/loss"].values == (2.0, 2.1, 2.2)
    assert text.seed_count(summary.configurations[0]) == "3 of 5"
    assert "RuntimeError: &lt;boom&gt; | pipe" in page(summary)
    assert "RuntimeError: <boom> \\| pipe" in markdown(summary)


def test_jobs_that_never_became_runs_are_listed(sweep):
    failed = sweep / "6_job-s9"
    (failed / ".hydra").mkdir(parents=True)
    hydra = {"job": {"name": "train"}, "overrides": {"task": ["seed=9", "model=nope"]}}
    (failed / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    (failed / "error.txt").write_text("model: 'nope' is not an option\n")
    jobs = [{"number": n, "overrides": [f"seed={n}"]} for n in range(8)]
    (sweep / "sweep.json").write_text(json.dumps({"id": "x", "command": "python train.py -m seed=1,2", "jobs": jobs}))
    runs = summary_of(sweep).unfinished
    assert [(run.path.name, run.status, run.error) for run in runs] == [
        ("6_job-s9", "failed", "model: 'nope' is not an option"), ("job 7", "not started", "it has not begun; resume the sweep")
    ]  # fmt: skip
    assert runs[0].command == "python train.py seed=9 model=nope"


def test_commands_are_quoted_and_complete(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, seed, seed=seed, words=["data=text", "data.path='a b'", f"seed={seed}"])
    configuration = group(read_all([tmp_path]))[0]
    assert configuration.command == "python train.py -m data=text 'data.path='\"'\"'a b'\"'\"'' seed=1,2"
    assert configuration.runs[0].command.startswith("python train.py data=text ")
    (tmp_path / "3").mkdir()
    one = make_run(tmp_path / "3", 3, words=["experiment=e", "seed=1"])
    assert read_run(one).command == "python train.py experiment=e seed=1 hydra.mode=RUN"  # the file itself asks for a multirun


def test_curves_average_on_shared_tokens_and_interpolate_seconds(sweep):
    configuration = summary_of(sweep).configurations[0]
    tokens = curve(configuration, "tokens", "val/loss")
    assert tokens.x.tolist() == [100, 200, 300]
    assert tokens.mean == pytest.approx([4.1, 3.1, 2.1])
    assert tokens.low == pytest.approx([4.0, 3.0, 2.0])
    assert tokens.high == pytest.approx([4.2, 3.2, 2.2])
    flops = curve(configuration, "FLOPs", "val/loss")
    assert flops.x.tolist() == [5000, 10000, 15000]
    seconds = curve(configuration, "seconds", "val/loss")  # seeds take 1, 2, 3 s a step: all have values only at t = 3
    assert seconds.x.tolist() == [3]
    assert seconds.mean == pytest.approx([(2.0 + 3.6 + 4.2) / 3])


def test_costs(sweep):
    costs = summary_of(sweep).costs[0]
    assert costs["FLOPs"].mean == 300 * 50
    assert costs["seconds"].mean == pytest.approx(6.0)
    assert costs["parameters"].mean == 1234
    assert "memory" not in costs
    assert [quantity(v) for v in (0.5, 999, 1500, 2.5e9, 3e15)] == ["0.5", "999", "1.5k", "2.5G", "3P"]


def test_csv_holds_all_digits(sweep):
    rows = list(csv.DictReader(io.StringIO(text.table_csv(summary_of(sweep)))))
    assert [float(row["val/loss mean"]) for row in rows] == pytest.approx([2.1, 2.7], abs=1e-15)
    assert rows[0]["seeds"] == "1 2 3"
    assert rows[1]["optimizer.lr"] == "0.2"
    assert rows[0]["command"] == "python train.py -m optimizer=first optimizer.lr=0.1 seed=1,2,3"


class Tags(HTMLParser):
    """Collects what a page would load, its ids, and tags left open."""

    VOID = ("meta", "br", "path", "use", "rect")

    def __init__(self):
        super().__init__()
        self.loads, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loads += [found[key] for key in ("src", "href") if key in found and not found[key].startswith("#")]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        self.ids += [found["id"]] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing(sweep):
    html = page(summary_of(sweep))
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.loads == []
    assert len(tags.ids) == len(set(tags.ids))
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{name}" for name in tags.ids}
    assert "http" not in html
    assert html.count("<svg") == 5  # tokens and FLOPs of both losses, and the paired differences; over seconds all seeds meet in one point
    assert "#0103" not in html


def test_nothing_finished_still_makes_a_report(tmp_path):
    make_run(tmp_path, 0, status="failed", error="no space left")
    summary = summary_of(tmp_path)
    assert "No run finished" in markdown(summary)
    assert "no space left" in page(summary)


def test_a_metric_of_choice(sweep):
    assert summary_of(sweep, metric="seconds", higher=True).metric == "seconds"
    with pytest.raises(UserError, match=r"--metric: 'val/los' was not measured.*val/loss"):
        summary_of(sweep, metric="val/los")


def test_the_metric_of_a_claim_comes_before_the_optimised_one(sweep):
    for run in sweep.iterdir():
        with open(run / "config.yaml", "a") as file:
            file.write("claim: {metric: tokens, better: higher}\n")
    summary = summary_of(sweep)
    assert (summary.metric, summary.higher) == ("tokens", True)


def test_a_seed_without_the_figure_leaves_no_mean(sweep):
    file = sweep / "0_job-s1" / "metrics.json"
    file.write_text(json.dumps({"val/loss": None, "tokens": 300.0}))
    summary = summary_of(sweep)
    assert [("val/loss" in result) for result in summary.results] == [True, False]  # the one that has it comes first
    assert Spread((1.0,)).std is None


BROKEN = {
    "metrics.json": ("{", "metrics.json: cannot be read"),
    "metrics.csv": ("step,val/loss\n1,abc\n", "metrics.csv: line 2 cannot be read"),
    "run_state.json": ("[]", "run_state.json: holds no object but list"),
    "config.yaml": ("a: [", "config.yaml: cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, name):
    content, message = BROKEN[name]
    run = make_run(tmp_path, 0)
    (run / name).write_text(content)
    found = read_run(run)
    assert found.status == "unreadable"
    assert message in found.error
    assert "\n" not in found.error


def test_an_unreadable_run_is_said_and_left_out(sweep, capsys):
    content, message = BROKEN["metrics.json"]
    (sweep / "0_job-s1" / "metrics.json").write_text(content)
    assert main([str(sweep)]) == 0
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out.count("\n") == 1
    assert message in (sweep / "report.md").read_text()


def test_only_unreadable_runs_are_an_error(tmp_path, capsys):
    (make_run(tmp_path, 0) / "metrics.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    assert "metrics.json: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: does not exist"),
        (["empty"], "empty: no runs in it"),
        (["file"], "file: is not a folder"),
        ([], "DIR: none given"),
        (["runs", "--wandb", "me"], "--wandb: 'me' is not ENTITY/PROJECT"),
        (["runs", "--metric", "loss"], "--metric: 'loss' was not measured"),
        (["runs", "--matrix"], "--matrix: 'runs' does not go with it"),
    ],
)
def test_bad_words_give_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("")
    make_run(Path("runs"), 0)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_several_folders_make_one_report(sweep, tmp_path, capsys):
    other = tmp_path / "other"
    make_run(other, 0, rate=0.4, loss=1.0)
    assert main([str(sweep), str(other), str(sweep)]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert "4 configurations" not in (tmp_path / "report.md").read_text()
    assert "3 configurations, 7 runs" in (tmp_path / "report.md").read_text()
    assert main([str(sweep), str(other), "--out", str(tmp_path / "new")]) == 0
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"report.md", "table.csv", "report.html"}


def test_the_verdict_of_a_claim_is_shown(sweep, monkeypatch):
    claims = pytest.importorskip("framework.claims")
    with open(sweep / "0_job-s1" / "config.yaml", "a") as file:
        file.write("claim: {statement: x beats y}\n")
    monkeypatch.setattr(claims, "judge", lambda folder: {"verdict": "NOT SUPPORTED"})
    monkeypatch.setattr(claims, "lines", lambda verdict: ["NOT SUPPORTED: x beats y", "  note: <odd>"])
    assert main([str(sweep)]) == 0
    assert "**NOT SUPPORTED: x beats y**" in (sweep / "report.md").read_text()
    assert "note: &lt;odd&gt;" in (sweep / "report.html").read_text()


def test_wandb_without_a_key_is_one_line_and_the_local_report_is_there(sweep, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(sweep / "none"))
    assert main([str(sweep), "--wandb", "me/it"]) == 2
    said = capsys.readouterr()
    assert "--wandb: no API key" in said.err
    assert said.err.count("\n") == 1
    assert (sweep / "report.html").is_file()


def test_wandb_report_has_the_blocks_and_its_address_is_kept(sweep, monkeypatch, capsys):
    """W&B's own classes check every block; only the upload is replaced."""
    reports = pytest.importorskip("wandb_workspaces.reports.v2")
    saved = []
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(reports.Report, "save", lambda self: saved.append(self))
    monkeypatch.setattr(reports.Report, "url", property(lambda self: "https://w.example/me/it/reports/1"))
    (sweep / "sweep.json").write_text(json.dumps({"id": "x", "jobs": []}))
    make_run(sweep, 6, rate=0.3, status="failed", error="boom")
    assert main([str(sweep), "--wandb", "me/it"]) == 0
    assert "W&B report: https://w.example/me/it/reports/1" in capsys.readouterr().out
    assert json.loads((sweep / "sweep.json").read_text()) == {"id": "x", "jobs": [], "report": "https://w.example/me/it/reports/1"}
    (report,) = saved
    assert (report.entity, report.project) == ("me", "it")
    titles = [block.text for block in report.blocks if isinstance(block, reports.H2)]
    assert titles == ["Results", "Paired differences", "Curves", "Cost", "Configurations", "Not finished", "Commands"]
    grid = next(block for block in report.blocks if isinstance(block, reports.PanelGrid))
    assert [(r.name, r.entity, r.project) for r in grid.runsets] == [("optimizer.lr=0.1", "me", "it"), ("optimizer.lr=0.2", "me", "it")]
    assert all(f"id{i}" in grid.runsets[0].filters for i in (0, 1, 2))
    assert "id3" not in grid.runsets[0].filters
    assert [p.title for p in grid.panels if isinstance(p, reports.LinePlot)][:2] == ["val/loss over tokens", "val/loss over seconds"]
