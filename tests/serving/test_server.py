"""task=serve as a process of its own, spoken to by OpenAI's own client."""

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from engines import make_run, node, served

from components.contracts import Constraint, Piece, SamplingParams, UserError
from framework import server
from framework.build import build, compose, load_run
from framework.decoding import setting_of, traced
from framework.engines.building import build_engine
from framework.generate import run_renderer
from framework.server_forms import ChatForm
from framework.server_rounds import InRounds
from framework.tasks.serve import Serve

GSA = ["decode=gsa", "decode.n=2", "decode.sampler.temperature=1.0"]  # the run is a second model, which answers with it
KEY = "secret"
WHOLE = {"extra_body": {"ignore_eos": True}}  # all tokens that were asked for


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(make_run(tmp_path_factory.mktemp("home") / "run"))


@pytest.fixture(scope="module")
def client(run):
    with served(run, "engine.context_length=30000", *GSA, key=KEY) as url:
        yield openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)


def test_models(client):
    assert [model.id for model in client.models.list().data] == ["run", "gsa:run"]


def test_a_completion(client):
    answer = client.completions.create(
        model="run", prompt="Once", max_tokens=12, n=3, seed=5, logprobs=2, temperature=1.0, top_p=1.0, **WHOLE
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens == 36
    assert all(len(choice.logprobs.token_logprobs) == 12 and len(choice.logprobs.top_logprobs[0]) == 2 for choice in answer.choices)
    again = client.completions.create(model="run", prompt="Once", max_tokens=12, n=3, seed=5, temperature=1.0, top_p=1.0, **WHOLE)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices] and again.choices[0].logprobs is None


def by_hand(run, said, seed, tokens=20, words=()):
    """What task=answer says, with a native engine here."""
    config = compose("generate", ["ckpt=unused", *GSA, *words])
    engine, method, render = build_engine(config.engine, run, None), build(config.decode), run_renderer(run)
    setting = setting_of(engine, run.tokenizer, render, method.params(tokens, seed))
    return [answer for _, answer in sorted(traced(method, said, engine, render, setting, None), key=lambda pair: pair[0])]


def test_a_decoding_of_several_calls_is_a_model(run, client):
    """It says what task=answer says at the same seed, and its usage is that of all calls."""
    expected = by_hand(run, ["Once", "Twice"], 3)
    answer = client.completions.create(model="gsa:run", prompt=["Once", "Twice"], max_tokens=20, seed=3, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and len({choice.text for choice in answer.choices}) > 2
    assert [answer.choices[i].text for i in (0, 2)] == [one.text for one in expected]
    alone = client.completions.create(model="gsa:run", prompt="Once", max_tokens=20, seed=3)
    spent = expected[0].trace["usage"]
    assert spent["calls"] == 3 and alone.model == "gsa:run" and alone.choices[0].finish_reason == expected[0].finish_reason
    assert (alone.usage.prompt_tokens, alone.usage.completion_tokens) == (spent["prompt_tokens"], spent["completion_tokens"])
    events = list(client.completions.create(model="gsa:run", prompt="Once", max_tokens=20, seed=3, stream=True))
    assert "".join(event.choices[0].text for event in events) == expected[0].text and events[-1].choices[0].finish_reason
    until = expected[0].text[3:5]  # every call ends there, the samples too
    assert until not in client.completions.create(model="gsa:run", prompt="Once", max_tokens=20, seed=3, stop=until).choices[0].text


def test_a_caller_may_say_how_samples_are_drawn(run, client):
    (expected,) = by_hand(run, ["Once"], 3, words=["decode.sampler.temperature=0", "decode.sampler.top_p=null"])
    answer = client.completions.create(model="gsa:run", prompt="Once", max_tokens=20, seed=3, temperature=0)
    assert answer.choices[0].text == expected.text != by_hand(run, ["Once"], 3)[0].text


def test_our_own_client_takes_either_model(run, client, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = []
    for name in ("run", "gsa:run"):
        engine = build_engine(node(["engine=openai", f"engine.base_url={client.base_url}", f"engine.name='{name}'"]), run, tmp_path)
        assert {"n", "seed", "texts", "top_k"} <= engine.capabilities
        said.append(engine.generate(["Once"], [SamplingParams(max_new_tokens=20, temperature=1.0, seed=3)])[0].text)
        engine.close()
    assert said[0] != said[1] and all(said)


def test_calls_of_several_callers_are_made_together_end_with_them_and_fail_alone(tmp_path):
    """Conversations; no process between, so that the hub can be looked at."""
    run = load_run(make_run(tmp_path / "chat", "data=chat", "data.path=none.jsonl", "task=sft"))
    talks = [[{"role": "user", "content": text}] for text in ("Once", "Twice")]
    expected = by_hand(run, talks, 3)
    engine = build_engine(compose("generate", ["ckpt=unused", "engine.context_length=900"]).engine, run, None)
    method = build(compose("generate", ["ckpt=unused", *GSA]).decode)

    async def last(said):
        return [item async for item in said][-1]

    async def scene():
        hub = server.Hub(engine, 16)
        rounds, work = InRounds(hub, method, run.tokenizer, run_renderer(run)), asyncio.create_task(hub.work())
        results = await asyncio.gather(*(last(rounds.follow(talk, method.params(20, 3), 1)) for talk in talks))
        assert [result.completions[0].text for result in results] == [one.text for one in expected]
        with pytest.raises(UserError, match="no room for the candidates"):  # each sample is refused by itself
            await last(rounds.follow([{"role": "user", "content": "x" * 900}], method.params(20, 3), 1))
        left = asyncio.create_task(last(rounds.follow(talks[0], method.params(150, 3), 1)))
        while hub.figures()["requests"] < 2:
            await asyncio.sleep(0.001)
        left.cancel()
        await asyncio.wait([left])
        assert (hub.figures()["requests"], hub.cancelled) == (0, 2)
        again = await last(rounds.follow(talks[1], method.params(20, 3), 1))
        assert again.completions[0].text == expected[1].text
        work.cancel()

    asyncio.run(asyncio.wait_for(scene(), 120))
    engine.close()


def test_a_decoding_that_needs_other_queries_is_refused_before_anybody_asks(run):
    context = SimpleNamespace(run=run, method=build(compose("generate", ["ckpt=unused", *GSA, "decode.control=foreign"]).decode))
    context.engine, context.params = SimpleNamespace(context_length=256), SamplingParams()
    with pytest.raises(UserError, match=r"decode\.control: foreign shows candidates of another query"):
        Serve("127.0.0.1", 0, None, 1, "NOBODY_SETS_THIS").run(context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": 2}, "logprobs: 'gsa:run' gives texts alone; drop it, or ask 'run'"),
        ({"extra_body": {"prompt_logprobs": 0}}, "prompt_logprobs: 'gsa:run' gives texts alone"),
        ({"extra_body": {"structured_outputs": {"choice": ["a"]}}}, "structured_outputs: 'gsa:run' gives texts alone"),
        ({"prompt": [97, 98]}, "prompt: token ids; 'gsa:run' takes texts"),
        ({"max_tokens": 29000}, "no room for the candidates in the context"),
        ({"model": "gsa:walk"}, "model: 'gsa:walk' is not here; 'run' and 'gsa:run' are"),
    ],
)
def test_what_a_decoding_of_several_calls_refuses(client, change, message):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "gsa:run", "prompt": "Once " * 300, "max_tokens": 4, **change})
    assert message in str(caught.value) and caught.value.status_code in (400, 404)


def test_several_prompts(client):
    one = client.completions.create(model="run", prompt="Once", max_tokens=8, temperature=0)
    two = client.completions.create(model="run", prompt=["Twice", "Once"], max_tokens=8, temperature=0)
    assert two.choices[1].text == one.choices[0].text != two.choices[0].text


def test_streamed_pieces_are_the_text(client):
    asked = {"model": "run", "prompt": "Once", "max_tokens": 40, "seed": 1, "n": 2, "temperature": 1.0, **WHOLE}
    whole = client.completions.create(**asked)
    texts, ends, counted, events = ["", ""], {}, None, 0
    for event in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        counted = event.usage or counted
        for choice in event.choices:
            events += 1
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and ends == {0: "length", 1: "length"}
    assert counted.completion_tokens == 80 and events > 20


def test_log_probabilities_and_token_ids_are_streamed(client):
    """Joined, those of the pieces are those of the whole; tokens that ended an answer without a text come with its last event."""
    asked = {"model": "run", "prompt": ["Once", "Twice"], "max_tokens": 30, "seed": 1, "n": 2, "temperature": 1.0, "logprobs": 2}
    asked |= {"extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**asked)
    found, events = {}, 0
    for event in client.completions.create(**asked, stream=True):
        for choice in event.choices:
            text, names, scores, tops, ids = found.setdefault(choice.index, ("", [], [], [], []))
            if choice.logprobs is not None:
                events += 1
                names, scores = names + choice.logprobs.tokens, scores + choice.logprobs.token_logprobs
                tops = tops + choice.logprobs.top_logprobs
            found[choice.index] = (text + choice.text, names, scores, tops, ids + choice.token_ids)
    for choice in whole.choices:
        told = choice.logprobs
        assert found[choice.index] == (choice.text, told.tokens, told.token_logprobs, told.top_logprobs, choice.token_ids)
    assert events > 40


def test_prompts_without_a_seed_draw_for_themselves(client):
    answer = client.completions.create(model="run", prompt=["a", "a", "a"], n=2, max_tokens=20, temperature=1.0, **WHOLE)
    assert len({choice.text for choice in answer.choices}) == 6
    answer = client.completions.create(model="run", prompt=["a", "a"], max_tokens=20, temperature=1.0, seed=3, **WHOLE)
    assert len({choice.text for choice in answer.choices}) == 1


def test_a_bad_request_ends_no_other(client):
    """The stream of one caller goes on while another asks for what cannot be."""
    pieces = client.completions.create(model="run", prompt="Once", max_tokens=100, seed=1, temperature=1.0, stream=True, **WHOLE)
    texts = [next(pieces).choices[0].text]
    for change in ({"stop_token_ids": [10**9], "min_tokens": 2}, {"top_k": 10**30, "min_tokens": 1}):
        with contextlib.suppress(openai.BadRequestError):
            client.completions.create(model="run", prompt="x", max_tokens=4, extra_body=change)
    ends = []
    for event in pieces:
        texts.append(event.choices[0].text)
        ends += [event.choices[0].finish_reason] if event.choices[0].finish_reason else []
    assert ends == ["length"]
    assert (
        "".join(texts)
        == client.completions.create(model="run", prompt="Once", max_tokens=100, seed=1, temperature=1.0, **WHOLE).choices[0].text
    )


def test_a_stop_string_and_a_constraint(client):
    asked = {"model": "run", "prompt": "Once", "max_tokens": 30, "temperature": 0}
    answer = client.completions.create(**asked, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}})
    assert answer.choices[0].text.isdigit() and answer.choices[0].finish_reason == "stop"
    plain = client.completions.create(**asked).choices[0].text
    cut = client.completions.create(**asked, stop=plain[5])
    assert cut.choices[0].text == plain[: plain.index(plain[5])]


def test_many_callers_at_once(client):
    def ask(seed):
        return client.completions.create(model="run", prompt=f"No. {seed % 4}", max_tokens=10, seed=seed, temperature=1.0).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(16) as callers:
        together = list(callers.map(ask, range(48)))
    assert together[::12] == [ask(seed) for seed in range(0, 48, 12)]


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"model": "other"}, 404, "model: 'other' is not here; 'run' and 'gsa:run' are"),
        ({"temperature": -1.0}, 400, "temperature: -1.0; a finite number >= 0"),
        ({"max_tokens": 0}, 400, "max_new_tokens: 0"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"extra_body": {"best": 3}}, 400, "best: Extra inputs are not permitted"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [10**6]}, 400, "holds id 1000000"),
        ({"prompt": [1, 10**6], "extra_body": {"prompt_logprobs": 0}}, 400, "holds id 1000000"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 0}}, 400, "stream: prompt_logprobs are not streamed"),
        ({"stream": True, "prompt": "x" * 300, "max_tokens": 29_900}, 400, "301 tokens and max_new_tokens=29900"),
        ({"stream": True, "prompt": ["x", "x" * 300], "max_tokens": 29_900}, 400, "301 tokens and max_new_tokens=29900"),
        ({"extra_body": {"stop_token_ids": [10**9], "min_tokens": 2}}, 400, "stop_ids: 1000000000; the model knows"),
        ({"stream": True, "extra_body": {"stop_token_ids": [10**9], "min_tokens": 2}}, 400, "stop_ids: 1000000000; the model knows"),
        ({"max_tokens": 2**40}, 400, "max_tokens: 1099511627776; at most"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, 400, "regex"),
    ],
)
def test_what_is_refused(client, change, status, told):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "run", "prompt": "x", "max_tokens": 4, **change})
    assert caught.value.status_code == status and told in caught.value.body["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_hangs_up_stops_the_work(client, stream):
    """A socket that is really closed, of one caller among others: no more tokens are made for it, and the next one is answered."""
    url, most = urlsplit(str(client.base_url)), 20_000
    health = f"http://{url.netloc}/health"
    before = httpx.get(health).json()
    body = json.dumps({"prompt": "Once", "max_tokens": most, "n": 2, "stream": stream, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        while httpx.get(health).json()["tokens"] < before["tokens"] + 20:  # it is being written
            time.sleep(0.02)
        if stream:
            assert b"200 OK" in connection.recv(1 << 16)
    until = time.monotonic() + 30
    while httpx.get(health).json()["requests"] and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)  # a step may be under way
    after = httpx.get(health).json()
    time.sleep(0.5)
    again = httpx.get(health).json()
    assert (after["requests"], after["cancelled"], after["answered"]) == (0, before["cancelled"] + 1, before["answered"])
    assert again["tokens"] == after["tokens"] < before["tokens"] + 2 * most
    assert client.completions.create(model="run", prompt="Once", max_tokens=4, **WHOLE).usage.completion_tokens == 4


def test_conversations_need_a_run_that_was_trained_on_them(client):
    with pytest.raises(openai.BadRequestError, match="need a run that was trained on conversations"):
        client.chat.completions.create(model="run", messages=[{"role": "user", "content": "Hi"}])


def test_a_key(client):
    for key in ("guess", "sécret"):
        asked = httpx.get(f"{client.base_url}models", headers={"Authorization": f"Bearer {key}".encode()})
        assert asked.status_code == 401 and "the key is missing or wrong" in asked.json()["error"]["message"]
    with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong"):
        openai.OpenAI(base_url=client.base_url, api_key="guess", max_retries=0).completions.create(model="run", prompt="Once")


def test_a_pattern_is_read_beside_the_event_loop(run, monkeypatch):
    """It can take a second, in which others would wait."""
    threads = []

    def check(params):
        threads.append((params.constraint, threading.current_thread() is threading.main_thread()))
        raise UserError("decode.regex: no")

    monkeypatch.setattr(server, "check_params", check)
    app = server.make_app(server.Hub(SimpleNamespace(context_length=None), 1), run, "run", SamplingParams(), None)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as caller:
            return await caller.post("/v1/completions", json={"prompt": "x", "structured_outputs": {"regex": "a+"}})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "decode.regex: no")
    assert threads == [(Constraint(regex="a+"), False)]


def test_a_piece_of_a_conversation_has_its_log_probabilities():
    asked = ChatForm(messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=1, stream=True)
    reply = server.Reply("chat.completion", "run", asked, None)
    found = reply.piece(0, Piece("ab", [97, 98], [-0.5, -1.0], [{97: -0.5}, {99: -0.25}]))
    assert found["delta"]["content"] == "ab" and found["finish_reason"] is None and "token_ids" not in found
    assert found["logprobs"]["content"] == [
        {"token": "token_id:97", "logprob": -0.5, "top_logprobs": [{"token": "token_id:97", "logprob": -0.5}]},
        {"token": "token_id:98", "logprob": -1.0, "top_logprobs": [{"token": "token_id:99", "logprob": -0.25}]},
    ]
    assert reply.piece(0, Piece(""), "stop")["logprobs"] is None
