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
