"""Rows of up to L0 tokens turn otherwise than longer ones: each row of a batch, in prefill, steps and scores, never mixed in a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from components.contracts import Batch, Completion, RopeRegime, RopeSpec, SamplingParams
from components.data.tokenizers import bytes_tokenizer
from components.decode_state import DecodeState, RopeRegimeError
from framework.engines.native import NativeEngine
from tests.components.models.conftest import MODELS, build, lively, random_ids

L0 = 24
LONGER = SamplingParams(max_new_tokens=16, temperature=0.0)


def two_regimes(model, short: float = 1.0, long: float = 1.3, switch="recompute") -> RopeSpec:
    rotary = model.rope_spec.rotary_dim
    factors = tuple(2.0 + 0.5 * i for i in range(rotary // 2))
    regimes = (RopeRegime(attention_factor=short, upto=L0), RopeRegime(factors, long))
    return RopeSpec(rotary, regimes=regimes, original_len=L0, target_len=8 * L0, rule="longrope", switch=switch)


@pytest.fixture(params=MODELS)
def model(request):
    """With windows longer than L0, so that the rule acts in both models."""
    model = lively(build(request.param, window=40)).eval()
    model.set_rope(two_regimes(model))
    return model


def logits(model, ids, **fields):
    with torch.no_grad():
        return model.logits(model(Batch(ids, **fields)).hidden)


def plain(model, ids):
    spec = model.rope_spec
    model.set_rope(RopeSpec(spec.rotary_dim))
    found = logits(model, ids)
    model.set_rope(spec)
    return found


def test_rows_up_to_the_trained_length_are_the_base_model_to_the_last_bit(model):
    ids = random_ids(2, L0 + 1)
    assert torch.equal(logits(model, ids[:, :L0]), plain(model, ids[:, :L0]))
    assert not torch.equal(logits(model, ids), plain(model, ids))
    model.set_rope(two_regimes(model, short=1.2))
    assert not torch.equal(logits(model, ids[:, :L0]), plain(model, ids[:, :L0]))


def test_a_batch_may_mix_regimes_whatever_its_length(model):
    ids = random_ids(3, 20)
    regimes = torch.tensor([0, 1, 0], dtype=torch.int8)
    mixed = logits(model, ids, rope_regime=regimes)
    assert torch.equal(mixed[[0, 2]], plain(model, ids)[[0, 2]])
    spec = model.rope_spec
    model.set_rope(replace(spec, regimes=spec.regimes[1:]))
    torch.testing.assert_close(mixed[1], logits(model, ids)[1], rtol=0, atol=1e-6 * float(mixed.abs().max()))


def greedy_without_a_cache(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1, : bytes_tokenizer().vocab_size].argmax()))
    return ids[len(prompt) :]


def never_stop(model) -> NativeEngine:
    engine = NativeEngine(model, bytes_tokenizer(), prefill_chunk=7)
    engine.stop_ids = set()
    engine._blocked[: bytes_tokenizer().vocab_size] = False
    return engine


PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (3, L0 - 8, L0 - 1, L0, L0 + 1, L0 + 9)]


def test_decoding_across_the_switch_equals_recomputing_every_step(model):
    found = never_stop(model).generate(PROMPTS, LONGER)  # chunks of 7 tokens: the first does not reach L0
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.token_ids == greedy_without_a_cache(model, prompt, 16), len(prompt)


def test_rows_on_both_sides_of_the_switch_equal_the_rows_alone(model):
    together = never_stop(model).generate(PROMPTS, LONGER)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        alone: Completion = never_stop(model).generate([prompt], LONGER)[0]
        assert completion.token_ids == alone.token_ids
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(alone.logprobs), rtol=1e-4, atol=1e-5)


def test_upfront_takes_one_regime_for_the_whole_row(model):
    model.set_rope(two_regimes(model, switch="upfront"))
    spec = model.rope_spec
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    mixed = never_stop(model).generate(prompts, LONGER)
    for prompt, completion in zip(prompts, mixed, strict=True):
        model.set_rope(replace(spec, regimes=(replace(spec.regimes[spec.regime_of(len(prompt) + 16)], upto=None),)))
        assert completion.token_ids == greedy_without_a_cache(model, prompt, 16)


def test_scores_take_each_rows_own_regime(model):
    sequences = [random_ids(1, n, seed=n)[0].tolist() for n in (8, L0, L0 + 1, L0 + 2, 39)]
    wide, chunked = (NativeEngine(model, bytes_tokenizer(), prefill_chunk=chunk).score(sequences) for chunk in (1024, 7))
    for sequence, group, long in zip(sequences, wide, chunked, strict=True):
        exact = logits(model, torch.tensor([sequence[:-1]])).log_softmax(-1)[0].gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
        for found in (group, long):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_a_cache_never_mixes_regimes_silently(model):
    ids = random_ids(2, L0 + 2)
    state = model.new_state(2, 64)
    with torch.no_grad():
        model(Batch(ids[:, :L0]), state)
        assert not state.stale_rows().any() and state.stale_rows(1).all()
        for again in (state, state.select(torch.tensor([1])), DecodeState.cat([state, state]), DecodeState.load(state.save())):
            with pytest.raises(RopeRegimeError, match=r"rows \[0.* would outgrow their RoPE regime with 1 more tokens"):
                model(Batch(ids[:1, L0 : L0 + 1].expand(again.batch_size, 1)), again)
        state.reset(torch.tensor([0]))
        assert state.stale_rows(2).tolist() == [False, True]
        planned = model.new_state(2, 64)
        planned.plan(torch.tensor([L0, L0 + 2]))
        model(Batch(ids[:, :8]), planned)
        assert planned.regime.tolist() == [0, 1] and planned.stale_rows(17).tolist() == [True, False]
        with pytest.raises(ValueError, match="plan comes before the first token"):
            planned.plan(torch.tensor([1, 1]))


def test_regimes_must_rise():
    for ends in ((8, 8, None), (8, 4, None), (None, None), (8,), ()):
        with pytest.raises(ValueError, match="the ends must rise, and the last is None"):
            RopeSpec(4, regimes=tuple(RopeRegime(upto=end) for end in ends))
