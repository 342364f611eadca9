"""The native engine as a service: requests that come while others run, each with its own parameters, its own error, its own account."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import torch

from components.contracts import Constraint, Request, SamplingParams, UserError
from components.data.tokenizers import bytes_tokenizer
from components.decoding.constraints import Constraints
from framework.build import build_model, compose
from framework.engines.native import NativeEngine

TOKENIZER = bytes_tokenizer()
EOT = TOKENIZER.eot_id
PARAMS = SamplingParams(max_new_tokens=8, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(compose("train", ["model=samba", "model/size=test", "data.seq_len=64"]), TOKENIZER.vocab_size).eval()


def engine(model, **options):
    return NativeEngine(model, TOKENIZER, **options)


def prompt(text="hello"):
    return [EOT, *text.encode()]


def answers(native, requests, concurrency=4, between=None):
    async def come():
        for request in requests:
            if between is not None:
                await between(request)
            yield request

    async def collect():
        return [result async for result in native.stream(come(), concurrency=concurrency)]

    return {result.request_id: result for result in asyncio.run(collect())}


def test_requests_have_parameters_of_their_own_and_say_what_they_say_alone(model):
    native = engine(model, max_batch=3)
    each = [replace(PARAMS, seed=seed, temperature=seed / 4, max_new_tokens=3 + seed) for seed in range(9)]
    prompts = [prompt("x" * (seed % 4)) for seed in range(9)]
    results = answers(native, [Request(str(i), prompts[i], each[i]) for i in range(9)])
    assert set(results) == set(map(str, range(9)))
    for i, completion in enumerate(native.generate(prompts, each)):
        assert results[str(i)].completions == [completion] and results[str(i)].error is None
        assert native.generate([prompts[i]], each[i]) == [completion]  # one for all: prompt 0 draws from (seed, 0) too


def test_n_completions_draw_from_seed_and_their_index(model):
    native = engine(model)
    result = answers(native, [Request("a", prompt(), PARAMS, n=5)])["a"]
    assert result.completions == native.generate([prompt()] * 5, PARAMS)
    assert len({tuple(completion.token_ids) for completion in result.completions}) == 5
    assert (result.usage.prompt, result.usage.completion, result.usage.cached) == (5 * 6, 5 * 8, 4 * 6)
    assert 0 <= result.latency["queued"] <= result.latency["first_token"] <= result.latency["total"]
    assert result.engine_id == native.engine_id


def test_a_request_that_cannot_be_answered_ends_nothing(model):
    native = engine(model, context_length=40)
    bad = {
        "long": Request("long", prompt("x" * 60), PARAMS),
        "text": Request("text", "hello", PARAMS),
        "messages": Request("messages", [{"role": "user", "content": "hi"}], PARAMS),
        "empty": Request("empty", [], PARAMS),
        "id": Request("id", [EOT, 10_000], PARAMS),
        "negative": Request("negative", [EOT, -1], PARAMS),
        "temperature": Request("temperature", prompt(), replace(PARAMS, temperature=-1.0)),
        "n": Request("n", prompt(), PARAMS, n=0),
        "constraint": Request("constraint", prompt(), replace(PARAMS, constraint=Constraint(regex="(a"))),
        "stop ids": Request("stop ids", prompt(), replace(PARAMS, stop_ids=(10**9,), min_new_tokens=2)),
    }
    good = [Request(f"good {i}", prompt("y" * i), PARAMS) for i in range(4)]
    mixed = [*good[:1], *bad.values(), *good[1:]]
    for concurrency in (1, 3):
        results = answers(native, mixed, concurrency)
        assert len(results) == len(mixed)
        for request in good:
            assert results[request.id].completions == native.generate([request.prompt], PARAMS)
        for name in bad:
            assert results[name].completions == [] and results[name].error and "\n" not in results[name].error
    assert "61 tokens and max_new_tokens=8 are more than the 40" in results["long"].error
    assert "token ids; engine=native takes nothing else" in results["text"].error
    assert results["stop ids"].error == "decode.stop_ids: 1000000000; the model knows 0 to 319"
    with pytest.raises(UserError, match=r"^decode.stop_ids: 1000000000; the model knows"):
        native.generate([prompt()], replace(PARAMS, stop_ids=(3, 10**9)))
    with pytest.raises(UserError, match="prompt 1: 61 tokens and max_new_tokens=8"):
        native.generate([prompt(), prompt("x" * 60)], PARAMS)
    with pytest.raises(ValueError, match="prompt 0 is not a list of token ids"):
        native.generate(["hello"], PARAMS)


def test_requests_arrive_while_others_run_and_no_more_than_were_allowed(model):
    native, under_way, most, total = engine(model, max_batch=2), set(), 0, 12

    async def come():
        nonlocal most
        for i in range(total):
            under_way.add(str(i))
            most = max(most, len(under_way))
            yield Request(str(i), prompt("z" * i), replace(PARAMS, max_new_tokens=2 + i % 3))
            if i == 5:
                await asyncio.sleep(0.2)  # nothing to do for a while

    async def collect():
        async for result in native.stream(come(), concurrency=3):
            under_way.discard(result.request_id)
            assert result.error is None

    asyncio.run(collect())
    assert not under_way and most == 3


def test_the_event_loop_goes_on_while_tokens_are_made(model):
    ticks = 0

    async def main():
        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        async def come():
            yield Request("a", prompt(), replace(PARAMS, max_new_tokens=30))

        other = asyncio.create_task(tick())
        found = [result async for result in engine(model).stream(come(), concurrency=1)]
        other.cancel()
        return found

    assert len(asyncio.run(main())[0].completions[0].token_ids) == 30
    assert ticks >= 30


def test_a_failing_step_fails_those_under_way_and_not_those_to_come(model, monkeypatch, caplog):
    native, calls = engine(model), []
    real = NativeEngine._round

    def once(self, batcher):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("device lost")
        return real(self, batcher)

    monkeypatch.setattr(NativeEngine, "_round", once)
    results = answers(native, [Request(str(i), prompt(), PARAMS) for i in range(3)], concurrency=1)
    assert results["0"].error == "RuntimeError: device lost" and "device lost" in caplog.text
    assert [results[name].error for name in "12"] == [None, None]
    monkeypatch.undo()
    assert results["2"].completions == native.generate([prompt()], PARAMS)


def test_a_request_that_cannot_be_prepared_fails_alone(model, monkeypatch, caplog):
    """Whatever goes wrong while its row is made; the others, under way already, go on."""
    native, real = engine(model), NativeEngine._row

    def row(self, asked, params, draw, name):
        if asked == prompt("broken"):
            raise IndexError("no such place")
        return real(self, asked, params, draw, name)

    monkeypatch.setattr(NativeEngine, "_row", row)
    texts = {"a": "hello", "broken": "broken", "b": "hello"}
    results = answers(native, [Request(name, prompt(text), PARAMS) for name, text in texts.items()])
    assert results["broken"].error == "IndexError: no such place" and "no such place" in caplog.text
    assert all(results[name].completions == native.generate([prompt()], PARAMS) for name in "ab")


def test_what_an_answer_is_held_to_is_compiled_beside_the_loop_and_the_others(model, monkeypatch):
    """The others are answered before it is ready; the event loop and the thread of the model are free."""
    native, ready, threads = engine(model), threading.Event(), []
    real = Constraints.machine

    def machine(self, *asked):
        threads.append(threading.current_thread())
        assert ready.wait(60)
        return real(self, *asked)

    monkeypatch.setattr(Constraints, "machine", machine)
    held = replace(PARAMS, ignore_eos=False, constraint=Constraint(choice=("yes", "no")))

    async def collect():
        async def come():
            yield Request("held", prompt(), held, n=2)
            for i in range(3):
                yield Request(str(i), prompt(), PARAMS)

        found = []
        async for result in native.stream(come(), concurrency=3):
            found.append(result)
            if len(found) == 3:
                ready.set()
        return found

    found = asyncio.run(collect())
    assert [result.request_id for result in found] == ["0", "1", "2", "held"] and [result.error for result in found] == [None] * 4
    assert {completion.text for completion in found[-1].completions} <= {"yes", "no"}
    assert len(threads) == 1 and threads[0] is not threading.main_thread() and "native-engine" not in threads[0].name


def test_an_error_of_the_requests_themselves_is_raised(model):
    async def come():
        yield Request("a", prompt(), PARAMS)
        raise KeyError("no such file")

    async def collect():
        return [result async for result in engine(model).stream(come(), concurrency=2)]

    with pytest.raises(KeyError, match="no such file"):
        asyncio.run(collect())


def test_a_stream_can_be_left_early(model):
    async def come():
        for i in range(100):
            yield Request(str(i), prompt(), PARAMS)

    async def first():
        results = engine(model).stream(come(), concurrency=4)
        async for result in results:
            await results.aclose()
            return result

    assert asyncio.run(first()).error is None


def test_what_is_cancelled_ends_and_what_is_over_or_unknown_stays_so(model):
    """A request that waits, one that is decoded, one that is over, and one of the same name as that: only the first two are cancelled."""
    native = engine(model, max_batch=1)
    long = replace(PARAMS, max_new_tokens=40)
    found, asked = [], asyncio.Queue()

    async def come():
        while (request := await asked.get()) is not None:
            yield request

    async def collect():
        native.cancel("a")  # nothing is asked yet
        asked.put_nowait(Request("a", prompt(), PARAMS))
        async for result in native.stream(come(), concurrency=3):
            found.append((result.request_id, result.error))
            if len(found) == 1:
                native.cancel("a")  # it is over
                for name in ("a", "decoded", "waits"):
                    asked.put_nowait(Request(name, prompt(name), PARAMS if name == "a" else long))
            elif len(found) == 2:
                native.cancel("decoded"), native.cancel("waits"), native.cancel("never asked")
                asked.put_nowait(Request("last", prompt(), PARAMS))
                asked.put_nowait(None)

    asyncio.run(collect())
    assert found[:2] == [("a", None)] * 2 and dict(found[2:]) == {"decoded": "cancelled", "waits": "cancelled", "last": None}
    assert not native._under_way


def test_stop_strings_constraints_and_alternatives_reach_the_rows(model):
    native = engine(model)
    free = native.generate([prompt()], PARAMS)[0]
    until = replace(PARAMS, ignore_eos=False)
    (held,) = native.generate([prompt()], replace(until, constraint=Constraint(choice=("yes", "no"))))
    assert held.text in ("yes", "no") and held.finish_reason == "stop"
    spelled = replace(until, max_new_tokens=20, constraint=Constraint(regex="abcdefgh"))
    assert native.generate([prompt()], spelled)[0].text == "abcdefgh" == "".join(native.pieces(prompt(), spelled))
    text = native.generate([prompt()], replace(PARAMS, max_new_tokens=40))[0].text
    stop = text[10:12]
    stopped = replace(PARAMS, max_new_tokens=40, stop=(stop,))
    (cut,) = native.generate([prompt()], stopped)
    assert (cut.text, cut.stop_reason, cut.finish_reason) == (text[: text.index(stop)], stop, "stop")
    assert "".join(native.pieces(prompt(), stopped)) == cut.text
    (told,) = native.generate([prompt()], replace(PARAMS, logprobs=3))
    assert told.token_ids == free.token_ids and [len(most) for most in told.alternatives] == [3] * 8
    for token, logprob, most in zip(told.token_ids, told.logprobs, told.alternatives, strict=True):
        assert token not in most or most[token] == pytest.approx(logprob, abs=1e-5)


def test_a_number_of_parameters_that_does_not_fit(model):
    with pytest.raises(ValueError, match="2 prompts and 1 sampling parameters"):
        engine(model).generate([prompt()] * 2, [PARAMS])
    with pytest.raises(UserError, match=r"^engine.kv_tokens: 0; at least 1"):
        engine(model, kv_tokens=0)
