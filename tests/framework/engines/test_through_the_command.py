"""generate.py over a server, with and without a run. The server is scripted: what is looked at is what is asked of it and written down."""

from __future__ import annotations

import json

import pytest
from hostile import honest, serving

import generate as entry_point
from components.adapters.base import task_ids
from framework.build import compose, load_run
from framework.engines.building import digest, exported
from tests.framework.test_generate import make_run


@pytest.fixture
def call(tmp_path, capfd):
    def run_it(*words: str) -> tuple[int, str, str]:
        places = [f"paths.root={tmp_path}", f"paths.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'out'}"]
        code = entry_point.main([*places, "engine=openai", *words])
        out, err = capfd.readouterr()
        return code, out, err

    return run_it


def test_texts_and_conversations_without_a_run(call, tmp_path):
    talk = [{"role": "user", "content": "Why?"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "Once"}, {"messages": talk})))

    def answer(path, body, number):
        if path.endswith("chat/completions"):
            assert body["messages"] in (talk, [{"role": "user", "content": "1"}])
            return 200, {"choices": [{"message": {"content": "because"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}, {}
        return honest(path, body, number)

    with serving(answer) as server:
        code, _, err = call(f"engine.base_url={server.url}", f"prompts={file}", f"output={tmp_path / 'said.jsonl'}", "decode.min_p=0.1")
        assert code == 0, err
        asked = [body for body in server.seen if body.get("prompt") == "Once"]
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert rows[0]["text"].startswith("s") and rows[1]["text"] == "because" and rows[1]["prompt"] == talk
    assert asked[0]["min_p"] == 0.1 and asked[0]["model"] == "m" and "stop_token_ids" not in asked[0]
    assert f"from m of openai:{server.url}" in err


def test_a_run_brings_its_tokenizer(call, tmp_path):
    run = make_run(tmp_path / "run", "data.tokenizer.kind=bytes", "data=text", f"data.path={__file__}")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab"}\n')
    with serving(honest) as server:
        code, _, err = call(f"engine.base_url={server.url}", f"ckpt={run}", f"prompts={file}", "decode=greedy", "max_new_tokens=8")
        assert code == 0, err
        body = next(body for body in server.seen if body["prompt"] == [256, 97, 98])
    assert body["temperature"] == 0.0 and 256 in body["stop_token_ids"]


def test_requests_that_fail_are_in_the_file_and_said(call, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "said.jsonl"
    file.write_text('{"prompt": "good"}\n{"prompt": "bad"}\n')

    def answer(path, body, number):
        return (400, {"error": {"message": "never"}}, {}) if body["prompt"] == "bad" else honest(path, body, number)

    with serving(answer) as server:
        code, _, err = call(f"engine.base_url={server.url}", f"prompts={file}", f"output={out}")
    good, bad = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and good["finish_reason"] == "stop" and "error" not in good
    assert bad["finish_reason"] == "error" and bad["error"] == f"http_400: {server.url} answered 400: never" and bad["text"] == ""
    assert "1 answers in" in err and "1 of 2 could not be had and are in the file with their error; the first: http_400" in err
    file.write_text('{"prompt": "bad"}\n')
    with serving(answer) as server:
        code, _, err = call(f"engine.base_url={server.url}", f"prompts={file}", f"output={tmp_path / 'none.jsonl'}")
    assert code == 2 and "error: engine: 1 of 1 could not be had" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prompt=x", "engine.name=other"], "error: engine.name: 'other'; URL offers m"),
        (["task=evaluate", "eval=position_loss"], "error: ckpt: null, and the engine answers without a run; what is asked here needs one"),
        ([], "error: ckpt: null, and the engine answers without a run"),
        (["prompt=x", "engine.concurrency=0"], "error: engine.concurrency: 0; at least 1 is allowed"),
        (["prompt=x", "engine.retry.max_attempts=0"], "error: engine.retry:"),
    ],
)
def test_mistakes_are_one_line(call, words, line):
    with serving(honest) as server:
        code, _, err = call(f"engine.base_url={server.url}", *words)
    assert code == 2 and line.replace("URL", server.url) in err and "Traceback" not in err
    assert sum(found.startswith("error") for found in err.splitlines()) == 1


def test_an_export_is_made_once_and_leaves_the_run_as_it_was(tmp_path):
    words = ["model=phi4mini", "adapter=mtl_lora", "data=transforms", "data.tasks=[copy,sort]", "data.tokenizer={kind: bytes}"]
    run = load_run(make_run(tmp_path / "run", *words))
    before = digest(run)
    folder = exported(run, "transformers", tmp_path / "cache", "sort")
    assert exported(run, "transformers", tmp_path / "cache", "sort") == folder != exported(run, "transformers", tmp_path / "cache", "copy")
    assert digest(run) == before and task_ids(run.model).names == ("copy", "sort")
    assert compose("generate", ["engine=transformers", "ckpt=x"]).engine.device == "auto"


PROBLEMS = [{"question": f"What is {n} + {n}?", "answer": f"#### {n + n}"} for n in range(4)]


@pytest.fixture
def evaluate(call, tmp_path):
    """task=evaluate on PROBLEMS with a server and no run: exit code, metrics, lines of results.jsonl, stderr."""
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))

    def run_it(server, out, *words):
        where = [f"engine.base_url={server.url}", "engine.concurrency=1", f"hydra.run.dir={tmp_path / out}"]
        code, _, err = call("task=evaluate", "eval=gsm8k", f"eval.path={tmp_path / 'problems.jsonl'}", *where, *words)
        metrics, lines = tmp_path / out / "metrics.json", (tmp_path / out / "results.jsonl").read_text().splitlines()
        return code, json.loads(metrics.read_text()) if metrics.is_file() else {}, [json.loads(line) for line in lines], err

    return run_it


def of(text):
    """Which problem a prompt asks, if any."""
    return next((n for n, row in enumerate(PROBLEMS) if row["question"] in str(text)), None)


def test_samples_are_voted_on_as_they_are_scored_and_shared_by_all_ways(evaluate):
    """Each sample goes on with another question, whose answers are all different; without these, three of four are right."""

    def talkative(path, body, number):
        if (n := of(body["prompt"])) is None:
            return honest(path, body, number)
        before = sum(of(other["prompt"]) == n for other in server.seen) - 1
        text = f"#### {2 * n + (before == 0)}\nQuestion: more?\n#### {number}1"
        return 200, {"choices": [{"text": text, "finish_reason": "length"}], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}, {}

    seeds = {}
    with serving(lambda *about: without_logprobs(*talkative(*about))) as server:
        for way in ("self_consistency", "sample"):
            server.seen.clear()
            code, metrics, lines, err = evaluate(server, way, f"decode={way}")
            assert code == 0 and len(lines) == 4, err
            asked = [body for body in server.seen if of(body["prompt"]) is not None]
            assert all(body["stop"] == ["Question:", "</s>", "<|im_end|>"] for body in asked)
            assert metrics["gsm8k/strict_score"] == (way == "self_consistency")
            assert metrics["decode/completion_tokens"] == 9 * metrics["decode/calls"] == 9 * len(asked)
            seeds[way] = [body["seed"] for body in asked]
    assert all(body["prompt"].startswith("Question: What") for body in asked) and "m of openai:" in err
    assert seeds["sample"] == seeds["self_consistency"][::4] and len(set(seeds["self_consistency"])) == 16


def without_logprobs(status, content, headers):
    for choice in content["choices"]:
        choice.pop("logprobs", None)
    return status, content, headers


def test_a_call_that_failed_is_no_wrong_answer(evaluate):
    def half(path, body, number):
        n = of(body["prompt"])
        if n is None:
            return without_logprobs(*honest(path, body, number))
        if n % 2 and sum(of(body["prompt"]) == n for body in server.seen) % 4 == 1:  # one call of four is enough
            return 400, {"error": {"message": "never"}}, {}
        return 200, {"choices": [{"text": f"#### {2 * n}", "finish_reason": "stop"}]}, {}

    with serving(half) as server:
        code, _, lines, err = evaluate(server, "refused")
        assert code == 2 and "error: task.missing: 2 of 4 items have no answer, the first: http_400" in err
        failed = [line for line in lines if "error" in line]
        assert len(lines) == 4 and len(failed) == 2 and not any("strict_score" in line for line in failed)
        code, metrics, lines, err = evaluate(server, "skipped", "task.missing=skip", "decode=self_consistency")
    assert code == 0 and "4 items, 2 of them without an answer" in err
    assert (metrics["gsm8k/strict_score"], metrics["errors"], metrics["items"], metrics["gsm8k/strict_unparsable"]) == (1, 2, 4, 0)


def test_a_server_of_conversations_alone_is_asked_in_them(evaluate):
    def chat(path, body, number):
        if not path.endswith("chat/completions"):
            return 404, {}, {}
        n = of(body["messages"][0]["content"])
        message = {"content": f"It is\n#### {2 * (n or 0)}"}
        return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}, {}

    with serving(chat) as server:
        code, metrics, _, err = evaluate(server, "chat")
    assert code == 0 and metrics["gsm8k/strict_score"] == 1 and "decode/flops" not in metrics, err
    assert server.seen[-1]["messages"] == [{"role": "user", "content": PROBLEMS[-1]["question"]}]
