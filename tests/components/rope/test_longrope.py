"""LongRoPE's two tables: the published one of Phi-4-mini, transformers' own numbers, policies, and every mistake."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from components.blocks import inverse_frequencies
from components.contracts import UserError
from components.rope.longrope import LongRope, LongRope2, below_critical, critical_index, longrope_attention_factor

ONLY_LONG = {"policy": "long_only", "value": None}
# Above pair 30 of Phi-4-mini-instruct's published long_factor; the last two are recalled from a mirror.
SEARCHED = [
    32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
PUBLISHED = {0: 1, 1: 1.118320672, 2: 1.250641126, 3: 1.398617824, 15: 5.351743533, 30: 28.64115884}  # below it


def longrope(factor=4.0, factors=None, short=None, attention=ONLY_LONG, switch="recompute"):
    return LongRope(factor, factors, short, attention, switch)


def longrope2(factor=4.0, factors=None, short=None, rcd=None, attention=ONLY_LONG, switch="recompute"):
    return LongRope2(factor, factors, short, rcd, attention, switch)


def test_phi4minis_published_table_is_of_this_shape():
    spec = longrope2(32.0, SEARCHED, rcd=31, attention={"policy": "both", "value": None}).spec(96, 1e4, 4096)
    assert spec.target_len == 131072 and spec.bounds == (4096,) and len(spec.factors) == 48
    for i, published in PUBLISHED.items():
        assert spec.factors[i] == pytest.approx(published, rel=1e-9)
    assert list(spec.factors[31:]) == SEARCHED
    assert [regime.attention_factor for regime in spec.regimes] == pytest.approx([1.1902380714] * 2, rel=1e-10)
    assert longrope(32.0, list(spec.factors)).spec(96, 1e4, 4096).factors == spec.factors
    assert 31 < critical_index(96, 1e4, 4096) == 34


@pytest.mark.parametrize(
    ("dim", "base", "original", "tcd", "ten"),
    [(96, 1e4, 2048, 31, 19), (128, 5e5, 8192, 35, 24), (96, 1e4, 4096, 34, 22), (64, 1e4, 256, 13, 5)],
)
def test_critical_dimensions_of_the_paper(dim, base, original, tcd, ten):
    assert (critical_index(dim, base, original), critical_index(dim, base, original, 10)) == (tcd, ten)


@pytest.mark.parametrize(
    ("head", "partial", "base", "original", "factor"),
    [
        (64, 1.0, 1e4, 256, 8.0),
        (128, 0.75, 1e4, 4096, 32.0),
        (128, 1.0, 5e5, 8192, 16.0),
        (80, 0.5, 1e4, 512, 10.5),
        (96, 1.0, 1e4, 2048, 64.0),
    ],
)
def test_equals_transformers(head, partial, base, original, factor):
    rotary = int(head * partial)
    generator = torch.Generator().manual_seed(rotary)
    long = (factor * (1 + torch.rand(rotary // 2, generator=generator, dtype=torch.float64))).sort().values.tolist()
    short = (1 + torch.rand(rotary // 2, generator=generator, dtype=torch.float64)).tolist()
    spec = longrope(factor, long, short, {"policy": "both", "value": None}).spec(rotary, base, original)
    config = LlamaConfig(
        hidden_size=4 * head, num_attention_heads=4, head_dim=head, max_position_embeddings=round(original * factor),
        rope_parameters={
            "rope_type": "longrope", "rope_theta": base, "partial_rotary_factor": partial, "short_factor": short, "long_factor": long,
            "factor": factor, "original_max_position_embeddings": original,
        },
    )  # fmt: skip
    for regime, length in enumerate((original, original + 1)):
        assert spec.regime_of(length) == regime
        theirs, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
        torch.testing.assert_close(inverse_frequencies(spec)[regime], theirs.double(), rtol=2e-6, atol=0)  # theirs is fp32
        assert spec.regimes[regime].attention_factor == pytest.approx(attention, rel=1e-9)


def test_policies_and_switches():
    table = [4.0] * 8
    pairs = {
        policy: longrope(4.0, table, attention={"policy": policy, "value": 1.5}).spec(16, 1e4, 64)
        for policy in ("none", "long_only", "both")
    }
    assert {policy: [r.attention_factor for r in spec.regimes] for policy, spec in pairs.items()} == {
        "none": [1, 1], "long_only": [1, 1.5], "both": [1.5, 1.5],
    }  # fmt: skip
    long, short = (longrope(4.0, table, switch=f"always_{name}").spec(16, 1e4, 64) for name in ("long", "short"))
    assert long.bounds == short.bounds == () and long.factors == tuple(table) and short.plain
    assert longrope(4.0, table, switch="upfront").spec(16, 1e4, 64).switch == "upfront"
    assert longrope_attention_factor(1.0, 64) == 1 and longrope_attention_factor(4.0, 64) == pytest.approx(
        math.sqrt(1 + math.log(4) / math.log(64))
    )


def test_auto_starts_at_the_theoretical_critical_dimension():
    spec = longrope2(8.0, rcd="auto").spec(64, 1e4, 256)
    assert spec.factors == (*below_critical(13, 8.0), *[8.0] * 19)
    ratios = [b / a for a, b in zip(spec.factors[:13], spec.factors[1:14], strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 13, rel=1e-12)  # one base below r: NTK's


def test_a_file_of_factors(tmp_path):
    file = tmp_path / "found.json"
    found = {"long_factor": [4.0 + i for i in range(8)], "short_factor": [1.0] * 8, "factor": 4.0, "original_max_position_embeddings": 64}
    file.write_text(json.dumps({**found, "rope_theta": 1e4}))
    spec = longrope2(4.0, str(file)).spec(16, 1e4, 64)
    assert list(spec.factors) == found["long_factor"] and spec.regimes[0].factors == ()
    for numbers, message in (
        ((16, 1e5, 64), r"model.rope_theta: 100000 contradicts rope_theta=10000"),
        ((16, 1e4, 128), r"model.max_length: 128 contradicts original_max_position_embeddings=64"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            longrope2(4.0, str(file)).spec(*numbers)
    with pytest.raises(UserError, match=r"^rope\.factor: 8 contradicts factor=4 of the file"):
        longrope(8.0, str(file)).spec(16, 1e4, 64)
    file.write_text(json.dumps({"rope_theta": 1e4, "rope_scaling": {**found, "attention_factor": 1.3}}))  # as a config.json has it
    found_with, chosen = (longrope(4.0, str(file), attention={"policy": "long_only", "value": v}).spec(16, 1e4, 64) for v in (None, 1.2))
    assert found_with.attention_factor == 1.3 and chosen.attention_factor == 1.2
    file.write_text(json.dumps({**found, "factor": "4"}))
    with pytest.raises(UserError, match=r"^rope\.factors: .* has factor='4'; allowed is a number > 0"):
        longrope(4.0, str(file))
    for text, message in (("{", "cannot be read as JSON"), ("[]", "holds no long_factor"), (None, "does not exist")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(UserError, match=f"^rope.factors: .*{message}"):
            longrope(4.0, str(file))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: longrope(4.0, [4.0] * 7).spec(16, 1e4, 64), r"rope.factors: 7 values; allowed are 8"),
        (lambda: longrope(4.0, [0.5, *[4.0] * 7]).spec(16, 1e4, 64), r"rope.factors\[0\]: 0.5; allowed is a finite number >= 1"),
        (lambda: longrope(4.0, [math.nan] * 8).spec(16, 1e4, 64), r"rope.factors\[0\]: nan"),
        (lambda: longrope(4.0).spec(16, 1e4, 64), r"rope.factors: null; give rotary_dim/2 numbers"),
        (lambda: longrope2(4.0).spec(16, 1e4, 64), r"rope.factors: null; give a table, .* or rope.rcd=auto"),
        (lambda: longrope2(4.0, [5.0, 4.0], rcd=6).spec(16, 1e4, 64), r"rope.factors\[7\]: 4.0 is below the one before it, 5.0"),
        (lambda: longrope2(4.0, [4.0] * 3, rcd=6).spec(16, 1e4, 64), r"rope.factors: 3 values; with rope.rcd=6 allowed are 2"),
        (lambda: longrope2(4.0, rcd=8).spec(16, 1e4, 64), r"rope.rcd: 8; allowed is a pair index from 1 to 7"),
        (lambda: longrope2(4.0, rcd=True), r"rope.rcd: True"),
        (lambda: longrope(0.5, [4.0] * 8), r"rope.factor: 0.5"),
        (lambda: longrope(4.0, [4.0] * 8, attention={"policy": "all", "value": None}), r"rope.attention_factor: .*long_only"),
        (lambda: longrope(4.0, [4.0] * 8, attention={"policy": "both", "value": 0}), r"rope.attention_factor.value: 0"),
        (lambda: longrope(4.0, [4.0] * 8, switch="never").spec(16, 1e4, 64), r"rope.switch: 'never'; allowed are recompute"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make()


def test_a_table_from_elsewhere_may_fall_but_says_so(caplog):
    assert longrope(4.0, [5.0, 4.0, *[6.0] * 6]).spec(16, 1e4, 64).factors[1] == 4.0
    assert "rope.factors: falls at 1" in caplog.text
