"""A search that is cut off anywhere goes on to the same result, to the byte, and evaluates nothing that its log has."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from components.errors import UserError
from components.search.evolution import search
from components.search.log import parse
from tests.components.search import search_worker as worker

ROOT = Path(__file__).resolve().parents[3]
TOTAL = worker.EVOLUTION.total


def logged(folder):
    """The intact evaluations of its log."""
    path = folder / "log.jsonl"
    lines = [parse(raw) for raw in path.read_bytes().splitlines(keepends=True)] if path.exists() else []
    return [line for line in lines[1:] if line]


def calls(folder):
    return (folder / "calls").read_text().split() if (folder / "calls").exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a search that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    worker.run(folder, seconds=0.0)
    assert len(logged(folder)) == TOTAL and any(line["score"] is None for line in logged(folder))
    return folder


def start(folder):
    return subprocess.Popen(
        [sys.executable, worker.__file__, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )


def kill_and_resume(folder, kills, whole):
    rng = random.Random(kills)
    for point in [*sorted(rng.sample(range(TOTAL - 5), kills)), None]:
        before, done = len(calls(folder)), {worker.name(line["factors"]) for line in logged(folder)}
        process = start(folder)
        if point is None:
            assert process.wait(60) == 0, process.stderr.read()
        else:
            while len(calls(folder)) <= point and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.random() * 2 * worker.SECONDS)  # within an evaluation, or between two
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
        assert not done & set(calls(folder)[before:])
    lines = logged(folder)
    assert [line["id"] for line in lines] == [line["id"] for line in logged(whole)]
    assert max(Counter(line["id"] for line in lines).values()) == 1
    twice = [name for name, count in Counter(calls(folder)).items() if count > 1]
    assert len(calls(folder)) <= TOTAL + kills and set(calls(folder)) == set(calls(whole))
    assert len(twice) <= kills  # what was in flight when it was killed
    assert (folder / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def test_two_kills(tmp_path, whole):
    kill_and_resume(tmp_path, 2, whole)


@pytest.mark.slow
def test_ten_kills(tmp_path, whole):
    kill_and_resume(tmp_path, 10, whole)


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_torn_last_line(tmp_path, whole, cut):
    """`cut` bytes of the 41st evaluation are there; it alone and the later ones are done anew."""
    lines = (whole / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines[:41]) + lines[41][:cut])
    worker.run(tmp_path, seconds=0.0)
    assert calls(tmp_path) == calls(whole)[40:]
    assert (tmp_path / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    again = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:41] == lines[:41] and len(again) == len(lines) and all(parse(line) for line in again)


def test_torn_end_of_a_finished_search_is_removed(tmp_path, whole):
    content = (whole / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(content + b'{"id": 96, "gen')
    worker.run(tmp_path, seconds=0.0)
    assert (tmp_path / "log.jsonl").read_bytes() == content and not calls(tmp_path)


def test_torn_header_and_blocks_of_zeros(tmp_path, whole):
    lines = (whole / "log.jsonl").read_bytes().splitlines(keepends=True)
    for number, content in enumerate([b"", lines[0][:50], b"".join(lines[:9]) + bytes(512)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "log.jsonl").write_bytes(content)
        worker.run(folder, seconds=0.0)
        assert (folder / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def test_finished_search_evaluates_nothing(tmp_path, whole):
    content = (whole / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(content)
    told, generations = [], []

    def objective(factors, r):
        raise AssertionError("evaluated again")

    found = search(
        objective,
        worker.SPACE,
        worker.EVOLUTION,
        tmp_path / "log.jsonl",
        provenance={"documents": "abc"},
        on_evaluation=told.append,
        on_generation=generations.append,
    )
    found.save(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    assert (tmp_path / "log.jsonl").read_bytes() == content
    assert not told and [state["replayed"] for state in generations] == [24, *[12] * 6]
    assert generations[-1]["seconds"] == pytest.approx(sum(line["seconds"] for line in logged(whole)))


def test_result_holds_what_it_was_made_with_and_no_times(whole):
    result = json.loads((whole / "result.json").read_text())
    best = min((line for line in logged(whole) if line["score"] is not None), key=lambda line: line["score"])
    assert {key: result[key] for key in ("r", "factors", "score", "id")} == {key: best[key] for key in ("r", "factors", "score", "id")}
    assert result["settings"]["provenance"] == {"documents": "abc"} and result["settings"]["space"]["factor"] == 8.0
    assert "seconds" not in (whole / "result.json").read_text()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"evolution": replace(worker.EVOLUTION, population=25)}, "task.population: 25, but .* was begun with 24"),
        ({"evolution": replace(worker.EVOLUTION, seed=4)}, "task.seed: 4, but .* was begun with 3"),
        ({"space": replace(worker.SPACE, factor=9.0)}, "space.factor: 9.0, but .* was begun with 8.0"),
        ({"provenance": {"documents": "xyz"}}, "provenance.documents: 'xyz', but .* was begun with 'abc'"),
        ({"provenance": {}}, "provenance.documents: None, but .* was begun with 'abc'"),
        ({"seeds": [[8.0] * 16]}, "task.seeds: .* was begun with \\[\\]"),
    ],
)
def test_changed_settings_are_refused(whole, change, words):
    content = (whole / "log.jsonl").read_bytes()
    same = {"space": worker.SPACE, "evolution": worker.EVOLUTION, "provenance": {"documents": "abc"}}
    with pytest.raises(UserError, match=words):
        search(lambda factors, r: 1.0, log=whole / "log.jsonl", **{**same, **change})
    assert (whole / "log.jsonl").read_bytes() == content


def test_damaged_or_foreign_files_are_refused_and_kept(tmp_path, whole):
    lines = (whole / "log.jsonl").read_bytes().splitlines(keepends=True)
    changed = json.loads(lines[5])
    changed["factors"][-1] += 1e-9
    cases = {
        "line 3 is damaged": [*lines[:2], b"{garbage\n", *lines[3:]],
        "is there twice": [*lines[:4], lines[3], *lines[4:]],
        "not what these settings lead to": [*lines[:5], json.dumps(changed).encode() + b"\n", *lines[6:]],
        "line 1 is damaged": [b"my notes"],
    }
    for number, (words, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(b"".join(content))
        with pytest.raises(UserError, match=words):
            search(lambda factors, r: 1.0, worker.SPACE, worker.EVOLUTION, path, provenance={"documents": "abc"})
        assert path.read_bytes() == b"".join(content), words


def test_stopping_from_the_progress_callback_loses_nothing(tmp_path, whole):
    class Stop(Exception):
        pass

    def stop(state):
        if state["evaluations"] == 31:
            raise Stop

    with pytest.raises(Stop):
        search(
            lambda factors, r: float(np.square(np.log(factors / 11.0)).mean()),
            worker.SPACE,
            worker.EVOLUTION,
            tmp_path / "log.jsonl",
            on_evaluation=stop,
        )
    assert len(logged(tmp_path)) == 31
