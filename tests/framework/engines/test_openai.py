"""The client of OpenAI-compatible servers against servers that fail and lie. The real ones are in tests/serving."""

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hostile import honest, serving

from components.contracts import Completion, Request, Result, SamplingParams, Usage, UserError
from components.data.tokenizers import bytes_tokenizer
from framework.engines.building import identity
from framework.engines.openai import OpenAIEngine
from framework.engines.requests import THREAD, Breaker, EngineError, Retry, as_requests, each_of, row_seed, seconds_to_wait
from framework.jobs import answer_row
from framework.prompts import Request as FileRequest
from framework.tasks.answer import record

PARAMS = SamplingParams(max_new_tokens=4, seed=3)


def engine(server, attempts=4, window=1000, pauses=1, concurrency=4, context_length=None):
    return OpenAIEngine(
        bytes_tokenizer(),
        server.url,
        None,
        "NO_SUCH_KEY",
        context_length,
        concurrency,
        5.0,
        Retry(attempts, 0.001, 0.01),
        Breaker(window, 0.5, 0.05, pauses),
    )


def streamed(engine, requests, concurrency=4):
    async def collect():
        return [result async for result in engine.stream(each_of(requests), concurrency=concurrency)]

    return asyncio.run(collect())


def asked(count, n=1):
    return [Request(str(i), f"prompt {i}", PARAMS, n) for i in range(count)]


def failing(when, status=500, content=None, headers=None):
    """Honest while it is tried out, and afterwards but for the requests where `when(number)`, counted from 0."""
    begun = []

    def answer(path, body, number):
        if body["prompt"] == "1" or not str(body["prompt"]).startswith("prompt"):
            return honest(path, body, number)
        begun.append(number)
        if when(len(begun) - 1):
            return status, content if content is not None else {"error": {"message": "too busy"}}, headers or {}
        return honest(path, body, number)

    return answer


def test_an_honest_server_is_believed():
    with serving(honest) as server:
        able = engine(server)
        assert {"n", "seed", "logprobs", "token_ids", "ids"} <= able.capabilities
        assert able.model_id == "m" and able.context_length == 64
        results = streamed(able, asked(5, n=3))
        assert all(len(result.completions) == 3 and result.error is None for result in results)


def test_a_server_that_gives_one_answer_for_three_is_asked_three_times():
    def one(path, body, number):
        return honest(path, {**body, "n": 1}, number)

    with serving(one) as server:
        lame = engine(server)
        assert "n" not in lame.capabilities
        (result,) = streamed(lame, asked(1, n=3))
        assert len({completion.text for completion in result.completions}) == 3
        assert (result.usage.prompt, result.usage.completion) == (9, 6)
        assert all("n" not in body for body in server.seen[-3:])


def test_a_server_that_lies_after_it_was_tried_out():
    """Two of three answers: the third is asked for alone."""

    def liar(path, body, number):
        return honest(path, {**body, "n": min(body.get("n", 1), 2)}, number)

    with serving(liar) as server:
        (result,) = streamed(engine(server), asked(1, n=3))
        assert len(result.completions) == 3 and result.error is None


def test_a_server_that_goes_past_a_stop_string_is_cut():
    def deaf(path, body, number):
        return 200, {"choices": [{"text": "one. two; three", "finish_reason": "length"}], "usage": {}}, {}

    with serving(deaf) as server:
        params = SamplingParams(max_new_tokens=4, stop=(";", ". "))
        (result,) = streamed(engine(server), [Request("0", "prompt", params)])
        (found,) = result.completions
        assert (found.text, found.finish_reason, found.stop_reason) == ("one", "stop", ". ")


def test_fields_that_are_refused_are_never_sent():
    def strict(path, body, number):
        unknown = {"top_k", "min_p", "seed", "logprobs", "return_token_ids", "structured_outputs", "ignore_eos"} & set(body)
        return (422, {"detail": f"extra fields {unknown}"}, {}) if unknown else honest(path, body, number)

    with serving(strict) as server:
        plain = engine(server)
        assert not plain.capabilities & {"seed", "logprobs", "top_k", "choice"}
        (result,) = streamed(plain, [Request("0", "prompt", SamplingParams(max_new_tokens=4, top_k=3))])
        assert result.error.startswith("unsupported") and "decode.top_k" in result.error
        assert streamed(plain, asked(1))[0].error is None


@pytest.mark.parametrize("status", [429, 503, 500])
def test_a_server_that_is_busy_while_it_is_tried_out_can_do_no_less(status):
    def busy(path, body, number):
        return (status, {}, {"retry-after": "0"}) if number % 2 == 0 else honest(path, body, number)

    with serving(honest) as well, serving(busy) as server:
        assert engine(server).capabilities == engine(well).capabilities


def test_a_server_that_stays_busy_is_not_taken_for_one_that_can_do_nothing():
    with (
        serving(lambda path, body, number: (429, {}, {}) if number == 6 or "seed" in body else honest(path, body, number)) as server,
        pytest.raises(UserError, match=r"answered 429, 4 time\(s\); what it can do was not found out"),
    ):
        engine(server)


def deaf_to_seeds(path, body, number):
    return honest(path, {key: value for key, value in body.items() if key != "seed"}, number)


def test_seeds_that_have_no_effect_are_mentioned_once_and_only_where_they_should_have_one(capsys):
    with serving(deaf_to_seeds) as server:
        client = engine(server)
        streamed(client, [Request("0", "prompt", SamplingParams(max_new_tokens=4, temperature=0.0))])
        assert "seed" not in client.capabilities and not capsys.readouterr().err
        streamed(client, asked(3))
        assert capsys.readouterr().err.count(f"{server.url} ignores seeds") == 1


def test_stop_ids_are_sent_or_refused():
    def strict(path, body, number):
        return (422, {}, {}) if "stop_token_ids" in body else honest(path, body, number)

    request = Request("0", "prompt", SamplingParams(max_new_tokens=4, stop_ids=(7,)))
    with serving(strict) as server:
        assert streamed(engine(server), [request])[0].error.endswith("does not take decode.stop_ids")
    with serving(honest) as server:
        assert streamed(engine(server), [request])[0].error is None and 7 in server.seen[-1]["stop_token_ids"]


def test_log_probabilities_that_were_promised_are_asked_for_again():
    bare = {"choices": [{"text": "said", "finish_reason": "stop"}]}
    with serving(failing(lambda i: i == 0, 200, bare)) as server:
        client = engine(server)
        (result,) = streamed(client, asked(1))
        assert result.completions[0].logprobs and client.counts["bad_answer"] == 1


def test_a_model_may_move_but_not_change_what_it_can_do():
    with serving(honest) as here, serving(honest) as there, serving(deaf_to_seeds) as other:
        first, moved, unseeded = (identity(engine(server), None) for server in (here, there, other))
    assert first == moved != unseeded and first["engine"] == ["openai", "m", "None"]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_passing_troubles_are_waited_out(status):
    with serving(failing(lambda i: i < 2, status)) as server:
        client = engine(server)
        (result,) = streamed(client, asked(1))
        assert result.error is None and client.counts[f"http_{status}"] == 2 and client.counts["retries"] == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_no_attempt_mends_is_not_tried_again(status):
    with serving(failing(lambda i: i == 0, status)) as server:
        client = engine(server)
        results = {result.request_id: result for result in streamed(client, asked(3), concurrency=1)}
        assert results["0"].error == f"http_{status}: {server.url} answered {status}: too busy" and client.counts["retries"] == 0
        assert results["1"].error is None and results["2"].error is None


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_key_or_a_model_that_is_gone_ends_the_job(status):
    with (
        serving(failing(lambda i: i == 2, status)) as server,
        pytest.raises(UserError, match=f"answered {status}: too busy; every request"),
    ):
        streamed(engine(server), asked(9), concurrency=1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"choices": null}', b'{"choices": [{}]}', b'{"choices": []}', b"<html>"])
def test_an_answer_that_is_none(content):
    with serving(failing(lambda i: i == 0, 200, content)) as server:
        client = engine(server)
        (result,) = streamed(client, asked(1))
        assert result.error is None and client.counts["bad_answer"] == 1


def test_the_server_says_how_long_to_wait():
    with serving(failing(lambda i: i == 0, 429, headers={"retry-after": "0.3"})) as server:
        began = time.monotonic()
        assert streamed(engine(server), asked(1))[0].error is None
        assert time.monotonic() - began >= 0.3


def test_waits_are_seconds_or_dates():
    later = datetime.now(UTC) + timedelta(seconds=1000)
    assert 500 < seconds_to_wait(format_datetime(later, usegmt=True)) <= 1000
    found = [seconds_to_wait(text) for text in ("2", "0.5", "", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct 2015")]
    assert found == [2.0, 0.5, None, 0.0, None]


def test_attempts_end():
    with serving(failing(lambda i: True, 503)) as server:
        (result,) = streamed(engine(server, attempts=3), asked(1))
        assert result.error.startswith("http_503") and not result.completions


def test_a_storm_ends_the_job_with_one_line():
    with serving(failing(lambda i: True, 429)) as server:
        client = engine(server, attempts=100, window=10, pauses=2)
        with pytest.raises(
            UserError, match=r"engine: 10 of the last 10 requests failed \(http_429 10\), also after 2 pauses of 0.05 s; what"
        ):
            streamed(client, asked(50), concurrency=8)


def test_a_window_of_requests_is_read_ahead_no_further():
    read = []

    async def source():
        for request in asked(100):
            read.append(request.id)
            yield request

    async def first(client):
        async for _ in client.stream(source(), concurrency=3):
            return

    with serving(honest) as server:
        asyncio.run(first(engine(server)))
        assert len(read) <= 6


def test_leaving_early_leaves_nothing_running():
    with serving(honest) as server:
        client = engine(server)
        tried = len(server.seen)
        found = client.completions(["prompt"] * 500, PARAMS)
        next(found)
        found.close()
        assert len(server.seen) - tried < 250 and not any(thread.name == THREAD for thread in threading.enumerate())


def test_who_is_not_there():
    with serving(honest) as server:
        url = server.url
    with pytest.raises(UserError, match=f"engine.base_url: {url} does not answer"):
        OpenAIEngine(None, url, None, "", None, 1, 1.0, Retry(1, 0, 0), Breaker(1, 1, 0, 0))


def test_a_model_that_is_not_there():
    with serving(honest) as server, pytest.raises(UserError, match=r"engine.name: 'mm'; .* offers m; did you mean 'm'\?"):
        OpenAIEngine(None, server.url, "mm", "", None, 1, 1.0, Retry(1, 0, 0), Breaker(1, 1, 0, 0))


def test_too_long_a_prompt_is_not_sent():
    with serving(honest) as server:
        client = engine(server)
        sent = len(server.seen)
        (result,) = streamed(client, [Request("0", [256] * 62, PARAMS)])
        assert result.error.startswith("too_long: 62 tokens and max_new_tokens=4 are more than the 64 that") and len(server.seen) == sent


def test_a_limit_of_ones_own_counts_where_it_is_lower():
    """For servers that say none, or that take anything and cut it."""
    with serving(honest) as server:
        assert engine(server, context_length=32).context_length == 32 and engine(server, context_length=128).context_length == 64
        with pytest.raises(UserError, match=r"engine\.context_length: 0; at least 1"):
            engine(server, context_length=0)


def test_no_log_probabilities_are_none_in_a_row_never_0_which_would_be_certainty():
    (request,), said = asked(1), Completion([], "ab", [], "stop")
    assert answer_row(request, Result(request.id, [said], Usage(), {}, "openai:x"))["logprob"] is None
    assert record(FileRequest(0, "prompt 0", ""), 0, said, 0.0)["logprob"] is None


LONG = [
    (400, {"error": {"message": "This model's maximum context length is 64 tokens. However, you requested 70", "code": 400}}),
    (400, {"error": {"message": "The decoder prompt (length 70) is longer than the maximum model length of 64."}}),
    (400, {"error": {"message": "the request exceeds the available context size. try increasing the context size"}}),
    (413, {"message": "prompt is too long"}),
    (422, b"Input is too long for requested model."),
    (400, {"error": {"message": "too_long: prompt: 61 tokens and max_new_tokens=4 are more than the 64"}}),
]


@pytest.mark.parametrize(("status", "content"), LONG)
def test_a_servers_own_words_for_too_long(status, content):
    with serving(failing(lambda i: i == 0, status, content)) as server:
        client = engine(server)
        results = {result.request_id: result for result in streamed(client, asked(2), concurrency=1)}
        assert results["0"].error.startswith(f"too_long: {server.url} answered {status}: ") and client.counts["retries"] == 0
        assert results["1"].error is None


def test_a_refused_field_whose_prompt_speaks_of_context_length_is_not_too_long():
    with serving(failing(lambda i: True, 422, {"detail": [{"loc": ["body", "x"], "input": {"prompt": "context length"}}]})) as server:
        (result,) = streamed(engine(server), asked(1))
        assert result.error.startswith("http_422")


def test_seeds_of_rows():
    found = {row_seed(seed, row) for seed in range(30) for row in range(30)}
    assert len(found) == 900 and all(0 <= one < 2**63 for one in found)
    assert [r.params.seed for r in as_requests(["a", "b"], PARAMS)] == [row_seed(3, 0), row_seed(3, 1)]


def test_jitter_stays_below_the_cap():
    retry, error = Retry(9, 1.0, 3.0), EngineError("x", "x", True)
    waits = [retry.wait(attempt, error) for attempt in range(8) for _ in range(50)]
    assert max(waits) <= 3.0 and len(set(waits)) > 300
    assert retry.wait(0, EngineError("x", "x", True, retry_after=7.0)) == 7.0
