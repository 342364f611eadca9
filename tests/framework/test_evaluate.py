"""task=evaluate from the command down, on runs with untrained models: what is written, drawn, printed and refused; means by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import generate as entry_point
import train as train_point
from components.contracts import Batch
from components.evals.base import Row
from framework.build import load_run
from framework.overrides import group_options
from framework.tasks import evaluate
from framework.tasks.evaluate import draw, means
from tests.framework.test_generate import TEXT, make_run, refused

QUESTIONS = ("eval=ruler_lite", "eval.tasks=[niah_single,qa,common_words]", "eval.lengths=[400,520]", "eval.samples=1", "eval.depths=[0,1]")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text(TEXT * 3)
    return folder


@pytest.fixture(scope="module")
def text_words(home) -> list[str]:
    return ["data=text", f"data.path={home / 'text.txt'}", "data.tokenizer.kind=bytes", "data.seq_len=64", "model=phi4mini"]


@pytest.fixture(scope="module")
def base(home, text_words) -> Path:
    return make_run(home / "outputs" / "base", *text_words)


@pytest.fixture(scope="module")
def longer(home, text_words, base) -> Path:
    """A run that went on from `base` with a second regime, whose numbers are far from the first's."""
    rope = ("rope=longrope2", "rope.rcd=auto", "rope.factor=8", "rope.attention_factor={policy: long_only, value: 3.0}")
    return make_run(home / "outputs" / "longer", *text_words, *rope, f"ckpt={base}", created="2026-02-01T00:00:00", seed=1)


@pytest.fixture
def call(home, base, longer, tmp_path, capfd):
    """generate.main(task=evaluate and words) in the home; returns (exit code, stdout, stderr). The newest run is `longer`."""

    def run_it(*words: str, out: str = "out") -> tuple[int, str, str]:
        places = [f"paths.root={home / 'outputs'}", f"paths.cache_dir={home / 'cache'}", f"hydra.run.dir={tmp_path / out}"]
        code = entry_point.main([*places, "task=evaluate", *words])
        printed, err = capfd.readouterr()
        return code, printed, err

    return run_it


def results(folder: Path) -> tuple[list[dict], dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()], json.loads(
        (folder / "metrics.json").read_text()
    )


ROWS = [
    Row("a", 10, 0.0, {"score": 1.0, "loss": 2.0}),
    Row("a", 10, 0.0, {"score": 0.0, "loss": 4.0}),
    Row("a", 10, 1.0, {"score": 1.0, "loss": 9.0}),
    Row("a", 20, 0.0, {"score": 0.5, "loss": 1.0}),
    Row("b", 10, None, {"score": 0.0}),
    Row("b", 20, None, {"score": 0.25}),
]


def test_means_by_hand():
    """Tasks weigh the same at a length however many rows they have, and so do lengths."""
    assert means("e", ROWS) == pytest.approx(
        {
            "e/a/score@10": 2 / 3, "e/a/score@20": 0.5, "e/b/score@10": 0.0, "e/b/score@20": 0.25,
            "e/score@10": 1 / 3, "e/score@20": 0.375, "e/score": (1 / 3 + 0.375) / 2,
            "e/a/loss@10": 5.0, "e/a/loss@20": 1.0, "e/loss@10": 5.0, "e/loss@20": 1.0, "e/loss": 3.0,
        }
    )  # fmt: skip
    assert means("e", [Row("e", 8, None, {"loss": 1.0}), Row("e", 9, None, {"loss": 2.0})]) == {
        "e/loss@8": 1.0,
        "e/loss@9": 2.0,
        "e/loss": 1.5,
    }
    assert means("e", [Row("x", None, None, {"score": 1.0}), Row("y", None, None, {"score": 0.0})]) == {
        "e/x/score": 1.0, "e/y/score": 0.0, "e/score": 0.5
    }  # fmt: skip


def test_pictures_show_those_means(tmp_path, monkeypatch):
    drawn = {}
    real = evaluate.heat_map
    monkeypatch.setattr(evaluate, "heat_map", lambda panels, down, across, labels, path, title: (
        drawn.update({path.name: (panels, list(down), list(across))}), real(panels, down, across, labels, path, title)
    ))  # fmt: skip
    assert [path.name for path in draw("e", ROWS, 10, tmp_path, "title")] == ["a.png", "e.png"]
    assert drawn["a.png"] == ({"score": [[0.5, 0.5], [1.0, None]], "loss": [[3.0, 1.0], [9.0, None]]}, ["0 %", "100 %"], ["10", "20"])
    assert drawn["e.png"][0]["loss"] == [[5.0, 1.0], [None, None]] and drawn["e.png"][1] == ["a", "b"]
    curve = [Row("e", n, None, {"loss": math.log(n)}) for n in (8, 16)]
    assert [path.name for path in draw("e", curve, 8, tmp_path / "..", "title")] == ["e.png"]
    for name in ("a.png", "e.png", "../e.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_questions_are_asked_written_and_averaged(call, tmp_path, longer):
    code, out, err = call(*QUESTIONS)
    assert code == 0 and "Traceback" not in err, err
    lines, metrics = results(tmp_path / "out")
    assert len(lines) == 3 * 2 * 2 == metrics["items"]
    places = {(task, length, depth) for task in ("niah_single", "qa") for length in (400, 520) for depth in (0.0, 1.0)}
    expected = places | {("common_words", length, None) for length in (400, 520)}
    assert {(line["task"], line["length"], line.get("depth")) for line in lines} == expected
    for line in lines:
        assert (
            line["prompt_tokens"] <= line["length"]
            and isinstance(line["got"], str)
            and line["expected"]
            and line["score"] in (0.0, 0.25, 1.0)
        )
    for task in ("niah_single", "qa"):
        own = [line["answer_loss"] for line in lines if (line["task"], line["length"]) == (task, 520)]
        assert metrics[f"ruler_lite/{task}/answer_loss@520"] == pytest.approx(sum(own) / 2)
    for name in ("niah_single.png", "qa.png", "ruler_lite.png"):
        assert (tmp_path / "out" / name).is_file() and name in err
    assert "score, %" in out and "common_words" in out and "answer loss, nats a token" in out
    first, *_, where, last = err.splitlines()
    assert str(longer) in first and "trained at 64 tokens" in first and "another regime beyond 64 tokens" in first
    assert "12 items" in where and str(tmp_path / "out") in where and last.startswith("next: python generate.py ")
    assert (
        " eval=position_loss " in last and "eval.lengths" not in last and "eval=ruler_lite" not in last and last.endswith(f"ckpt={longer}")
    )
    assert "UserWarning" not in err


def test_the_same_seed_gives_the_same_results(call, tmp_path):
    for out, words in (("one", ()), ("two", ()), ("other", ("eval.seed=2",))):
        assert call(*QUESTIONS, "eval.tasks=[niah_single]", "eval.lengths=[400]", *words, out=out)[0] == 0
    one, two, other = (sorted(map(json.dumps, results(tmp_path / out)[0])) for out in ("one", "two", "other"))
    assert one == two != other


def test_retention_compares_with_the_run_it_started_from(call, tmp_path, base, longer):
    code, out, err = call("eval=retention", "eval.rows=4")
    assert code == 0, err
    lines, metrics = results(tmp_path / "out")
    assert {line["length"] for line in lines} == {64} and len(lines) == 4
    ids = torch.tensor([load_run(base).tokenizer.encode(TEXT[:10])])  # untrained models differ in their losses, so the ratio is not 1
    with torch.no_grad():
        assert not torch.equal(*(load_run(path).model(Batch(ids)).hidden for path in (base, longer)))
    assert metrics["retention/loss_ratio"] == pytest.approx(metrics["retention/loss"] / metrics["retention/base_loss"]) != 1.0
    assert f"loss is {100 * metrics['retention/loss_ratio']:.1f} %" in out and "base loss" in out
    assert call("eval=retention", "eval.rows=4", f"eval.base={longer}", out="self")[0] == 0
    assert results(tmp_path / "self")[1]["retention/loss_ratio"] == 1.0


def test_the_switch_of_the_rule_decides_the_regime(call, tmp_path):
    words = ("eval=position_loss", "eval.rows=2", "eval.buckets=2")
    found = {}
    for length, switch in ((64, "recompute"), (64, "always_short"), (256, "recompute"), (256, "always_short"), (256, "always_long")):
        assert call(*words, f"eval.length={length}", f"rope.switch={switch}", out=f"{switch}{length}")[0] == 0
        found[length, switch] = results(tmp_path / f"{switch}{length}")[1]["position_loss/loss"]
    assert found[64, "recompute"] == found[64, "always_short"]
    assert found[256, "recompute"] == found[256, "always_long"] != found[256, "always_short"]
    assert (tmp_path / "recompute256" / "position_loss.png").is_file()


def test_long_work_says_every_few_seconds_how_far_it_is(monkeypatch, capfd):
    clock = iter([0.0, 4.0, 11.0, 15.0, 22.0, 40.0])
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    progress = evaluate.Progress()
    for done in (100, 250, 300, 500, 1000):
        progress(done, 1000, "questions")
    assert capfd.readouterr().err.splitlines() == [
        "25 % of 1,000 tokens read, now questions; at least 33 s left",
        "50 % of 1,000 tokens read, now questions; at least 22 s left",
    ]


def test_what_is_wrong_is_said_in_one_line(call, home, base, text_words, capfd, tmp_path):
    refused(call(), "eval: none chosen", *(f"eval={name}" for name in group_options("eval")))
    refused(call("eval=ruler"), "eval: 'ruler' is not an option", "ruler_lite")
    refused(call("eval=ruler_lite", "eval.lengths=[100]"), "eval.lengths: 100 tokens", "no less than")
    refused(call("eval=ruler_lite", "eval.lengths=long"), "eval.lengths: 'long' is not a list of whole numbers")
    refused(call("eval=retention", f"ckpt={base}"), "eval.base: null", "did not start from another run", "eval.base=RUN_DIR")
    refused(call("eval=position_loss", "eval.rows=9999"), "eval.rows: the data has", "lower it")
    assert not (tmp_path / "out").exists()
    refused(call("eval=retention", "n=2"), "n: 2; this task does not look at it; drop it")
    refused(call("eval=ruler_lite", "max_new_tokens=48"), "max_new_tokens: 48; here eval.max_new_tokens bounds an answer; set that one")
    places = [f"paths.root={home / 'outputs'}", f"hydra.run.dir={tmp_path / 'out'}"]
    code = entry_point.main([*places, "eval=ruler_lite"])
    refused((code, *capfd.readouterr()), "eval: this task measures nothing", "task=evaluate")
    refused((train_point.main(["task=evaluate"]), *capfd.readouterr()), "task: 'evaluate' belongs to the other command", "generate.py")


def test_a_base_of_other_tokens_is_refused(call, home, text_words):
    from components.data.tokenizers import train_bpe

    other = make_run(home / "elsewhere" / "bpe", *text_words, "model.vocab_size=320")
    train_bpe([TEXT], 300).save(other / "tokenizer")
    refused(call("eval=retention", f"eval.base={other}"), "eval.base", str(other), "another tokenizer")
