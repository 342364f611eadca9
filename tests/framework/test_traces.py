"""generate.py with a decoding in several calls, from the entry point down, on a run with an untrained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import generate as entry_point
from components.contracts import UserError
from framework import decoding_report
from framework.arms import read_job
from framework.report.read import read_metrics
from framework.traces import by_candidates
from tests.framework.test_generate import TEXT, make_run, prompts_file, refused

PROBLEMS = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text(TEXT)
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    words = ["data=text", f"data.path={folder / 'text.txt'}", "data.tokenizer.kind=bytes", "data.seq_len=64", "model=phi4mini"]
    make_run(folder / "outputs" / "one", *words)
    return folder


@pytest.fixture
def call(home, tmp_path, capfd):
    """generate.main(words) in the home; returns (exit code, stdout, stderr)."""

    def run_it(*words: str) -> tuple[int, str, str]:
        places = [f"paths.root={home / 'outputs'}", f"paths.cache_dir={home / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
        bound = [] if "task=evaluate" in words else ["max_new_tokens=6"]  # an evaluation has its own
        code = entry_point.main([*places, *bound, *words])
        out, err = capfd.readouterr()
        return code, out, err

    return run_it


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts(call, tmp_path):
    code, _, err = call(f"prompts={prompts_file(tmp_path, {'prompt': 'The cat', 'id': 'cat'}, {'prompt': 'A dog'})}", "decode=gsa")
    assert code == 0, err
    traces = lines(tmp_path / "out" / "traces.jsonl")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {trace["id"] for trace in traces} == {"cat", 1} and all(len(trace["calls"]) == 4 for trace in traces)
    assert metrics["decode/calls"] == 8 and metrics["answers"] == 2
    assert metrics["tokens"] == metrics["decode/completion_tokens"] == sum(c["tokens"] for t in traces for c in t["calls"])
    assert metrics["decode/flops"] == pytest.approx(sum(trace["usage"]["flops"] for trace in traces)) and metrics["decode/flops"] > 0
    assert "8 calls" in err and "traces.jsonl" in err
    assert call(f"prompts={tmp_path / 'prompts.jsonl'}", "decode=sample", f"hydra.run.dir={tmp_path / 'once'}", "n=2")[0] == 0
    once = {(line["id"], line["sample"]): line["text"] for line in lines(tmp_path / "once" / "generations.jsonl")}
    assert once == {(trace["id"], i): trace["candidates"][i] for trace in traces for i in (0, 1)}  # the same samples
    code, out, err = call("prompt='The cat'", "decode=self_consistency", f"output={tmp_path / 'no.jsonl'}")
    assert code == 2 and "output" in err  # as for any single prompt
    code, out, err = call("prompt='The cat'", "decode=best_of_n", f"hydra.run.dir={tmp_path / 'single'}")
    (trace,) = lines(tmp_path / "single" / "traces.jsonl")
    assert code == 0 and out == trace["text"] + "\n" and trace["chosen"] == max(range(4), key=lambda i: trace["notes"]["scores"][i])


@pytest.mark.parametrize("decode", ["gsa", "self_consistency", "choose_from_n", "best_of_n decode/scorer=likelihood"])
def test_an_evaluation(call, home, tmp_path, decode):
    words = ("task=evaluate", "eval=gsm8k", f"eval.path={home / 'problems.jsonl'}", "eval.max_new_tokens=5")
    code, out, err = call(*words, *f"decode={decode}".split())
    assert code == 0, err
    found = lines(tmp_path / "out" / "results.jsonl")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(found) == 3
    for line in found:
        assert line["trace"]["text"].startswith(line["got"]) and line["trace"]["said"].startswith("Question: What is")
        assert len(line["candidates"]) == len(line["trace"]["candidates"]) and "strict_score" in line["candidates"][0]
        assert all(call["tokens"] <= 5 for call in line["trace"]["calls"])
    assert metrics["decode/calls"] == 12 and metrics["gsm8k/strict_score@k=0_items"] == 3 and metrics["gsm8k/strict_score_pass"] == 0
    assert "an answer took 4 calls" in out and "right answers by how many candidates were right" in out


def test_tasks_that_ask_once_refuse(call, home):
    refused(call("task=rollouts", "decode=gsa"), "decode: this option asks several times")
    refused(call("decode=gsa"), "prompt: null")
    refused(call("prompt=a", "decode=gsa", "n=2"), "n: 2", "decode.n")
    refused(call("prompt=a", "decode=gsa", "decode.controll=none"), "decode.controll", "did you mean 'decode.control'")
    words = ("task=evaluate", "eval=ruler_lite", "eval.lengths=[512]", "eval.tasks=[niah_single]")
    refused(call(*words, "decode=gsa"), "decode: this option asks again in words")


def test_right_answers_by_right_candidates():
    figures, words = by_candidates("x/score", [[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]], [1, 0, 1, 0])
    assert figures == {
        "x/score@k=0": 0, "x/score@k=1": 0.5, "x/score@k=2": 1, "x/score@k=0_items": 1, "x/score@k=1_items": 2, "x/score@k=2_items": 1,
        "x/score_pass": 0.75,
    }  # fmt: skip
    assert words == "0: 0 of 1, 1: 1 of 2, 2: 1 of 1"


def evaluated(folder: Path, scores: list[int], candidates: list[list[int]] | None = None, calls: int = 1) -> Path:
    """The folder of an evaluation: item i is right where scores[i]."""
    folder.mkdir(parents=True)
    rows = [
        {"task": "x", "asked": "same?" if i < 2 else f"{i}?", "strict_score": float(value), "strict": "1"} for i, value in enumerate(scores)
    ]
    for row, some in zip(rows, candidates or []):
        row["candidates"] = [{"strict_score": float(value)} for value in some]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text(json.dumps({"decode/calls": calls * len(rows)}))
    return folder


def test_ways_to_answer_are_compared_in_pairs(tmp_path, capsys):
    first = evaluated(tmp_path / "one", [1, 1, 1, 1, 0, 0])
    second = evaluated(tmp_path / "four", [0, 0, 0, 1, 0, 0], [[1, 0]] * 4 + [[0, 0]] * 2, calls=3)
    assert decoding_report.main([str(first), str(second)]) == 0
    out = capsys.readouterr().out.splitlines()
    cells = {line.split("  ")[0]: line.split() for line in out}
    assert cells["one"][1:4] == ["66.7", "0", "1"] and ["four", "16.7", "0", "3"] in [line.split() for line in out]
    assert ["four", "0", "of", "2", "1", "of", "4"] in [line.split() for line in out]
    (pair,) = [line.split() for line in out if line.startswith("one - four")]
    assert pair[3] == "+50.0" and pair[-3:] == ["3", "0", "0.25"]  # of 3 discordant items 3 for one: 2 / 2^3
    with (first / "results.jsonl").open("a") as file:
        file.write(json.dumps({"task": "x", "asked": "lost?", "error": "http_500"}) + "\n")
    assert decoding_report.main([str(first)]) == 0  # of what has an answer
    capsys.readouterr()
    other = evaluated(tmp_path / "other", [1, 1])
    for words, message in (
        ([first, other], "differ in 4 item(s)"),
        ([tmp_path], "no finished task=evaluate"),
        ([first, "--measure", "strict_scor"], "did you mean 'strict_score'"),
    ):
        assert decoding_report.main([*map(str, words)]) == 2
        assert message in capsys.readouterr().err


def test_all_jobs_of_a_sweep_are_compared(tmp_path, capsys):
    """By the sweep's folder, and by `DATE/*`, which names its own file too."""
    folders = [evaluated(tmp_path / str(job), [1, 0, job % 2]) for job in (2, 10, 1)]
    (tmp_path / "multirun.yaml").write_text("x: 1\n")
    told = []
    for words in ([tmp_path], [tmp_path / "1", tmp_path / "2", tmp_path / "10", tmp_path / "multirun.yaml"]):
        assert decoding_report.main([*map(str, words)]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and told[0].index("\n1 ") < told[0].index("\n2 ") < told[0].index("\n10 ") and len(folders) == 3


def test_results_of_a_scripted_engine_are_refused_by_every_reader(call, home, tmp_path, capfd):
    assert call("task=evaluate", "eval=gsm8k", f"eval.path={home / 'problems.jsonl'}")[0] == 0
    file = tmp_path / "out" / "metrics.json"
    metrics = json.loads(file.read_text())
    assert metrics["engine"] == "native" and decoding_report.main([str(file.parent)]) == 0
    file.write_text(json.dumps({**metrics, "engine": "scripted:same"}))
    line = "engine 'scripted:same' says what a script tells it to; no report or verdict is made of its answers"
    capfd.readouterr()
    assert decoding_report.main([str(file.parent)]) == 2
    said = capfd.readouterr().err
    assert line in said and said.count("\n") == 1
    with pytest.raises(UserError, match=line):
        read_metrics(file.parent, [], required=True)
    with pytest.raises(UserError, match=line):
        read_job(file.parent)


@pytest.mark.slow
def test_another_engine_takes_parameters_of_each_prompt(home, tmp_path, capfd):
    """Nothing is replaced here: transformers decodes the run's export."""
    pytest.importorskip("transformers")
    prompts = prompts_file(tmp_path, {"prompt": "The cat"}, {"prompt": "A dog"})
    records = []
    for name, rows in (("a", 1), ("b", 8)):
        words = [f"prompts={prompts}", "decode=gsa", "engine=transformers", f"engine.max_batch={rows}", "max_new_tokens=6"]
        places = [f"paths.root={home / 'outputs'}", f"paths.cache_dir={home / 'cache'}", f"hydra.run.dir={tmp_path / name}"]
        assert entry_point.main([*places, *words]) == 0, capfd.readouterr().err
        records.append(sorted(lines(tmp_path / name / "traces.jsonl"), key=lambda trace: trace["id"]))
    assert records[0] == records[1] and len({call["text"] for call in records[0][0]["calls"]}) > 1
