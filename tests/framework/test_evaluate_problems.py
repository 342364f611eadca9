"""task=evaluate on files of problems, from the command down, on runs with untrained models: prompts, figures, printed lines, refusals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import generate as entry_point
from framework.build import compose, load_run
from framework.overrides import group_options
from framework.tasks.evaluate import make_exam, next_command
from tests.framework.test_generate import TEXT, make_run, refused

FUNCTIONS = Path(__file__).parents[1] / "components" / "evals" / "files" / "functions.jsonl"
PROBLEMS = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(3)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "text.txt").write_text(TEXT)
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    (folder / "chats.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Hello"}) + "\n")
    (folder / "tasks.jsonl").write_text(json.dumps({"instruction": "Add", "output": "3"}) + "\n")
    small = ["data.tokenizer.kind=bytes", "data.seq_len=64", "model=phi4mini"]
    make_run(folder / "outputs" / "text", "data=text", f"data.path={folder / 'text.txt'}", *small)
    make_run(folder / "outputs" / "chat", "data=chat", "task=sft", f"data.path={folder / 'chats.jsonl'}", *small)
    make_run(folder / "outputs" / "tasks", "data=multitask", f"data.tasks={{a: {{path: {folder / 'tasks.jsonl'}}}}}", *small)
    return folder


@pytest.fixture
def call(home, tmp_path, capfd):
    """generate.main(task=evaluate and words) in the home; returns (exit code, stdout, stderr)."""

    def run_it(run: str, *words: str) -> tuple[int, str, str]:
        places = [f"paths.root={home / 'outputs'}", f"paths.cache_dir={home / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
        code = entry_point.main([*places, "task=evaluate", f"ckpt={home / 'outputs' / run}", "eval.max_new_tokens=4", *words])
        printed, err = capfd.readouterr()
        return code, printed, err

    return run_it


@pytest.mark.parametrize("run", ["text", "chat", "tasks"])
def test_problems_with_numbers(call, home, tmp_path, run):
    code, out, err = call(run, "eval=gsm8k", f"eval.path={home / 'problems.jsonl'}")
    assert code == 0 and "Traceback" not in err, err
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sorted(line["asked"] for line in lines) == [row["question"] for row in PROBLEMS]
    assert all({"strict", "flexible", "strict_score", "flexible_score", "got"} <= set(line) for line in lines)
    for how in ("strict", "flexible"):
        assert metrics[f"gsm8k/{how}_score"] == sum(line[f"{how}_score"] for line in lines) / 3
        assert metrics[f"gsm8k/{how}_unparsable"] == sum(line[how] is None for line in lines)
    header, numbers, _, strict, flexible, cut_off = out.splitlines()
    assert header.split("  ")[0] == "items" and "strict score, %" in header and numbers.split()[0] == "3"
    assert strict.startswith("strict: ") and flexible.startswith("flexible: ") and "eval.max_new_tokens=4" in cut_off


def test_what_is_suggested_next_fits_what_was_run(home, monkeypatch):
    """The words that were typed, others in their places; every suggestion of the YAML is one that its evaluation takes."""
    then = OmegaConf.to_container(compose("generate", ["task=evaluate", "eval=choice"]).task.then)
    assert set(then) <= set(group_options("eval"))
    run = load_run(home / "outputs" / "text")
    context = SimpleNamespace(run=run, source=run, method=None, task=None, out_dir=Path("out"))

    def after(name, *typed, method=None):
        context.method = method
        monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
        monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(overrides=SimpleNamespace(task=list(typed))))
        return next_command(context, name, then.get(name, []))

    asked = (
        "task=evaluate",
        "eval=gsm8k",
        "eval.path=my test.jsonl",
        "eval.mark='#'",
        "decode=greedy",
        "decode.stop=[END]",
        "ckpt=last",
        "hydra.run.dir=x",
    )
    assert after("gsm8k", *asked) == (
        f"python generate.py task=evaluate eval=gsm8k 'eval.path=my test.jsonl' \"eval.mark='#'\" decode=self_consistency ckpt={run.path}"
    )
    assert after("gsm8k", *asked, method=object()).startswith("python -m framework.decoding_report out OTHER_DIR")
    once = after("code", "task=evaluate", "eval=code", "eval.path=f.jsonl", "eval.execute=true")
    assert "eval.execute=true decode=sample eval.samples=10 'eval.ks=[1,10]'" in once
    prompt = f"python generate.py ckpt={run.path} prompt='...'"
    assert after("code", "task=evaluate", "eval=code", "eval.samples=5") == prompt == after("my_own", "task=evaluate", "eval=my_own")
    assert shlex.split(after("gsm8k", "eval.template='it\"s $1'", *asked))[2] == "eval.template='it\"s $1'"
    for name in then:  # each is accepted by the command itself
        typed = ("task=evaluate", f"eval={name}")
        compose("generate", shlex.split(after(name, *typed))[2:])


@pytest.mark.parametrize("policy", ["error", "truncate_left", "skip"])
@pytest.mark.parametrize("decode", ["greedy", "self_consistency"])
def test_a_question_that_is_too_long(call, home, tmp_path, policy, decode):
    """Refused before anything is asked; or asked without its beginning; or passed over, which is in no score, counted and said."""
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*PROBLEMS, {**PROBLEMS[0], "question": "Well, " * 20 + "what is 0 + 1?"}]))
    words = ["eval=gsm8k", f"eval.path={file}", "engine.context_length=64", f"decode={decode}"]
    if policy == "error":
        if decode == "greedy":
            refused(call("text", *words), "eval.max_new_tokens", "at most 64")
        return
    code, _, err = call("text", *words, f"too_long={policy}")
    assert code == 0 and "Traceback" not in err, err
    lines = {line["asked"]: line for line in map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    long = lines.pop(max(lines, key=len))
    assert len(lines) == 3 and not any("error" in line or "prompt_cut" in line for line in lines.values())
    if policy == "skip":
        assert "more than the 64 that this engine takes" in long["error"] and long["finish_reason"] == "skipped"
        assert not any(key.endswith("score") for key in long) and all("strict_score" in line for line in lines.values())
        right = sum(line["strict_score"] for line in lines.values())
        assert metrics["gsm8k/strict_score"] == right / 3 and metrics["errors"] == 1 and metrics["prompts_skipped"] >= 1
        assert "4 items, 1 of them without an answer and in no score" in err
        assert "skipped; in results.jsonl they have prompt_cut or error" in err
    else:
        assert long["prompt_cut"] == long["prompt_tokens"] - 60 > 0 and metrics["errors"] == 0
        assert "cut on the left; in results.jsonl" in err


def test_questions_that_are_all_passed_over_are_no_measurement(call, home, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({**PROBLEMS[0], "question": "Well, " * 20 + "what is 0 + 1?"}) + "\n")
    said = call("text", "eval=gsm8k", f"eval.path={file}", "engine.context_length=64", "decode=greedy", "too_long=skip")
    refused(said, "1 of 1 items have no answer", "more than the 64")


def test_a_run_is_asked_as_it_was_trained(home):
    """Ids are those that `prompt=` gives, marks of the turns and the template's words included."""
    for run, before, after in (("chat", "", ""), ("tasks", "Below is an instruction", "### Response:\n")):
        loaded = load_run(home / "outputs" / run)
        context = type("Context", (), {"run": loaded, "engine": None, "task": None})
        exam = make_exam(context)
        ids = exam.render("What is 2 + 1?")
        assert exam.instructed and ids == [*exam.frame[0], *loaded.tokenizer.encode("What is 2 + 1?"), *exam.frame[1]]
        text = loaded.tokenizer.decode(ids)
        assert before in text and text.endswith(after)
    assert not make_exam(type("Context", (), {"run": load_run(home / "outputs" / "text"), "engine": None, "task": None})).instructed


def test_programs(call, tmp_path):
    words = ("eval=code", f"eval.path={FUNCTIONS}", "eval.execute=true", "eval.samples=2", "eval.ks=[1,2]", "decode=sample")
    code, out, err = call("text", *words)
    assert code == 0 and "Traceback" not in err, err
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [line["problem"] for line in lines].count("own/1") == 2 and len({line["got"] for line in lines}) > 1
    assert metrics["code/score"] == metrics["code/pass@1"] <= metrics["code/pass@2"]
    assert sum(metrics[f"code/{status}"] for status in ("passed", "failed", "timeout", "error")) == 6 == metrics["items"]
    assert "pass@1" in out and "programs: " in out and "sandbox: " in out


def test_what_is_wrong_is_said_in_one_line(call, home, tmp_path):
    refused(call("text", "eval=gsm8k"), "eval.path: null", "eval.path=FILE.jsonl")
    refused(call("text", "eval=gsm8k", f"eval.path={home / 'problem.jsonl'}"), "eval.path", "did you mean 'problems.jsonl'")
    refused(call("text", "eval=gsm8k", f"eval.path={home / 'text.txt'}"), "eval.path", "plain text")
    refused(call("text", "eval=gsm8k", f"eval.path={home / 'chats.jsonl'}"), "chats.jsonl, line 1 has only prompt, completion")
    refused(call("text", "eval=code", f"eval.path={FUNCTIONS}"), "eval.execute: false", "eval.execute=true allows it")
    refused(call("text", "eval=gsm8k", f"eval.path={home / 'problems.jsonl'}", "eval.stop=x"), "eval.stop")
    assert not (tmp_path / "out").exists()
