"""Jobs of several calls an answer, against a scripted engine: whatever call they stop at, nothing kept is asked again."""

from __future__ import annotations

import json
import math
import os
import signal

import pyarrow.parquet as pq
import pytest

from components.contracts import Completion, Result, Usage, UserError
from components.decoding.rounds import Query, each_with_other
from components.store import Store
from framework.round_jobs import CALLS, run_round_job
from framework.runtime import Interrupted
from tests.framework.scripted import option, render, setting

METHODS = ("gsa", "choose_from_n", "universal_self_consistency", "self_consistency", "best_of_n", "self_refine")
OPTIONS = {"concurrency": 4, "max_attempts": 2, "grace_s": 5.0, "progress_s": 0.05}
SPACE = {"model": "none"}


class Scripted:
    """`reply` makes the text of a request; the last of a window is answered first. It gives up at call `stop_at`."""

    engine_id, capabilities = "scripted:test", frozenset()

    def __init__(self, stop_at=math.inf, reply=None, fails=()):
        self.stop_at, self.reply, self.fails, self.asked = stop_at, reply or said, fails, []

    async def stream(self, requests, *, concurrency):
        async for request in requests:
            if len(self.asked) == self.stop_at:
                raise UserError("engine: is not well")
            self.asked.append(request)
            prompt = bytes(request.prompt).decode()
            if any(word in prompt for word in self.fails):
                yield Result(request.id, [], Usage(), {}, self.engine_id, "refused: no")
                continue
            text = self.reply(prompt, request.params)
            done = Completion(list(text.encode()), text, [-0.1 * (1 + request.params.seed % 7)] * len(text.encode()), "stop")
            yield Result(request.id, [done], Usage(len(request.prompt), len(done.token_ids)), {"total": 0.5}, self.engine_id)


def said(prompt, params):
    """Depends on the prompt and the seed."""
    return f"{len(prompt)} is {params.seed % 5}" if params.temperature else f"Attempt {1 + len(prompt) % 3}"


def job(folder, engine, method, rows=5, **options):
    queries = ((i, Query(f"{i:032x}", f"Question {i % 4}?")) for i in range(rows))
    queries = ((i, query) for i, query in enumerate(each_with_other(query for _, query in queries)))
    with (
        Store.open(folder, space=SPACE, fsync_rows=1) as answers,
        Store.open(folder / CALLS, space=SPACE, fsync_rows=1) as calls,
    ):
        record, reused = run_round_job(
            queries, method, engine, answers, calls, render=render, setting=setting(), cost=lambda length: 2.0 * length,
            row=lambda query, record: {"text": record["text"], "trace": record}, total=rows, **{**OPTIONS, **options},
        )  # fmt: skip
        if len(answers) == rows:
            answers.finish(rows)
    return record, reused


def final(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "final").iterdir())}


def kept(folder):
    """Rows of the calls that are kept, in their order."""
    return [json.loads(line)["row"] for path in sorted((folder / CALLS / "parts").iterdir()) for line in path.read_text().splitlines()]


def test_between_the_rounds_only_the_aggregation_is_asked(tmp_path):
    """One query; the engine gives up when the second round begins."""
    method = option("gsa")
    with pytest.raises(UserError, match="is not well"):
        job(tmp_path, Scripted(stop_at=3), method, rows=1)
    assert [row["role"] for row in kept(tmp_path)] == ["sample"] * 3 and not (tmp_path / "final").exists()
    engine = Scripted()
    record, reused = job(tmp_path, engine, method, rows=1)
    assert len(engine.asked) == 1 and engine.asked[0].params.temperature == 0 and reused == 3 and record["done"] == 1
    assert [row["role"] for row in kept(tmp_path)] == ["sample"] * 3 + ["aggregate"]
    (row,) = pq.read_table(tmp_path / "final").to_pylist()
    trace = json.loads(row["trace"])
    assert trace["usage"]["calls"] == 4 and [call["role"] for call in trace["calls"]] == ["sample"] * 3 + ["aggregate"]
    assert all(text in bytes(engine.asked[0].prompt).decode() for text in trace["candidates"])


@pytest.mark.parametrize("name", METHODS)
def test_wherever_it_stops_nothing_is_asked_twice_and_no_byte_differs(tmp_path, name):
    whole = Scripted()
    job(tmp_path / "whole", whole, option(name))
    total = len(whole.asked)
    assert total == 5 * {"gsa": 4, "choose_from_n": 4, "universal_self_consistency": 4, "self_consistency": 4, "best_of_n": 4}.get(name, 3)
    for stop in range(0, total, 6):
        folder = tmp_path / f"stopped at {stop}"
        first, second = Scripted(stop_at=stop), Scripted()
        with pytest.raises(UserError, match="is not well"):
            job(folder, first, option(name))
        job(folder, second, option(name))
        assert len(first.asked) + len(second.asked) == total and {r.id for r in first.asked + second.asked} == {r.id for r in whole.asked}
        assert final(folder) == final(tmp_path / "whole")


def test_answers_are_those_of_the_same_rounds_without_a_store(tmp_path):
    from framework.decoding import run_queries
    from tests.framework.scripted import Scripted as Plain

    job(tmp_path, Scripted(), option("gsa"))
    found = [json.loads(row["trace"]) for row in pq.read_table(tmp_path / "final").to_pylist()]
    queries = list(each_with_other(Query(f"{i:032x}", f"Question {i % 4}?") for i in range(5)))
    plain = {
        trace.index: trace.record(lambda length: 2.0 * length)
        for trace in run_queries(option("gsa"), queries, Plain(said), render, setting())
    }
    assert found == [plain[i] for i in range(5)]


def test_what_was_stored_is_what_goes_on(tmp_path):
    """Half a character becomes U+FFFD in the store: the second round is shown that, whether or not there was a stop before it."""

    def reply(prompt, params):
        return "caf\ud83d" if params.temperature else ("seen" if "caf\ufffd" in prompt else "lost")

    class Cut(Scripted):
        async def stream(self, requests, *, concurrency):
            async for request in requests:
                self.asked.append(request)
                text = reply(bytes(request.prompt).decode(), request.params)
                yield Result(request.id, [Completion([], text, [], "stop")], Usage(1, 1), {}, self.engine_id)

    engine = Cut()
    job(tmp_path, engine, option("gsa"), rows=1)
    assert pq.read_table(tmp_path / "final")["text"].to_pylist() == ["seen"] and len(engine.asked) == 4


def test_a_call_that_fails_costs_one_attempt_of_its_query_alone(tmp_path):
    for attempt, given_up in ((1, 0), (2, 0), (3, 2)):
        engine = Scripted(fails=("Question 0?",))  # queries 0 and 4 ask it
        record, _ = job(tmp_path, engine, option("gsa"))
        assert (record["done"], record["failed"], record["given_up"]) == (3, 2, given_up)
        assert record["errors"] == ({"refused": 2} if attempt < 3 else {})
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert sorted((one["i"], one["attempt"]) for one in errors) == [(0, 1), (0, 2), (4, 1), (4, 2)]
    record, _ = job(tmp_path, Scripted(), option("gsa"), max_attempts=3)
    assert record["done"] == 5 and record["failed"] == 0


def test_a_signal_keeps_what_came(tmp_path):
    def reply(prompt, params):
        if len(engine.asked) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return said(prompt, params)

    engine = Scripted(reply=reply)
    with pytest.raises(Interrupted, match=r"of 400 answers are in"):
        job(tmp_path, engine, option("gsa"), rows=400)
    assert len(kept(tmp_path)) == len(engine.asked) < 100
    again = Scripted()
    job(tmp_path, again, option("gsa"), rows=400)
    assert len(again.asked) + len(engine.asked) == 1600


def test_queries_are_read_as_there_is_room(tmp_path):
    ahead, answered = [], [0]

    class Counted(Scripted):
        async def stream(self, requests, *, concurrency):
            async for result in super().stream(requests, concurrency=concurrency):
                answered[0] += 1
                yield result

    def queries():
        for i in range(300):
            ahead.append(i + 1 - answered[0] // 4)
            yield i, Query(f"{i:032x}", f"{i}?")

    with Store.open(tmp_path, space=SPACE) as answers, Store.open(tmp_path / CALLS, space=SPACE) as calls:
        run_round_job(queries(), option("gsa"), Counted(), answers, calls, render=render, setting=setting(), cost=None,
                      row=lambda query, record: record, total=300, **OPTIONS)  # fmt: skip
    assert max(ahead) <= OPTIONS["concurrency"] + 2


class Waiting(Scripted):
    """Reads four requests before it answers any."""

    async def stream(self, requests, *, concurrency):
        self.asked = [await anext(requests) for _ in range(4)]
        yield


def test_equal_queries_are_refused(tmp_path):
    with Store.open(tmp_path, space=SPACE) as answers, Store.open(tmp_path / CALLS, space=SPACE) as calls:
        twins = [(0, Query("ab" * 16, "x")), (1, Query("ab" * 16, "x"))]
        with pytest.raises(UserError, match=r"requests 0 and 1 .* are the same"):
            run_round_job(twins, option("gsa"), Waiting(), answers, calls, render=render, setting=setting(), cost=None,
                          row=lambda query, record: record, total=2, **OPTIONS)  # fmt: skip
