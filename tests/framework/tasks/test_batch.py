"""task=batch over the native engine: answers in a folder, in the order of the prompts, the same however often it was stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import generate as entry_point
from tests.framework.test_generate import make_run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_run(home / "run", "model=phi4mini", "data=text", f"data.path={__file__}", "data.tokenizer.kind=bytes")
    rows = [{"prompt": f"No. {i}", **({"id": f"own {i}"} if i % 2 else {})} for i in range(60)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def words(home, out, *more, tokens=12):
    return [f"ckpt={home / 'run'}", "task=batch", f"prompts={home / 'prompts.jsonl'}", f"output={out}", f"max_new_tokens={tokens}",
            f"hydra.run.dir={out}.hydra", f"paths.cache_dir={home / 'cache'}", "engine.max_batch=8", *more]  # fmt: skip


@pytest.fixture
def call(home, capfd):
    def run_it(out, *more):
        code = entry_point.main(words(home, out, *more))
        return code, capfd.readouterr().err

    return run_it


def final(folder):
    files = sorted((folder / "final").iterdir())
    return {file.name: file.read_bytes() for file in files}


def test_answers_in_the_order_of_the_file_and_once(home, call, tmp_path):
    code, err = call(tmp_path / "out", "n=2")
    assert code == 0 and "60 answers in" in err and "load_dataset" in err, err
    rows = pq.read_table(tmp_path / "out" / "final").to_pylist()
    assert [row["id"] for row in rows] == [f"own {i}" if i % 2 else str(i) for i in range(60)]
    assert [row["prompt"] for row in rows] == [f"No. {i}" for i in range(60)] and all(len(json.loads(row["text"])) == 2 for row in rows)
    assert len({json.loads(row["text"])[0] for row in rows}) > 50  # seeds of their own
    before = final(tmp_path / "out")
    code, err = call(tmp_path / "out", "n=2")
    assert code == 0 and "60 of 60 answers are in" in err and final(tmp_path / "out") == before
    assert json.loads(Path(f"{tmp_path / 'out'}.hydra/metrics.json").read_text())["answers"] == 0


def test_a_reordered_file_gives_its_own_order(home, call, tmp_path):
    file, rows = tmp_path / "mine.jsonl", [json.dumps({"prompt": f"No. {i}", "id": f"own {i}"}) + "\n" for i in range(6)]
    for names in (rows, rows[::-1]):
        file.write_text("".join(names))
        assert call(tmp_path / "out", f"prompts={file}")[0] == 0
        found = pq.read_table(tmp_path / "out" / "final").to_pylist()
        assert [row["id"] for row in found] == [json.loads(line)["id"] for line in names] and found[0]["index"] == 0


def test_other_settings_do_not_mix(home, call, tmp_path):
    assert call(tmp_path / "out")[0] == 0
    code, err = call(tmp_path / "out", "decode.temperature=0.3")
    assert code == 2 and "temperature" in err and err.count("error:") == 1, err
    assert call(tmp_path / "out", "decode.temperature=0.3", "task.on_change=new")[0] == 0


def test_another_precision_or_an_edited_file_is_refused_before_anything_is_asked(home, call, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"No. {i}"}) + "\n" for i in range(6)))
    assert call(tmp_path / "out", f"prompts={file}")[0] == 0
    code, err = call(tmp_path / "out", f"prompts={file}", "engine.dtype=bfloat16")
    assert code == 2 and "engine" in err and err.count("error:") == 1, err
    file.write_text(json.dumps({"prompt": "new"}) + "\n" + file.read_text())
    code, err = call(tmp_path / "out", f"prompts={file}")
    assert code == 2 and "6 of its answers are to prompts that" in err, err


def test_what_cannot_be_answered_is_kept_and_said(home, call, tmp_path):
    """A prompt that is longer than the engine takes, among others."""
    code, err = call(tmp_path / "out", "engine.context_length=16", "max_new_tokens=10", "task.max_attempts=1")
    assert code == 2 and "50 requests have no answer" in err, err
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert len(errors) == 50 and all("engine.context_length" in one["error"] for one in errors)
    code, err = call(tmp_path / "out", "engine.context_length=16", "max_new_tokens=10", "task.max_attempts=1", "task.missing=skip")
    assert code == 0 and len(pq.read_table(tmp_path / "out" / "final")) == 10


def test_equal_requests_are_found_before_anything_is_asked(home, call, tmp_path):
    file, out = tmp_path / "mine.jsonl", tmp_path / "out"
    rows = [{"prompt": f"No. {i}", "id": str(i)} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))
    for decode in ("sample", "gsa"):
        code, err = call(out, f"prompts={file}", f"decode={decode}")
        assert code == 2 and "requests 3 and 8 (from 0) are the same" in err and err.count("error:") == 1, err
        assert not out.exists()


@pytest.mark.parametrize(("policy", "n"), [("skip", 1), ("truncate_left", 1), ("skip", 2), ("truncate_left", 2)])
def test_too_long_prompts_have_rows_that_say_so(home, call, tmp_path, policy, n):
    """50 of 60 leave no room; first refused, which costs no attempt, then cut or passed over by another word on the same output."""
    common = ["engine.context_length=16", "max_new_tokens=10", "task.max_attempts=1", f"n={n}"]
    if n == 1:
        assert call(tmp_path / "out", *common)[0] == 2
    code, err = call(tmp_path / "out", *common, f"too_long={policy}")
    told = {"skip": "50 skipped", "truncate_left": "50 cut on the left"}[policy]
    assert code == 0 and f"prompts too long for the engine: {told}; see prompt_cut and finish_reason in" in err, err
    rows = pq.read_table(tmp_path / "out" / "final").to_pylist()
    assert [row["prompt"] for row in rows] == [f"No. {i}" for i in range(60)]
    for i, row in enumerate(rows):
        reasons = [row["finish_reason"]] if n == 1 else json.loads(row["finish_reason"])
        texts = [row["text"]] if n == 1 else json.loads(row["text"])
        assert len(reasons) == len(texts) == n
        if i < 10:
            assert row["prompt_cut"] == 0 and "skipped" not in reasons
        elif policy == "skip":
            assert set(reasons) == {"skipped"} and set(texts) == {""} and (row["prompt_cut"], row["prompt_tokens"]) == (0, 0)
        else:
            assert "skipped" not in reasons and (row["prompt_cut"], row["prompt_tokens"]) == (1, 6 * n)
    metrics = json.loads(Path(f"{tmp_path / 'out'}.hydra/metrics.json").read_text())
    assert metrics["prompts_skipped" if policy == "skip" else "prompts_cut"] == 50 and metrics["errors"] == 0
    code, err = call(tmp_path / "out", *common, f"too_long={policy}")  # done already: still said
    assert code == 0 and told in err, err


def test_several_calls_over_a_prompt_that_is_too_long(home, call, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (3, 90, 4)))
    more = [f"prompts={file}", "decode=self_consistency", "decode.n=2", "engine.context_length=40", "max_new_tokens=8", "too_long=skip"]
    code, err = call(tmp_path / "out", *more)
    assert code == 0 and "1 skipped" in err, err
    rows = pq.read_table(tmp_path / "out" / "final").to_pylist()
    assert [row["finish_reason"] == "skipped" for row in rows] == [False, True, False] and rows[1]["text"] == ""
    assert json.loads(rows[1]["usage"])["prompt_tokens"] == 0 and json.loads(rows[0]["usage"])["prompt_tokens"] == 8


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["output=null"], "error: task: batch needs prompts=FILE.jsonl and output=DIR"),
        (["prompts=none.jsonl"], "error: prompts: 'none.jsonl' cannot be read"),
        (["task.missing=maybe"], "error: task.missing: 'maybe'"),
        (["n=0"], "error: n: 0; at least 1 is allowed"),
    ],
)
def test_mistakes_are_one_line(home, call, tmp_path, more, line):
    code, err = call(tmp_path / "out", *more)
    assert code == 2 and line in err and "Traceback" not in err, err
    assert not (tmp_path / "out" / "parts").exists()


def test_several_calls_an_answer(home, call, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"No. {i}"}) + "\n" for i in range(4)))
    code, err = call(tmp_path / "out", f"prompts={file}", "decode=gsa")
    assert code == 0 and "4 answers in" in err and "16 calls are in" in err, err
    rows = pq.read_table(tmp_path / "out" / "final").to_pylist()
    assert [row["prompt"] for row in rows] == [f"No. {i}" for i in range(4)] and len(json.loads(rows[0]["candidates"])) == 3
    assert json.loads(rows[0]["usage"])["calls"] == 4 and json.loads(rows[0]["usage"])["flops"] > 0
    assert call(tmp_path / "one", f"prompts={file}", "decode=sample")[0] == 0  # its answer is their first sample
    single = pq.read_table(tmp_path / "one" / "final").to_pylist()
    assert [row["text"] for row in single] == [json.loads(row["candidates"])[0] for row in rows]
    before = final(tmp_path / "out")
    assert call(tmp_path / "out", f"prompts={file}", "decode=gsa")[0] == 0 and final(tmp_path / "out") == before
    code, err = call(tmp_path / "out", f"prompts={file}", "decode=gsa", "decode.n=2")
    assert code == 2 and "decode.n: 3 -> 2" in err and err.count("error:") == 1, err
    code, err = call(tmp_path / "out", f"prompts={file}", "decode=gsa", "decode/template=code")
    assert code == 2 and "decode.template" in err and err.count("error:") == 1, err
    code, err = call(tmp_path / "out", f"prompts={file}", "decode=gsa", "n=2")
    assert code == 2 and "n: 2; this decoding makes one answer from several calls" in err


@pytest.mark.slow
def test_a_kill_between_two_rounds_changes_no_byte(home, tmp_path):
    """kill -9 at a moment when some prompt has all its samples and no new answer: the samples are kept, and asked once."""
    file, samples = tmp_path / "mine.jsonl", 3
    file.write_text("".join(json.dumps({"prompt": f"No. {i}"}) + "\n" for i in range(24)))

    def start(out):
        more = [f"prompts={file}", "decode=gsa", "task.fsync_rows=1", "task.concurrency=6"]
        command = [sys.executable, ROOT / "generate.py", *words(home, out, *more, tokens=120)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def calls(out):
        part = out / "calls" / "parts" / "part-00000.jsonl"
        lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []
        return [(json.loads(line)["id"], json.loads(line)["row"]) for line in lines]

    def between(found):
        """Queries with all samples and no aggregate."""
        roles = {}
        for _, row in found:
            roles.setdefault(row["query"], []).append(row["role"])
        return {query for query, seen in roles.items() if seen == ["sample"] * samples}

    whole = start(tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    killed = tmp_path / "killed"
    for kill in range(1, 4):
        process = start(killed)
        while process.poll() is None and not (between(found := calls(killed)) and len(found) >= 20 * kill):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = calls(killed)
        assert before and (waiting := between(before)), "it was not killed between two rounds: make the answers longer"
    last = start(killed)
    assert last.wait(300) == 0, last.stderr.read()
    after = calls(killed)
    assert after[: len(before)] == before and len({name for name, _ in after}) == len(after) == 24 * (samples + 1)
    assert all(row["role"] == "aggregate" for _, row in after[len(before) :] if row["query"] in waiting)
    assert "of unfinished answers were there already" in last.stderr.read()
    assert final(killed) == final(tmp_path / "whole")


@pytest.mark.slow
def test_three_kills_of_a_real_process_change_no_byte(home, tmp_path):
    def start(out):
        command = [sys.executable, ROOT / "generate.py", *words(home, out, "task.fsync_rows=4", tokens=200)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    source, kills = random.Random(0), 0
    while kills < 3:
        process = start(tmp_path / "killed")
        part = tmp_path / "killed" / "parts" / "part-00000.jsonl"
        held = part.stat().st_size if part.exists() else 0
        while process.poll() is None and (not part.exists() or part.stat().st_size <= held):  # until it has saved more
            time.sleep(0.01)
        time.sleep(source.uniform(0, 0.2))
        assert process.poll() is None, "it ended before it was killed: make the answers longer"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    last = start(tmp_path / "killed")
    assert last.wait(300) == 0, last.stderr.read()
    assert "answers are in" in last.stderr.read()
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
