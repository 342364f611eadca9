"""Prompts that leave no room for their answer: refused, cut on the left or passed over, for every engine alike, and never silently."""

import asyncio
from dataclasses import replace

import pytest
import torch
from hostile import honest, serving
from test_openai import LONG, failing
from test_openai import engine as client_of

from components.contracts import Completion, Request, Result, SamplingParams, Usage, UserError
from components.data.tokenizers import bytes_tokenizer
from framework.build import build_model, compose
from framework.engines.fitting import figures, fitted, words
from framework.engines.native import NativeEngine
from framework.engines.requests import each_of

TOKENIZER = bytes_tokenizer()
EOT = TOKENIZER.eot_id
PARAMS = SamplingParams(max_new_tokens=8, seed=3, ignore_eos=True)
ASKED = replace(PARAMS, ignore_eos=False)  # what the made-up server takes
LIMIT = 40  # so that prompts of 32 tokens fit
SHORT, FITS, LONGER = [EOT, *b"hello"], [EOT, *b"x" * 31], [EOT, *b"0123456789abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def native():
    torch.manual_seed(0)
    model = build_model(compose("train", ["model=phi4mini", "model/size=test", "data.seq_len=64"]), TOKENIZER.vocab_size).eval()
    return NativeEngine(model, TOKENIZER, context_length=LIMIT)


def under(engine, policy, tokenizer=TOKENIZER):
    return fitted(engine, policy, tokenizer)


def streamed(engine, requests, concurrency=4):
    async def collect():
        return {result.request_id: result async for result in engine.stream(each_of(requests), concurrency=concurrency)}

    return asyncio.run(collect())


def test_error_is_the_engine_itself(native):
    assert under(native, "error") is native
    with pytest.raises(UserError, match=r"too_long: prompt 1: 37 tokens and max_new_tokens=8 are more than the 40 .*too_long=skip"):
        native.generate([SHORT, LONGER], PARAMS)
    results = streamed(native, [Request("long", LONGER, PARAMS), Request("short", SHORT, PARAMS)])
    assert results["long"].error.startswith("too_long:") and not results["long"].completions and results["short"].error is None


def test_cut_prompts_keep_their_start_and_their_end(native):
    engine = under(native, "truncate_left")
    cut = [EOT, *LONGER[-31:]]
    found = engine.generate([SHORT, LONGER, FITS], PARAMS)
    assert found[1].prompt_cut == 5 and found[0].prompt_cut == found[2].prompt_cut == 0
    assert [one.token_ids for one in found] == [one.token_ids for one in native.generate([SHORT, cut, FITS], PARAMS)]
    assert found[1].token_ids != native.generate([SHORT, LONGER[:32], FITS], PARAMS)[1].token_ids  # the end counts, not the beginning
    assert figures(engine) == {"prompts_cut": 1, "prompts_skipped": 0}
    assert words(figures(engine)) == "prompts too long for the engine: 1 cut on the left"


def test_a_prompt_that_is_passed_over_moves_no_other(native):
    """Not its place and not its random numbers: they say what they say beside a prompt that fits."""
    engine = under(native, "skip")
    for params in (PARAMS, [replace(PARAMS, seed=seed) for seed in range(4)]):
        found = engine.generate([SHORT, LONGER, FITS, SHORT], params)
        whole = native.generate([SHORT, SHORT, FITS, SHORT], params)
        assert [found[i].token_ids for i in (0, 2, 3)] == [whole[i].token_ids for i in (0, 2, 3)]
        assert (found[1].finish_reason, found[1].text, found[1].token_ids) == ("skipped", "", [])
        assert "37 tokens and max_new_tokens=8 are more than the 40" in found[1].stop_reason
    assert engine.generate([LONGER] * 2, PARAMS)[1].finish_reason == "skipped"  # nothing goes out at all
    assert figures(engine)["prompts_skipped"] == 4 and figures(native) == {} and words({}) == ""


@pytest.mark.parametrize("policy", ["truncate_left", "skip"])
def test_a_stream_answers_each_request_once(native, policy):
    engine = under(native, policy)
    requests = [Request(str(i), LONGER if i % 3 == 0 else SHORT, replace(PARAMS, seed=i), n=2) for i in range(12)]
    results = streamed(engine, requests)
    assert set(results) == {request.id for request in requests} and all(result.error is None for result in results.values())
    plain = streamed(native, [request for request in requests if request.prompt == SHORT])
    for request in requests:
        result = results[request.id]
        assert len(result.completions) == 2
        if request.prompt == SHORT:
            assert result.completions == plain[request.id].completions
        elif policy == "skip":
            assert {one.finish_reason for one in result.completions} == {"skipped"} and result.usage == Usage()
        else:
            assert [one.prompt_cut for one in result.completions] == [5, 5] and result.usage.prompt == 2 * 32


def test_only_long_requests_end_and_are_not_read_ahead_of_who_hears_of_them(native):
    engine, read, heard = under(native, "skip"), [], []

    async def come():
        for i in range(300):
            read.append(i)
            yield Request(str(i), LONGER, PARAMS)

    async def collect():
        async for result in engine.stream(come(), concurrency=4):
            heard.append(result.request_id)
            assert len(read) - len(heard) <= 8

    asyncio.run(collect())
    assert sorted(map(int, heard)) == list(range(300))


def test_a_request_that_is_passed_over_waits_for_no_other():
    """Its asker may send the next one only after it."""

    class Slow:
        context_length, engine_id, capabilities = LIMIT, "scripted:slow", frozenset()

        async def stream(self, requests, *, concurrency, on_piece=None):
            async for request in requests:
                yield Result(request.id, [Completion([], "x", [], "stop")], Usage(), {}, self.engine_id)

    async def collect():
        coming = asyncio.Queue()
        coming.put_nowait(Request("long", LONGER, PARAMS))

        async def come():
            while (request := await coming.get()) is not None:
                yield request

        names = []
        async for result in under(Slow(), "skip").stream(come(), concurrency=2):
            names.append(result.request_id)
            coming.put_nowait(Request("next", SHORT, PARAMS) if result.request_id == "long" else None)
        return names

    assert asyncio.run(asyncio.wait_for(collect(), 20)) == ["long", "next"]


@pytest.mark.parametrize("policy", ["truncate_left", "skip"])
def test_an_error_of_the_source_is_raised_and_leaves_nothing_behind(native, policy):
    async def broken():
        yield Request("0", SHORT, PARAMS)
        raise RuntimeError("the file is gone")

    async def collect():
        async for _ in under(native, policy).stream(broken(), concurrency=2):
            pass

    with pytest.raises(RuntimeError, match="the file is gone"):
        asyncio.run(collect())


def test_no_room_for_any_prompt_is_an_empty_answer_that_says_so(native):
    (found,) = under(native, "truncate_left").generate([SHORT], replace(PARAMS, max_new_tokens=LIMIT))
    assert found.finish_reason == "skipped" and "6 tokens and max_new_tokens=40" in found.stop_reason


def test_a_character_is_not_cut_through(native):
    prompt = [EOT, *"aé漢😀".encode() * 4]  # 1, 2, 3 and 4 bytes
    for new in range(1, 40):
        fit = under(native, "truncate_left").fit(prompt, replace(PARAMS, max_new_tokens=new))
        text = TOKENIZER.decode(fit.prompt[1:])
        assert "\ufffd" not in text and ("aé漢😀" * 4).endswith(text) and len(fit.prompt) + fit.cut == len(prompt)
        assert max(LIMIT - new - 3, 1) <= len(fit.prompt) <= LIMIT - new


def test_pieces_of_the_terminal(native):
    assert list(under(native, "skip").pieces(LONGER, PARAMS)) == []
    cut = under(native, "truncate_left")
    assert "".join(cut.pieces(LONGER, PARAMS)) == native.generate([[EOT, *LONGER[-31:]]], PARAMS)[0].text
    assert figures(cut)["prompts_cut"] == 1


def test_another_word():
    with pytest.raises(UserError, match=r"too_long: 'truncate' is not one of error, truncate_left, skip; did you mean 'truncate_left'\?"):
        fitted(None, "truncate", None)


def test_a_server_is_asked_for_what_is_left_of_a_prompt():
    with serving(honest) as server:
        client = client_of(server)  # it says that it takes 64
        prompt, sent = [EOT, *range(97, 97 + 70)], len(server.seen)
        results = streamed(fitted(client, "truncate_left", TOKENIZER), [Request("0", prompt, ASKED)])
        (body,) = server.seen[sent:]
        assert body["prompt"] == [EOT, *prompt[-55:]] and results["0"].completions[0].prompt_cut == 15
        sent = len(server.seen)
        assert streamed(fitted(client, "skip", TOKENIZER), [Request("0", prompt, ASKED)])["0"].completions[0].finish_reason == "skipped"
        assert len(server.seen) == sent


@pytest.mark.parametrize(("status", "content"), LONG)
def test_a_server_that_refuses_what_nobody_here_can_count(status, content):
    """A text without a tokenizer: its own refusal has the same outcome."""
    with serving(failing(lambda i: i % 2 == 0, status, content)) as server:
        engine = fitted(client_of(server), "skip", None)
        results = streamed(engine, [Request(str(i), f"prompt {i}", ASKED, n=2) for i in range(2)], concurrency=1)
        assert [one.finish_reason for one in results["0"].completions] == ["skipped"] * 2 and results["0"].error is None
        assert f"answered {status}" in results["0"].completions[0].stop_reason and results["1"].completions[0].finish_reason == "stop"
        found = fitted(client_of(server, concurrency=1), "skip", None).generate(["prompt 0", "prompt 1"], ASKED)
        assert [one.finish_reason for one in found] == ["skipped", "stop"]
        refused = streamed(fitted(client_of(server), "truncate_left", None), [Request("0", "prompt 0", ASKED)])["0"]
        assert refused.error.startswith("too_long: ") and not refused.completions  # nobody can cut it: an error, never a silent loss
