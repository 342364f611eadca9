"""Jobs over an engine whose answers a table decides: what is asked, kept, tried again; signals; kills; memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.contracts import Completion, Request, Result, SamplingParams, Usage, UserError
from components.store import Store, request_id
from framework.jobs import answer_row, run_job
from framework.runtime import Interrupted

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"concurrency": 8, "max_attempts": 2, "grace_s": 5.0, "progress_s": 0.05}


class Scripted:
    """Answers from `reply(request)`, a Result, an exception or None for silence, after `delay` seconds; later requests may come first."""

    engine_id, capabilities = "scripted:test", frozenset()

    def __init__(self, reply=None, delay=0.0):
        self.reply, self.delay, self.asked, self.most = reply or answer, delay, [], 0

    async def stream(self, requests, *, concurrency):
        window = []
        async for request in requests:
            self.asked.append(request.id)
            window.append(request)
            self.most = max(self.most, len(window))
            if len(window) == concurrency:
                if self.delay:
                    await asyncio.sleep(self.delay)
                for result in self._results(window.pop(len(self.asked) % concurrency)):
                    yield result
        for request in window:
            if self.delay:
                await asyncio.sleep(self.delay)
            for result in self._results(request):
                yield result

    def _results(self, request):
        found = self.reply(request)
        if isinstance(found, BaseException):
            raise found
        return found if isinstance(found, list) else [found] if found is not None else []

    def diagnostics(self):
        return {"retries": 3.0}


class Prompts:
    """`rows` requests, made as they are read."""

    def __init__(self, rows, n=1):
        self.rows, self.n = rows, n

    def __len__(self):
        return self.rows

    def __iter__(self):
        for index in range(self.rows):
            prompt = f"question {index}"
            yield index, Request(request_id(prompt=prompt), prompt, SamplingParams(seed=index), self.n)


def answer(request, **changed):
    said = [Completion([1, 2], f"{request.prompt}? {j}", [-0.5, -0.25], "stop") for j in range(request.n)]
    values = {"completions": said, "usage": Usage(4, 2 * request.n), "latency": {"total": 0.5}, "error": None, **changed}
    return Result(request.id, engine_id="scripted:test", **values)


def number(request):
    return int(str(request.prompt).split()[-1])


def job(folder, engine, rows=40, prompts=None, **options):
    with Store.open(folder, space={}, fsync_rows=4) as store:
        return run_job(prompts if prompts is not None else Prompts(rows), engine, store, **{**OPTIONS, **options})


def final(folder, rows, missing="refuse"):
    with Store.open(folder, space={}) as store:
        return pq.read_table(store.finish(rows, missing) / "data-00000.parquet").to_pylist()


def test_every_answer_is_stored_in_input_order(tmp_path):
    engine, seen = Scripted(), []
    record = job(tmp_path, engine, report=seen.append)
    assert (record["done"], record["total"], record["in_flight"], record["errors"], record["retries"]) == (40, 40, 0, {}, 3)
    assert engine.most <= OPTIONS["concurrency"] and seen[-1] == record == json.loads((tmp_path / "progress.json").read_text())
    rows = final(tmp_path, 40)
    assert [row["text"] for row in rows] == [f"question {index}? 0" for index in range(40)]
    assert rows[3]["token_ids"] == "[1,2]" and rows[3]["logprob"] == -0.75 and rows[3]["prompt_tokens"] == 4


def test_what_is_done_is_not_asked_again(tmp_path):
    job(tmp_path, Scripted(), rows=25)
    engine = Scripted()
    assert job(tmp_path, engine, rows=40)["done"] == 40
    assert engine.asked == [request.id for index, request in Prompts(40) if index >= 25]


def test_n_answers_are_lists_and_do_not_depend_on_time(tmp_path):
    request = next(iter(Prompts(1, n=3)))[1]
    row = answer_row(request, answer(request))
    assert row["text"] == [f"question 0? {j}" for j in range(3)] and row["logprob"] == [-0.75] * 3
    assert row == answer_row(request, answer(request, latency={"total": 9.0}, usage=Usage(4, 6, cached=4)))


BAD = {
    "timeout": {"completions": [], "error": "timeout: 30 s"},
    "wrong_n": {"completions": []},
    "error": {"completions": [Completion([], "", [], "error", stop_reason="lost")]},
    "abort": {"completions": [Completion([], "", [], "abort")]},
}


@pytest.mark.parametrize("kind", BAD)
def test_failures_are_noted_and_tried_again_up_to_the_cap(tmp_path, kind):
    engine = Scripted(lambda request: answer(request, **(BAD[kind] if number(request) % 10 == 0 else {})))
    for attempt, given_up in ((1, 0), (2, 0), (3, 4)):
        record = job(tmp_path, engine)
        assert record["done"] == 36 and record["failed"] == 4 and record["given_up"] == given_up
        assert record["errors"] == ({kind: 4} if attempt < 3 else {})
    assert len(engine.asked) == 40 + 4
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert sorted((line["i"], line["attempt"]) for line in lines) == [(index, attempt) for index in (0, 10, 20, 30) for attempt in (1, 2)]
    assert len(final(tmp_path, 40, "skip")) == 36
    assert job(tmp_path, Scripted(), max_attempts=3)["failed"] == 0
    assert len(final(tmp_path, 40)) == 40


def test_answers_twice_unasked_or_never(tmp_path):
    def reply(request):
        if number(request) == 7:
            return None
        if number(request) == 5:
            return [answer(request), answer(request, completions=[Completion([], "second", [], "stop")])]
        return [answer(request), Result("ff" * 16, [], Usage(), {}, "scripted:test")] if number(request) == 3 else answer(request)

    record = job(tmp_path, Scripted(reply))
    assert record["errors"] == {"unasked": 2, "unanswered": 1} and record["done"] == 39
    assert final(tmp_path, 40, "skip")[5]["text"] == "question 5? 0"


def test_an_engine_that_gives_up_leaves_what_came(tmp_path):
    with pytest.raises(UserError, match="is not well"):
        job(tmp_path, Scripted(lambda request: UserError("engine: is not well") if number(request) == 30 else answer(request)))
    engine = Scripted()
    assert job(tmp_path, engine)["done"] == 40 and 0 < len(engine.asked) < 40


def test_twins_in_the_window_are_refused(tmp_path):
    twins = [(0, next(iter(Prompts(1)))[1]), (1, next(iter(Prompts(1)))[1])]
    with pytest.raises(UserError, match=r"requests 0 and 1 .* are the same; give each an id of its own"):
        job(tmp_path, Scripted(), prompts=twins)


def test_requests_are_read_as_there_is_room(tmp_path):
    ahead = []

    def prompts():
        for index, request in Prompts(500):
            ahead.append(index + 1 - answered[0])
            yield index, request

    answered = [0]

    def reply(request):
        answered[0] += 1
        return answer(request)

    assert job(tmp_path, Scripted(reply), prompts=prompts(), total=500)["done"] == 500
    assert max(ahead) <= OPTIONS["concurrency"] + 1


@pytest.mark.parametrize("number_, grace, drained", [(signal.SIGTERM, 20.0, True), (signal.SIGINT, 0.0, False)])
def test_a_signal_stops_after_its_grace(tmp_path, number_, grace, drained, capfd):
    engine = Scripted(delay=0.02)

    def report(record):
        if record["done"] >= 10 and not sent:
            sent.append(record)
            os.kill(os.getpid(), number_)

    sent, before = [], signal.getsignal(number_)
    with pytest.raises(Interrupted, match=r"stopped; \d+ of 1,000 answers are in .*go on with the same command") as caught:
        job(tmp_path, engine, rows=1000, grace_s=grace, report=report)
    assert caught.value.signal == number_ and signal.getsignal(number_) == before
    assert f"waiting at most {grace:g} s" in capfd.readouterr().err
    with Store.open(tmp_path, space={}) as store:
        assert 10 <= len(store) < 1000
        assert (len(store) == len(engine.asked)) == drained
    assert job(tmp_path, Scripted(), rows=1000)["done"] == 1000


WORKER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_jobs import Prompts, Scripted, run_job, Interrupted, Store, OPTIONS
rows = int(sys.argv[2])
with Store.open(sys.argv[1], space={}, fsync_rows=64, shard_bytes=200_000) as store:
    try:
        run_job(Prompts(rows), Scripted(), store, **{**OPTIONS, "concurrency": 32})
    except Interrupted as stop:
        sys.exit(128 + stop.signal)
    store.finish(rows)
"""


def start(folder, rows):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", WORKER, folder, str(rows), str(Path(__file__).parent)], env=environment)


def written(folder):
    return sum(path.stat().st_size for path in (folder / "parts").glob("*"))


@pytest.mark.slow
def test_kills_and_signals_of_a_real_job_change_no_byte(tmp_path):
    rows = 30_000
    assert start(tmp_path / "whole", rows).wait(timeout=300) == 0
    killed, size = tmp_path / "killed", written(tmp_path / "whole")
    for turn, number_ in enumerate([signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL]):
        process = start(killed, rows)
        while process.poll() is None and written(killed) < size * (turn + 1) / 7:
            time.sleep(0.005)
        process.send_signal(number_)
        assert process.wait(timeout=60) == (-number_ if number_ == signal.SIGKILL else 128 + number_)
    assert start(killed, rows).wait(timeout=300) == 0
    for name in ("data-00000.parquet", "_SUCCESS"):
        assert (killed / "final" / name).read_bytes() == (tmp_path / "whole/final" / name).read_bytes()


GROWTH = """
import sys
sys.path.insert(0, sys.argv[2])
from test_jobs import Prompts, Scripted, run_job, Store, OPTIONS
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
class Quiet(Scripted):
    async def stream(self, requests, *, concurrency):
        async for result in super().stream(requests, concurrency=concurrency):
            self.asked.clear()
            yield result
marks = {}
def report(record):
    if "before" not in marks and record["done"] >= 100_000:
        marks["before"] = resident()
with Store.open(sys.argv[1], space={}) as store:
    record = run_job(Prompts(1_000_000), Quiet(), store, report=report, **{**OPTIONS, "concurrency": 64})
    print(marks["before"], resident(), record["done"])
"""


@pytest.mark.slow
def test_a_million_requests_in_memory(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROWTH, tmp_path / "store", str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    before, after, rows = map(int, done.stdout.split())
    print(f"grew by {after - before:,} bytes from 0.1M to 1M rows")
    assert rows == 1_000_000 and after - before < 50e6  # 16 bytes a row and the window; 300 MB are allowed
