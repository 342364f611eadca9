"""Continuous batching over slots: a row is the same to the last bit whatever else is decoded, and no slot remembers who had it before."""

from __future__ import annotations

import random

import pytest
import torch

from components.contracts import Batch, Constraint, SamplingParams
from components.data.tokenizers import bytes_tokenizer
from components.decoding.batching import Batcher, Row, never_said
from components.decoding.constraints import Constraints
from components.decoding.forward import Forward
from framework.build import build_model, compose

TOKENIZER = bytes_tokenizer()
EOT = TOKENIZER.eot_id
MODELS = {"phi4mini": ["model=phi4mini"], "samba": ["model=samba"], "hybrid": ["model=samba", "model.layer_pattern=[mamba,full_attention]"]}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    words = [*MODELS[request.param], "model/size=test", "model.head_dim=16", "data.seq_len=64"]
    built = build_model(compose("train", words), TOKENIZER.vocab_size).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # logits that are not all alike
            parameter.mul_(1.0 if parameter.dim() == 1 else 2.0)
    return built


def batcher(model, max_batch=6, prefill_chunk=24, **options):
    made = Forward(model, packed=options.pop("packed", True))
    constraints = Constraints(TOKENIZER, model.vocab_size)
    blocked = never_said(model.vocab_size, TOKENIZER)
    return Batcher(made, TOKENIZER, TOKENIZER.stop_ids, blocked, constraints, max_batch, prefill_chunk, **options)


def finish(running):
    while running.busy:
        running.round()


def said(rows):
    return [(row.new_ids, row.logprobs, row.finish_reason, row.stop_reason, row.alternatives) for row in rows]


def ids(length, seed=0):
    return [EOT, *(random.Random(seed).randrange(256) for _ in range(length - 1))]


KINDS = [
    {"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 20}, {"repetition_penalty": 1.3, "temperature": 0.0},
    {"min_p": 0.05}, {"min_new_tokens": 4}, {"logprobs": 2}, {"ignore_eos": True}, {"stop_ids": tuple(range(0, 256, 9))},
    {"stop": tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")}, {"constraint": Constraint(regex="[a-f]{2,9}")},
]  # fmt: skip


def poison(running):
    """What a slot without a row holds must not matter."""
    if running.slots is not None:
        for slot in range(running.slots.batch_size):
            if slot >= len(running.rows) or running.rows[slot] is None:
                for layer in running.slots.layers:
                    for tensor in layer.tensors:
                        tensor[slot] = torch.nan


def check_slots(running):
    live = [(slot, row) for slot, row in enumerate(running.rows) if row is not None]
    assert [running.slots.length[slot].item() for slot, _ in live] == [len(row.ids) - 1 for _, row in live]
    assert len({id(row) for _, row in live}) == len(live) <= running.max_batch


def fuzz(model, arrivals, seed):
    """Requests come at random moments; each must say what it says alone."""
    draw = random.Random(seed)
    asked = []
    for number in range(arrivals):
        kind = KINDS[number % len(KINDS)]
        params = SamplingParams(max_new_tokens=16 if "stop" in kind else draw.randint(1, 16), seed=number, **kind)
        asked.append((ids(draw.choice((1, 2, 5, 17, 23, 24, 25, 60)), number), params, draw.choice((1, 1, 1, 3))))
    running, waiting, found, ended = batcher(model), list(asked), [], set()
    while waiting or running.busy:
        for _ in range(draw.choice((0, 0, 1, 2, 5))):
            if waiting:
                prompt, params, n = waiting.pop(0)
                found.append([Row(prompt, params, draw=number) for number in range(n)])
                running.add(prompt, found[-1])
        if running.busy:
            for row in running.round():
                assert row not in ended  # one end each
                ended |= {row} if row.finish_reason is not None else set()
            check_slots(running) if running.slots is not None else None
            with torch.no_grad():
                poison(running)
    assert len(ended) == sum(n for *_, n in asked)
    reasons = set()
    for (prompt, params, _), together in zip(asked, found, strict=True):
        for number, row in enumerate(together):
            alone, single = batcher(model), Row(prompt, params, draw=number)
            alone.add(prompt, [single])
            finish(alone)
            assert said([row]) == said([single]), (len(prompt), params, number)
            reasons.add((row.finish_reason, type(row.stop_reason)))
    assert {("stop", int), ("stop", str), ("length", type(None))} <= reasons


def test_rows_say_to_the_last_bit_what_they_say_alone(model):
    fuzz(model, 22, seed=1)


@pytest.mark.slow
def test_a_thousand_arrivals(model):
    fuzz(model, 1000, seed=2)


@pytest.mark.parametrize("packed", [True, False])
def test_decoding_has_the_logprobs_of_the_full_forward(model, packed):
    """The log-probabilities of a row that shared its batch, against one uncached forward (float32: 1e-4, logits of size 10)."""
    running = batcher(model, packed=packed)
    rows = [Row(ids(length, length), SamplingParams(max_new_tokens=30, seed=length, ignore_eos=True)) for length in (3, 40, 24, 60, 1)]
    for row in rows:
        running.add(row.ids, [row])
    finish(running)
    for row in rows:
        with torch.no_grad():
            exact = model.logits(model(Batch(torch.tensor([row.ids]))).hidden[0]).log_softmax(-1)
        expected = exact[row.prompt_length - 1 : -1].gather(1, torch.tensor(row.new_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=1e-4)


def test_forks_are_separate_requests_with_one_reading(model):
    prompt, params = ids(50), SamplingParams(max_new_tokens=12, seed=3)
    together, running, read = [Row(prompt, params, draw) for draw in range(9)], batcher(model, max_batch=4), []
    hook = model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].input_ids.shape))
    running.add(prompt, together)
    finish(running)
    hook.remove()
    assert sum(time for rows, time in read if time > 1) == len(prompt)  # though five of them had to wait for a slot
    for row in together:
        alone, single = batcher(model), Row(prompt, params, row.draw)
        alone.add(prompt, [single])
        finish(alone)
        assert said([row]) == said([single])
    assert len({tuple(row.new_ids) for row in together}) > 4


def test_a_long_prompt_stalls_the_others_by_no_more_than_a_chunk(model):
    running, params = batcher(model, max_batch=6, prefill_chunk=16), SamplingParams(max_new_tokens=40, ignore_eos=True)
    short = [Row(ids(4, seed), params) for seed in range(4)]
    for row in short:
        running.add(row.ids, [row])
    running.round()
    long = Row(ids(400), SamplingParams(max_new_tokens=2))
    running.add(long.ids, [long])
    tokens = []
    hook = model.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].input_ids.numel()))
    for _ in range(20):
        before = [row.said for row in short]
        tokens.clear()
        running.round()
        assert sum(tokens) <= 16 + len(short) and [row.said for row in short] == [count + 1 for count in before]
    assert long.said == 0
    finish(running)
    hook.remove()
    assert long.finish_reason in ("length", "stop") and all(row.said == 40 for row in short)


def test_who_waits_longest_joins_first_and_caches_keep_their_bound(model):
    running, params = batcher(model, max_batch=6, kv_tokens=90), SamplingParams(max_new_tokens=10, ignore_eos=True)
    rows = [Row(ids(length, length), params) for length in (5, 20, 6, 70, 7, 8)]
    for row in rows:
        running.add(row.ids, [row])
    began, most = [], 0
    while running.busy:
        for row in running.round():
            began += [row] if row not in began else []
        live = [row for row in running.rows if row is not None]
        assert len(live) * max((row.limit for row in live), default=0) <= 90
        most = max(most, len(live))
    assert began == rows and most == 3  # 3 * 30, then the one of 80 alone


@pytest.mark.parametrize("model", ["phi4mini"], indirect=True)
def test_slots_stay_within_the_bound_and_rows_do_not_notice(model):
    """Many short rows, then a long one that needs nearly all of it, then short ones again: slots shrink in rows, then in tokens."""
    params = SamplingParams(max_new_tokens=24, seed=4, ignore_eos=True)
    lengths = [*[6] * 12, 190, *[9] * 12, 50, 90]
    rows = [Row(ids(length, place), params, place) for place, length in enumerate(lengths)]
    running, sizes = batcher(model, max_batch=16, kv_tokens=256), set()
    for row in rows:
        running.add(row.ids, [row])
    while running.busy:
        running.round()
        sizes |= {(running.slots.batch_size, running.slots.room_tokens)} if running.slots is not None else set()
    assert max(count * tokens for count, tokens in sizes) <= 256, sizes
    assert {count for count, _ in sizes} >= {1, 7} and max(tokens for _, tokens in sizes) >= 190
    for row in rows[::6]:
        alone, single = batcher(model), Row(row.ids[: row.prompt_length], params, row.draw)
        alone.add(single.ids, [single])
        finish(alone)
        assert said([row]) == said([single])


def test_prompts_are_read_in_turn(model):
    """A long prompt does not hold up those that come after it, and each is read in the pieces that it would be read in alone."""
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    long, short, middle = Row(ids(400), params), Row(ids(9, 1), params), Row(ids(40, 2), params)
    running = batcher(model, prefill_chunk=16)
    running.add(long.ids, [long])
    running.round()
    for row in (short, middle):
        running.add(row.ids, [row])
    pieces, rounds = [], 0
    hook = model.register_forward_pre_hook(lambda _, inputs: pieces.append(inputs[0].input_ids.shape[1]))
    while middle.finish_reason is None:
        running.round()
        rounds += 1
    hook.remove()
    assert rounds < 12 and short.finish_reason == "length" and long.said == 0
    assert sorted(piece for piece in pieces if piece > 1 and piece != 16) == [8, 9]  # 40 = 16 + 16 + 8
    finish(running)
    for row in (long, short, middle):
        alone, single = batcher(model, prefill_chunk=16), Row(row.ids[: row.prompt_length], params)
        alone.add(single.ids, [single])
        finish(alone)
        assert said([row]) == said([single])


def test_rows_that_are_dropped_while_their_prompt_is_read_leave_no_place_behind(model):
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    running, rows = batcher(model, max_batch=2, prefill_chunk=16), [Row(ids(100, place), params) for place in range(3)]
    for row in rows:
        running.add(row.ids, [row])
    running.round()
    running.drop(rows[:1])
    finish(running)
    assert rows[0].said == 0 and [row.said for row in rows[1:]] == [3, 3]


def test_a_row_that_cannot_be_prepared_is_refused_before_it_joins(model):
    """In a step it would end all."""
    running = batcher(model)
    with pytest.raises(IndexError):
        running.add(ids(5), [Row(ids(5), SamplingParams(stop_ids=(10**9,), min_new_tokens=2))])
    assert not running.busy
    row = Row(ids(5), SamplingParams(max_new_tokens=2, top_k=10**30, ignore_eos=True))  # more than there are tokens: all of them
    running.add(row.ids, [row])
    finish(running)
    assert row.said == 2


def test_slots_are_reused_and_running_rows_are_not_copied(model, monkeypatch):
    """Rows that join and leave touch their own slots; a row is moved only where nobody waits for the hole before it."""
    running = batcher(model, max_batch=3)
    rows = [Row(ids(6, seed), SamplingParams(max_new_tokens=3 + seed % 5, seed=seed, ignore_eos=True)) for seed in range(20)]
    for row in rows:
        running.add(row.ids, [row])
    running.round()
    places = [tensor.data_ptr() for layer in running.slots.layers for tensor in layer.tensors]
    puts = []
    real = type(running.slots).put
    monkeypatch.setattr(type(running.slots), "put", lambda state, row, source: puts.append(row) or real(state, row, source))
    while running.waiting:
        running.round()
    assert len(puts) == 17 and [tensor.data_ptr() for layer in running.slots.layers for tensor in layer.tensors] == places
    finish(running)
    assert len(puts) <= 17 + 2 and all(row.said == row.params.max_new_tokens for row in rows)


@pytest.mark.parametrize("stops", [True, False])
def test_a_constraint_ends_a_row_where_nothing_may_follow(model, stops):
    """By a stop id, or where there is none by itself."""
    params = SamplingParams(max_new_tokens=20, ignore_eos=not stops, constraint=Constraint(choice=("yes", "no", "note")))
    rows = [Row(ids(5), params, draw) for draw in range(12)]
    running = batcher(model)
    running.add(rows[0].ids, rows)
    finish(running)
    found = {row.completion(TOKENIZER).text for row in rows}
    assert found <= {"yes", "no", "note"} and len(found) > 1
    assert {row.finish_reason for row in rows} == {"stop"}


def test_a_row_of_not_finite_logits_ends_alone(model):
    """One row's prompt holds a token whose embedding is broken; the others go on."""
    weight = model.embed_tokens.weight
    kept = weight[7].clone()
    rows = [Row(prompt, SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True)) for prompt in (ids(5), [EOT, 7], ids(8))]
    free = rows[0].params
    with torch.no_grad():
        alone = []
        for row in (rows[0], rows[2]):
            single, running = Row(row.ids, free), batcher(model)
            running.add(single.ids, [single])
            finish(running)
            alone.append(single.new_ids)
        try:
            weight[7] = torch.nan
            running = batcher(model)
            running.forward._head = lambda hidden: hidden @ torch.nan_to_num(weight).T  # tied: the head would be broken for all
            for row in rows:
                running.add(row.ids, [row])
            finish(running)
        finally:
            weight[7] = kept
    assert rows[1].finish_reason == "error" and "not finite logits after 2 tokens" in rows[1].error
    assert all(row.error is None and row.said == 5 for row in (rows[0], rows[2]))
