"""A search of factors by the real command: kill -9 at any moment, then resume= : the same file, and nothing scored twice."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter

import pytest
from commands import ROOT, SMALL, history, only_run, run, shakespeare_like, start, state

SEARCH = [
    "model=phi4mini", "task=rope_search", "task.target_len=512", "task.documents=4", "task.validation_documents=2", "task.population=12",
    "task.iterations=6", "task.mutations=5", "task.crossovers=5", "data=text", "logger=csv",
]  # fmt: skip
TOTAL, AFTERWARDS = 12 + 6 * 10, 1 + 2 * 2 * 5  # evaluations of the search, and of the others: the held-out score, five rules

NOTED = f"""
import hashlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from components.search import needle
calls, whole = os.open('calls', os.O_WRONLY | os.O_APPEND | os.O_CREAT), needle.needle_perplexity
def noted(documents, rows=1):
    objective = whole(documents, rows)
    def call(model):
        score = objective(model)
        name = hashlib.sha256(f'{{model.rope_spec}} {{documents[0].ids}}'.encode()).hexdigest()
        os.write(calls, f'{{name}}\\n'.encode())
        return score
    return call
needle.OBJECTIVES['needle_ppl'] = noted
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small trained run and its text."""
    folder = tmp_path_factory.mktemp("model")
    text = shakespeare_like(folder / "text.txt")
    done = run(folder, "model=phi4mini", *SMALL, f"data.path={text}", "trainer.max_steps=20", "logger=csv", "samples.every_steps=0")
    assert done.returncode == 0, done.stderr[-2000:]
    return only_run(folder), text


def words(model):
    return [*SEARCH, f"ckpt={model[0]}", f"data.path={model[1]}"]


def calls(folder):
    return (folder / "calls").read_text().split() if (folder / "calls").exists() else []


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder with a search that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, *words(model), code=NOTED)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(calls(folder)) == TOTAL + AFTERWARDS and "next: python train.py ckpt=" in done.stdout.splitlines()[-2]
    return folder


def wait_for_calls(process, folder, count, timeout=120):
    deadline = time.monotonic() + timeout
    while len(calls(folder)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def content(folder):
    """factors.json, but for the commit, which may be another by now."""
    found = (only_run(folder) / "factors.json").read_text()
    return found.replace(json.loads(found)["search"]["git"] or "null", "COMMIT")


def metrics(folder):
    found = json.loads((only_run(folder) / "metrics.json").read_text())
    return {key: value for key, value in found.items() if "seconds" not in key and not key.startswith("perf/")}


def assert_same_search(folder, whole, kills):
    assert content(folder) == content(whole) and metrics(folder) == metrics(whole)
    assert [{**row, "search/seconds": ""} for row in history(only_run(folder))] == [
        {**row, "search/seconds": ""} for row in history(only_run(whole))
    ]
    assert set(calls(folder)) == set(calls(whole))
    twice = [call for call, count in Counter(calls(folder)).items() if count > Counter(calls(whole))[call]]
    assert len(twice) <= kills  # a score that was made, and killed before its line was written


@pytest.mark.slow
def test_kills_then_resume_gives_the_same_file(model, whole, tmp_path):
    """In the first generation, later, and while the other rules are scored."""
    rng = random.Random(20261126)
    points = [rng.randrange(2, 12), rng.randrange(12, TOTAL), TOTAL + rng.randrange(2, AFTERWARDS - 2)]
    begin = words(model)
    for point in points:
        process = start(tmp_path, *begin, code=NOTED)
        wait_for_calls(process, tmp_path, point)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err[-2000:]
        begin = [f"resume={only_run(tmp_path)}"]
    done = run(tmp_path, *begin, code=NOTED)
    assert done.returncode == 0 and f"going on: {TOTAL} evaluations are in" in done.stdout, done.stderr[-2000:]
    assert state(only_run(tmp_path))["status"] == "done"
    assert_same_search(tmp_path, whole, len(points))
    again = run(tmp_path, f"resume={only_run(tmp_path)}")
    assert again.returncode == 0 and "is finished; nothing to resume" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_says_how_to_go_on(model, whole, tmp_path, number, code):
    process = start(tmp_path, *words(model), code=NOTED)
    wait_for_calls(process, tmp_path, 30)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err[-2000:]
    assert f"stopped; go on with: python train.py resume={only_run(tmp_path)}" in out + err
    done = run(tmp_path, "resume=auto", code=NOTED)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_search(tmp_path, whole, 0)


@pytest.mark.slow
def test_changed_keys_are_refused_and_a_mistake_leaves_no_run(model, whole, tmp_path):
    changed = run(whole, f"resume={only_run(whole)}", "task=rope_search", "task.target_len=512", "task.population=13")
    assert changed.returncode == 2 and "resume: task.population=13 would change the numbers" in changed.stderr
    mistaken = run(tmp_path, *words(model), "task.target_len=64")
    assert mistaken.returncode == 2 and mistaken.stderr.splitlines()[-1].startswith("error: task.target_len: 64; allowed is more than")
    assert not list(tmp_path.glob("outputs/*/*"))
