"""From objectives of models to objectives of factors: the model turns as told and then as before; the file of factors is transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from components.blocks import inverse_frequencies
from components.contracts import RopeRegime, RopeSpec, UserError
from components.data.tokenizers import bytes_tokenizer
from components.rope.longrope import LongRope2
from components.search.needle import needle_perplexity, needles
from components.search.scoring import documents_digest, factor_block, of_factors, turned_by, weights_digest
from tests.components.models.conftest import build

FACTORS = [1.0, 2.0, 4.5, 4.5, 5.0, 7.0]  # of the 12 rotary dims of phi4mini at size test


def spec(factors=FACTORS, attention=1.25):
    return RopeSpec(12, 1e4, (RopeRegime(upto=64), RopeRegime(tuple(factors), attention)), 64, 256, "found")


def documents(seed=0):
    return needles(list(b"It was the best of times. " * 100), bytes_tokenizer(), 300, 2, [0.0], seed)


def test_the_model_turns_by_the_spec_and_then_as_before():
    model = build("phi4mini")
    objective, before = needle_perplexity(documents()), model.rope_spec
    plain = objective(model)
    score = of_factors(objective, model, lambda factors: spec(factors))
    found, other = score(np.array(FACTORS), 2), score(np.array(FACTORS) ** 2, 2)
    assert len({plain, found, other}) == 3
    assert model.rope_spec is before and objective(model) == plain and score(np.array(FACTORS), 2) == found
    model.set_rope(spec())
    assert objective(model) == found


def test_it_turns_as_before_after_any_error():
    model = build("phi4mini")
    before = model.rope_spec
    with pytest.raises(torch.OutOfMemoryError), turned_by(model, spec()):
        assert model.rope_spec == spec()
        raise torch.OutOfMemoryError("no memory")
    assert model.rope_spec is before
    with pytest.raises(UserError, match=r"rope\.rotary_dim: 16"), turned_by(model, RopeSpec(16)):
        raise AssertionError("not reached")
    assert model.rope_spec is before


@pytest.mark.parametrize(("policy", "value"), [("long_only", None), ("both", None), ("none", None), ("both", 1.5)])
def test_transformers_computes_the_same_from_the_block(policy, value):
    node = {"policy": policy, "value": value}
    rule = LongRope2(4.0, FACTORS, short_factors=None, rcd=None, attention_factor=node, switch="recompute")
    ours = rule.spec(12, 1e4, 64)
    block = factor_block(ours, 0.75)
    config = PretrainedConfig(head_dim=16, hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=block)
    long, attention = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=65)
    short, _ = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=64)
    frequencies = inverse_frequencies(ours)
    torch.testing.assert_close(long.double(), frequencies[1].double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(short.double(), frequencies[0].double(), rtol=2e-6, atol=0)
    assert attention == ours.attention_factor == {"none": 1.0}.get(policy, value or pytest.approx(1.1547005383792515, rel=1e-12))


def test_digests_follow_every_weight_and_every_token():
    model, some = build("phi4mini"), documents()
    weights, text = weights_digest(model), documents_digest(some)
    assert weights == weights_digest(build("phi4mini")) != weights_digest(build("phi4mini", seed=1)) and len(weights) == 16
    assert weights != weights_digest(build("phi4mini").to(torch.bfloat16))
    with torch.no_grad():
        model.norm.weight[-1] += 1e-6
    assert weights_digest(model) != weights
    assert text == documents_digest(documents()) != documents_digest(documents(seed=1)) and documents_digest(some[:1]) != text
