"""What the contract promises of an engine, asked of each: ours, transformers', a real vLLM and a real `transformers serve`.

A test that an engine cannot take says which capability is missing; the table in engines.py says which those may be.
"""

import asyncio
from dataclasses import replace

import httpx
import pytest
import torch
from engines import ABLE, DRAWN, GREEDY, LENGTH, opened

from components.contracts import CANCELLED, Constraint, Request, UserError
from components.data.tokenizers import bytes_tokenizer
from framework.build import load_run
from framework.engines.fitting import figures, fitted
from framework.engines.requests import RequestEngine, each_of
from framework.generate import run_renderer

CHATS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Why {{x}}?\n"}],
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two: é."}, {"role": "user", "content": "  And three?"}],
]
MARKS = {"vllm": pytest.mark.vllm, "openai_serve": pytest.mark.serve}
LENGTHS = (3, 9, 17, 31, 5, 64, 12, 40)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=MARKS.get(kind, ())) for kind in ABLE])
def engine(request, home):
    with opened(request.param, home) as engine:
        engine.kind = request.param
        yield engine


@pytest.fixture(scope="module")
def native(home):
    with opened("native", home) as engine:
        yield engine


def prompts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(11)
    return [[256, *torch.randint(97, 123, (length - 1,), generator=draw).tolist()] for length in lengths]


def need(engine, *capabilities):
    missing = [name for name in capabilities if name not in engine.capabilities]
    if missing:
        pytest.skip(f"{engine.kind} cannot: {', '.join(missing)}")


def streamed(engine, requests, concurrency=4, on_piece=None):
    async def collect():
        return [result async for result in engine.stream(each_of(requests), concurrency=concurrency, on_piece=on_piece)]

    return asyncio.run(collect())


def test_what_it_can_do(engine):
    if ABLE[engine.kind] is not None:
        assert engine.capabilities == ABLE[engine.kind]
    assert engine.engine_id and engine.model_id


def test_greedy_tokens_are_ours(engine, native):
    wanted = native.generate(prompts(), GREEDY)
    found = engine.generate(prompts(), GREEDY)
    if "token_ids" in engine.capabilities:
        assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    else:
        assert [one.text for one in found] == [one.text for one in wanted]
    assert len({one.text for one in found}) > 4  # else equality shows little


def test_a_conversation_is_read_and_answered_as_ours(engine, native, home):
    """A server gets the messages and renders them by the export's chat template, the others the ids that the run renders them to.

    The ids themselves are vLLM's word for it (/tokenize); of every engine their number, and the answer to them.
    """
    render, served = run_renderer(load_run(home / "run")), isinstance(engine, RequestEngine)
    asked = [render(chat) for chat in CHATS]
    if engine.kind == "vllm":
        tell = {"model": engine.model_id, "add_generation_prompt": True}
        where = engine.base_url.removesuffix("/v1") + "/tokenize"
        assert [httpx.post(where, json=tell | {"messages": chat}).raise_for_status().json()["tokens"] for chat in CHATS] == asked
    wanted = native.generate(asked, GREEDY)
    requests = [Request(str(i), chat if served else ids, GREEDY) for i, (chat, ids) in enumerate(zip(CHATS, asked, strict=True))]
    found = {result.request_id: result for result in streamed(engine, requests)}
    for i, own in enumerate(wanted):
        result = found[str(i)]
        assert result.error is None and result.usage.prompt == len(asked[i])
        (one,) = result.completions
        if "token_ids" in engine.capabilities:  # vLLM leaves a character that is not whole out of a text
            assert one.token_ids == own.token_ids
        else:
            assert one.text == own.text
        assert one.finish_reason == own.finish_reason
    assert len({own.text for own in wanted}) == len(CHATS)


def test_logprobs_are_of_the_models_own_distribution(engine, native):
    need(engine, "logprobs")
    params = replace(DRAWN, temperature=0.7, top_p=0.8)
    found = engine.generate(prompts(), params)
    scores = native.score([ids + one.token_ids for ids, one in zip(prompts(), found, strict=True)])
    for ids, one, score in zip(prompts(), found, scores, strict=True):
        assert torch.allclose(score[len(ids) - 1 :], torch.tensor(one.logprobs), atol=2e-5, rtol=0)


def test_completions_come_once_each(engine):
    found = list(engine.completions(prompts(), DRAWN))
    assert sorted(index for index, _ in found) == list(range(len(LENGTHS)))


def test_a_seed_repeats_and_another_differs(engine):
    need(engine, "seed")
    first, again, other = (engine.generate(prompts(), replace(DRAWN, seed=seed)) for seed in (1, 1, 2))
    assert [one.text for one in first] == [one.text for one in again]
    assert sum(a.text != b.text for a, b in zip(first, other, strict=True)) > len(LENGTHS) // 2


def test_batch_mates_change_nothing(engine):
    need(engine, "seed")
    params = [replace(DRAWN, seed=seed) for seed in range(len(LENGTHS))]
    together = engine.generate(prompts(), params)
    alone = [engine.generate([ids], [one])[0] for ids, one in zip(prompts(), params, strict=True)]
    assert [one.text for one in together] == [one.text for one in alone]


def test_length_and_stop(engine):
    one = engine.generate(prompts()[:1], replace(GREEDY, max_new_tokens=1))[0]
    assert one.finish_reason == "length" and (not one.token_ids or len(one.token_ids) == 1)


def test_stop_id(engine, native):
    need(engine, "token_ids", *(["stop_ids"] if engine.kind == "vllm" else []))
    plain = native.generate(prompts()[:1], GREEDY)[0].token_ids
    stop = plain[9]
    one = engine.generate(prompts()[:1], replace(GREEDY, stop_ids=(stop,)))[0]
    assert one.token_ids == plain[: plain.index(stop) + 1] and one.finish_reason == "stop"


def test_stop_string(engine):
    """Two characters, which are two tokens; the text ends before them."""
    params = replace(GREEDY, max_new_tokens=100)
    plain = [(ids, one.text) for ids, one in zip(prompts(), engine.generate(prompts(), params), strict=True)]
    ids, text, stop = next(
        (ids, text, text[i : i + 2])
        for ids, text in plain
        for i in range(2, len(text) - 2)
        if text[i : i + 2].isascii() and text[i : i + 2].isprintable() and text.index(text[i : i + 2]) == i
    )
    one = engine.generate([ids], replace(params, stop=(stop,)))[0]
    assert one.text == text[: text.index(stop)] and one.finish_reason == "stop"


def test_n_answers_to_a_request(engine):
    results = streamed(engine, [Request(str(i), ids, replace(DRAWN, seed=i), n=3) for i, ids in enumerate(prompts()[:3])])
    assert sorted(result.request_id for result in results) == ["0", "1", "2"]
    for result in results:
        assert result.error is None and len(result.completions) == 3
        assert result.usage.prompt == 3 * LENGTHS[int(result.request_id)]
        if "seed" in engine.capabilities:
            assert len({one.text for one in result.completions}) == 3


def test_pieces_of_a_stream_make_the_texts(engine):
    said, ids = {}, {}

    def hear(request, index, piece):
        said[request, index] = said.get((request, index), "") + piece.text
        ids.setdefault((request, index), []).extend(piece.token_ids)

    requests = [Request(str(i), one, replace(DRAWN, seed=i), n=2) for i, one in enumerate(prompts()[:4])]
    results = streamed(engine, requests, on_piece=hear)
    for result in results:  # the last tokens of an answer may have no text, and so no piece
        for index, one in enumerate(result.completions):
            heard = ids.get((result.request_id, index), [])
            assert heard == one.token_ids[: len(heard)]
    assert {key: text for key, text in said.items() if text} == {
        (result.request_id, index): one.text for result in results for index, one in enumerate(result.completions) if one.text
    }


def test_stream_gives_each_request_once_and_counts_its_tokens(engine):
    requests = [Request(f"row {i}", ids, GREEDY) for i, ids in enumerate(prompts())]
    results = {result.request_id: result for result in streamed(engine, requests)}
    assert set(results) == {request.id for request in requests}
    for request in requests:
        result = results[request.id]
        assert result.error is None and result.latency["total"] > 0 and result.engine_id == engine.engine_id
        assert result.usage.prompt == len(request.prompt)
        assert result.usage.completion == 24


def test_a_request_that_cannot_be_answered_ends_nothing(engine):
    """Longer than the model's context, or for an engine without that, a prompt of ids that no model has."""
    bad = Request("bad", [256] * (LENGTH + 1), GREEDY) if engine.context_length is not None else Request("bad", [256, 10**6], GREEDY)
    need(engine, "token_ids")
    results = {r.request_id: r for r in streamed(engine, [bad, *(Request(str(i), ids, GREEDY) for i, ids in enumerate(prompts()))])}
    assert results["bad"].error and not results["bad"].completions
    assert all(result.error is None for name, result in results.items() if name != "bad") and len(results) == 1 + len(LENGTHS)


@pytest.mark.parametrize("policy", ["truncate_left", "skip"])
def test_a_prompt_that_is_too_long_is_cut_or_passed_over(engine, policy, monkeypatch):
    """The limit is the server's own where it says one, else one of ours; what goes out has room, and says what it says without a policy."""
    if engine.context_length is None:
        monkeypatch.setattr(engine, "context_length", LENGTH)
    ids, short = prompts((LENGTH + 20, 9))
    fitting = fitted(engine, policy, bytes_tokenizer())
    room = LENGTH - GREEDY.max_new_tokens
    found = fitting.generate([ids, short], GREEDY)
    plain = engine.generate([[ids[0], *ids[1 - room :]], short], GREEDY)
    results = {r.request_id: r for r in streamed(fitting, [Request("long", ids, GREEDY), Request("short", short, GREEDY)])}
    assert found[1].text == results["short"].completions[0].text == plain[1].text and found[1].prompt_cut == 0
    for one in (found[0], results["long"].completions[0]):
        if policy == "skip":
            assert one.finish_reason == "skipped" and f"more than the {LENGTH} that" in one.stop_reason
        else:
            assert one.text == plain[0].text and one.prompt_cut == len(ids) - room
    assert figures(fitting)[{"skip": "prompts_skipped", "truncate_left": "prompts_cut"}[policy]] == 2


def test_a_text_that_the_server_finds_too_long(engine):
    """Nobody here counts its tokens: a server that refuses it is read as our own refusal; one that takes anything is not caught."""
    if engine.kind not in ("vllm", "ours_served", "openai_serve"):
        pytest.skip(f"{engine.kind} takes token ids, which are counted here")
    if engine.context_length is None:
        pytest.skip(f"{engine.kind} says no limit and refuses nothing; engine.context_length= gives it one")
    fitting = fitted(engine, "skip", None)
    long, short = fitting.generate(["x" * (2 * LENGTH), "x"], GREEDY)
    assert long.finish_reason == "skipped" and " answered 400: " in long.stop_reason and short.finish_reason in ("length", "stop")


def test_a_cancelled_request_ends_and_no_other(engine):
    """Cancelled as soon as a shorter one is answered; transformers writes its batch to the end all the same.

    A server in another process may tell of both at once (vLLM on two cores does), so there the long one is cancelled soon after its start.
    """
    at_once = engine.kind in ("vllm", "openai_serve")
    before = engine.diagnostics()["tokens"]

    async def asked():
        yield Request("long", prompts()[0], replace(GREEDY, max_new_tokens=LENGTH - 64))
        if at_once:  # by now it is on its way: opening the client alone may take longer than that
            asyncio.get_running_loop().call_later(0.05, engine.cancel, "long")
        yield Request("short", prompts()[1], GREEDY)

    async def collect():
        found = {}
        async for result in engine.stream(asked(), concurrency=4):
            found[result.request_id] = result
            if result.request_id == "short" and not at_once:
                engine.cancel("long")
        return found

    found = asyncio.run(collect())
    if engine.kind != "transformers":
        assert found["long"].error == CANCELLED and not found["long"].completions
    assert found["short"].error is None
    if engine.kind == "native":
        assert engine.diagnostics()["tokens"] - before < 24 + 24 + 8
    assert engine.generate(prompts()[:1], GREEDY)[0].finish_reason in ("length", "stop")


def test_scores(engine, native):
    if "score" not in engine.capabilities:
        with pytest.raises(UserError, match="log-probabilities of a prompt"):
            engine.score(prompts())
        return
    for found, wanted in zip(engine.score(prompts()), native.score(prompts()), strict=True):
        assert torch.allclose(found, wanted, atol=2e-5, rtol=0)


def test_pieces_make_the_text(engine):
    assert "".join(engine.pieces(prompts()[1], GREEDY)) == engine.generate([prompts()[1]], GREEDY)[0].text


def test_constraints(engine):
    need(engine, "choice", "regex")
    one = engine.generate(prompts()[:4], replace(DRAWN, constraint=Constraint(choice=("yes", "no"))))
    assert {completion.text for completion in one} <= {"yes", "no"}
    two = engine.generate(prompts()[:4], replace(DRAWN, constraint=Constraint(regex=r"[0-9]{3}-[a-f]+!")))
    assert all(completion.text[:3].isdigit() and completion.text[3] == "-" for completion in two)
