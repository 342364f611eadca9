"""The group `executor` without a cluster (slow tests have one): what is wired, how a feed becomes Datasets, what a worker does."""

from __future__ import annotations

import asyncio
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import generate as entry_point
from components.contracts import CANCELLED, Completion, Request, Result, SamplingParams, Usage, UserError
from framework.build import build, compose, load_run
from framework.engines.fitting import fitted
from framework.engines.native import NativeEngine
from framework.engines.requests import as_requests, each_of
from framework.executors.ray import join
from framework.executors.ray_engine import LOST, Options, RayEngine
from framework.executors.ray_worker import SAID, SILENT, Recipe, Worker, described
from tests.framework.test_generate import make_run

ABOUT = {"engine_id": "e", "model_id": "m", "tokenizer_id": "t", "capabilities": frozenset({"n", "pieces"}), "context_length": 9}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_run(home / "run", "model=phi4mini", "data=text", f"data.path={__file__}", "data.tokenizer.kind=bytes")
    return home


@pytest.fixture(scope="module")
def native(home):
    run = load_run(home / "run")
    return NativeEngine(run.model, run.tokenizer, max_batch=4)


def request(number: int, **changed: Any) -> Request:
    return Request(f"r{number}", [256, 65 + number], SamplingParams(max_new_tokens=4 + number % 5, seed=number), **changed)


def through(engine, requests, **options) -> dict[str, Result]:
    async def collect():
        return {result.request_id: result async for result in engine.stream(requests, concurrency=8, **options)}

    return asyncio.run(collect())


def test_local_is_an_engine_round_the_live_run(home):
    run, config = load_run(home / "run"), compose("generate", [])
    engine = build(config.executor).engine(config, run, home / "cache")
    assert isinstance(engine, NativeEngine) and engine.model is run.model


MISTAKES = [
    ("workers", 0, "executor.workers: 0; at least 1 is allowed"),
    ("cpus_per_worker", 0, "executor.cpus_per_worker: 0; above 0"),
    ("cpus_per_worker", 1.5, "executor.cpus_per_worker: 1.5; above 0, and a whole number where it is more than 1"),
    ("gpus_per_worker", -1, "executor.gpus_per_worker: -1"),
    ("batch_size", 0, "executor.batch_size: 0"),
    ("window", 0, "executor.window: 0"),
    ("object_store_bytes", 1, "executor.object_store_bytes: 1; Ray needs at least"),
]


def test_values_that_are_not_allowed():
    config = compose("generate", ["executor=ray"])
    for key, value, line in MISTAKES:
        with pytest.raises(UserError) as refused:
            build({**config.executor, key: value})
        assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prompt=x", "executor.workers=100000"], "executor.workers: 100000, each with 1 CPU, but this machine has"),
        (["prompt=x", "executor.gpus_per_worker=100000"], "executor.workers: 1, each with 1 CPU and 100000 GPU, but this machine has"),
        (["task=serve"], "executor: this task works with a model in its own process; take executor=local"),
    ],
)
def test_mistakes_are_one_line_before_a_cluster_starts(home, tmp_path, capfd, words, line):
    places = [f"ckpt={home / 'run'}", f"hydra.run.dir={tmp_path / 'out'}", f"paths.cache_dir={tmp_path}", "executor=ray"]
    assert entry_point.main([*places, *words]) == 2
    err = capfd.readouterr().err
    assert f"error: {line}" in err and err.count("error:") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster(address):
    with pytest.raises(UserError, match=f"executor.address: no cluster at '{address}' .*; give auto or HOST:PORT"):
        join(address, {})


def test_without_ray_the_extra_is_named(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    config = compose("generate", ["executor=ray", f"ckpt={home / 'run'}"])
    with pytest.raises(UserError, match=r"executor: ray is not installed .*pip install 'patchbay\[ray\]', or take executor=local"):
        build(config.executor).engine(config, load_run(home / "run"), home / "cache")


def test_a_copy_is_the_engine_that_local_makes(home, native):
    """What a store compares: the description of a worker's engine, made from the pickled recipe."""
    config = compose("generate", ["executor=ray", f"ckpt={home / 'run'}"])
    run = load_run(home / "run")
    recipe = pickle.loads(pickle.dumps(Recipe.of(config, run.file, Path("cache"))))
    assert recipe.config["ckpt"] == str(home / "run/checkpoints/step000007.ckpt") and recipe.cache_dir.is_absolute()
    local = build(config.engine, run.model, run.tokenizer)
    assert described(recipe) == {name: getattr(local, name) for name in SAID if hasattr(local, name)}
    broken = Recipe({**recipe.config, "ckpt": str(home / "gone")}, recipe.cache_dir)
    assert str(described(broken)).startswith("ckpt: ") and "does not exist" in str(described(broken))


def test_parts_of_a_call_draw_what_the_whole_draws(native):
    prompts, params = [[256, 65]] * 6, SamplingParams(max_new_tokens=8, seed=3)
    whole = native.generate(prompts, params)
    assert len({tuple(one.token_ids) for one in whole}) > 1
    parts = {begin + index: one for begin in (0, 4) for index, one in native.completions(prompts[begin : begin + 4], params, first=begin)}
    assert [parts[index] for index in range(6)] == whole
    assert [one.params for one in as_requests(prompts, params)[4:]] == [one.params for one in as_requests(prompts[4:], params, first=4)]


class Windows(RayEngine):
    """Datasets that are lists: `reply(request)` or an exception, in the reverse order."""

    def __init__(self, reply=None, window=100):
        super().__init__(Recipe({}, Path()), Options(2, 1.0, 0.0, 4, window), ABOUT, lambda: self.seen.append("closed"))
        self.reply, self.seen = reply or answer, []

    def _answers(self, kind, asks, concurrency, params):
        self.seen.append([ask.id for ask in asks])
        for found in map(self.reply, reversed(asks)):
            if isinstance(found, BaseException):
                raise found
            if found is not None:
                yield found


def answer(asked: Request) -> Result:
    return Result(asked.id, [Completion([1], "a", [-1.0], "stop")], Usage(2, 1), {}, "e")


def test_a_feed_becomes_windows():
    engine = Windows(window=4)
    assert len(through(engine, each_of(request(i) for i in range(10)))) == 10
    assert engine.seen == [[f"r{i}" for i in some] for some in (range(4), range(4, 8), range(8, 10))]
    assert engine.capabilities == {"n"} and (engine.engine_id, engine.model_id, engine.context_length) == ("e", "m", 9)
    engine.close()
    engine.close()
    assert engine.seen[3:] == ["closed"]


def test_a_feed_that_waits_for_answers_gets_them():
    """As a decoding in rounds does: no more is given before what was given is answered."""

    async def run():
        engine, answered, more = Windows(), 0, asyncio.Event()

        async def rounds():
            for begin in (0, 3, 6):
                for number in range(begin, begin + 3):
                    yield request(number)
                while answered < begin + 3:
                    more.clear()
                    await more.wait()

        async for _ in engine.stream(rounds(), concurrency=1):
            answered += 1
            more.set()
        return engine.seen

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [["r0", "r1", "r2"], ["r3", "r4", "r5"], ["r6", "r7", "r8"]]


def test_lost_cancelled_and_pieces():
    engine, pieces = Windows(lambda asked: None if asked.id == "r1" else answer(asked)), []
    engine.cancel("r2")
    found = through(engine, each_of(request(i) for i in range(4)), on_piece=lambda who, i, piece: pieces.append((who, i, piece.text)))
    assert {name: result.error for name, result in found.items()} == {"r0": None, "r1": LOST, "r2": CANCELLED, "r3": None}
    assert engine.seen == [["r0", "r1", "r3"]] and sorted(pieces) == [("r0", 0, "a"), ("r3", 0, "a")]
    assert through(engine, each_of([request(2)]))["r2"].error is None  # of the stream that has ended


def test_what_gives_up_ends_the_stream():
    with pytest.raises(UserError, match="the server is gone"):
        through(Windows(lambda asked: UserError("the server is gone")), each_of([request(0)]))

    async def broken():
        yield request(0)
        raise OSError("no more prompts")

    with pytest.raises(OSError, match="no more prompts"):
        through(Windows(), broken())


@dataclass
class Given:
    """A recipe whose engine is there already."""

    made: Any

    def engine(self):
        return self.made


def blocks(worker: Worker, *asked: list[Any]) -> list[list[Any]]:
    """What comes back of blocks that are given at the same time."""

    async def one(asks):
        rows = {"ask": np.array([pickle.dumps(ask) for ask in asks], dtype=object)}
        return [pickle.loads(said) async for batch in worker(rows) for said in batch["said"]]

    async def all_of_them():
        return await asyncio.gather(*map(one, asked))

    return asyncio.run(all_of_them())


def comparable(result: Result) -> tuple[Any, ...]:
    return result.request_id, result.completions, result.usage, result.error


def test_blocks_share_a_stream_and_change_no_answer(native):
    requests = [request(i) for i in range(9)] + [Request("bad", [], SamplingParams()), request(9, n=2)]
    expected = through(native, each_of(requests))
    worker = Worker(Given(native), "stream", 16, None)  # type: ignore[arg-type]
    before = native.diagnostics()["tokens"]
    found = blocks(worker, requests[:6], requests[6:], requests[:2])  # the last as after a lost connection
    said = [one for block in found for one in block if isinstance(one, Result)]
    assert len(said) == 13 and found[1][3].error and len(found[1][4].completions) == 2
    assert all(comparable(one) == comparable(expected[one.request_id]) for one in said)
    figures = [one["tokens"] for block in found for one in block if isinstance(one, dict)]
    assert len(figures) == 3 and sum(figures) - before == native.diagnostics()["tokens"] - before


def test_completions_and_scores_of_a_block(native):
    params, prompts = SamplingParams(max_new_tokens=6, seed=5), [[256, 65 + i] for i in range(5)]
    whole = native.generate(prompts, params)
    worker = Worker(Given(native), "completions", 4, params)  # type: ignore[arg-type]
    (found,) = blocks(worker, [(place, prompts[place], None) for place in (2, 3, 4)])
    assert dict(found[:-1]) == {place: whole[place] for place in (2, 3, 4)}
    (found,) = blocks(Worker(Given(native), "score", 4, None), [(7, [256, 65, 66])])  # type: ignore[arg-type]
    assert found[0][0] == 7 and np.array_equal(found[0][1], native.score([[256, 65, 66]])[0].numpy())


@pytest.mark.parametrize("window", [4, 100])
def test_prompts_that_are_passed_over_ask_nobody_and_move_no_other(native, window):
    """The policy stands round the executor's engine: its holes go through Datasets, and a Dataset of holes alone is not begun."""

    class Blocks(Windows):
        def _answers(self, kind, asks, concurrency, params):
            self.seen.append(len(asks))
            for begin in range(0, len(asks), 3):
                (found,) = blocks(Worker(Given(native), kind, concurrency, params), asks[begin : begin + 3])  # type: ignore[arg-type]
                yield from found[:-1]

    engine, short, long = Blocks(window=window), [256, 65], [256] * 8
    each = [SamplingParams(max_new_tokens=4, seed=seed, ignore_eos=True) for seed in range(10)]
    places = (0, 2, 8, 9)
    prompts = [short if place in places else long for place in range(10)]
    for params in (each[3], each):
        found, whole = fitted(engine, "skip", None).generate(prompts, params), native.generate([short] * 10, params)
        assert [one.finish_reason == "skipped" for one in found] == [place not in places for place in range(10)]
        assert all(found[place] == whole[place] for place in places)
    assert engine.seen == ([4, 2] * 2 if window == 4 else [10] * 2)


class Breaking:
    engine_id = "breaking"

    def __init__(self, error):
        self.error, self.streams = error, 0

    async def stream(self, requests, *, concurrency):
        self.streams += 1
        async for asked in requests:
            if self.streams > 1:
                yield answer(asked)
            elif self.error is not None:
                raise self.error
            else:
                return


def test_an_engine_that_breaks_is_told_and_asked_again():
    for error, kind, text in ((UserError("gone"), UserError, "gone"), (ValueError("odd"), RuntimeError, "ValueError: odd")):
        worker = Worker(Given(Breaking(error)), "stream", 4, None)  # type: ignore[arg-type]

        async def twice(worker=worker):
            rows = {"ask": np.array([pickle.dumps(request(0))], dtype=object)}
            return [[pickle.loads(said) async for batch in worker(rows) for said in batch["said"]] for _ in range(2)]

        (told, _), (again, _) = asyncio.run(twice())
        assert type(told) is kind and str(told) == text and again.error is None
    (found,) = blocks(Worker(Given(Breaking(None)), "stream", 4, None), [request(0)])  # type: ignore[arg-type]
    assert found[0].error == SILENT
