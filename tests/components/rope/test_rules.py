"""Rules against transformers' rope functions (fp32, hence 2e-6 relative) and against hand-computed values."""

import math

import pytest
import torch

from components.blocks import inverse_frequencies
from components.contracts import UserError
from components.rope.rules import NTK, Linear, NoRescaling, YaRN

# head_dim, partial rotary factor, base, original length, factor
CONFIGS = [
    (64, 1.0, 1e4, 256, 4.0),
    (128, 0.75, 1e4, 4096, 32.0),
    (128, 1.0, 5e5, 8192, 16.0),
    (24, 0.5, 1e4, 100, 3.7),
    (32, 0.75, 1e5, 2048, 5.0),
    (80, 1.0, 1e4, 2048, 1.0),
]


def transformers_rope(rope_type, head_dim, partial, base, original_len, factor, seq_len=None, **extra):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {
        "rope_type": rope_type,
        "rope_theta": base,
        "factor": factor,
        "partial_rotary_factor": partial,
        "original_max_position_embeddings": original_len,
        **extra,
    }
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=original_len, rope_parameters=parameters
    )
    return modeling.ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)


def check(spec, oracle):
    inv_freq, attention_factor = oracle
    assert inverse_frequencies(spec)[-1].dtype == torch.float64
    torch.testing.assert_close(inverse_frequencies(spec)[-1], inv_freq.double(), rtol=2e-6, atol=0)  # the oracle works in fp32
    assert spec.attention_factor == pytest.approx(attention_factor, rel=1e-9)


@pytest.mark.parametrize("config", CONFIGS)
def test_linear_equals_transformers(config):
    head_dim, partial, base, original_len, factor = config
    check(Linear(factor).spec(int(head_dim * partial), base, original_len), transformers_rope("linear", *config))


@pytest.mark.parametrize("config", CONFIGS)
def test_ntk_base_equals_transformers_dynamic(config):
    """transformers has no static NTK: its dynamic rule with factor 1 at a length of s * L0 is exactly that."""
    head_dim, partial, base, original_len, factor = config
    oracle = transformers_rope("dynamic", head_dim, partial, base, original_len, 1.0, seq_len=factor * original_len)
    check(NTK(factor, "base").spec(int(head_dim * partial), base, original_len), oracle)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_yarn_equals_transformers(config, truncate):
    head_dim, partial, base, original_len, factor = config
    spec = YaRN(factor, 32.0, 1.0, truncate).spec(int(head_dim * partial), base, original_len)
    check(spec, transformers_rope("yarn", *config, truncate=truncate))


def test_yarn_options_equal_transformers():
    config = (64, 1.0, 1e4, 512, 8.0)
    spec = YaRN(8.0, 16.0, 2.0, True, mscale=0.7, mscale_all_dim=1.3).spec(64, 1e4, 512)
    check(spec, transformers_rope("yarn", *config, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3))
    spec = YaRN(8.0, 32.0, 1.0, True, attention_factor=1.25).spec(64, 1e4, 512)
    check(spec, transformers_rope("yarn", *config, attention_factor=1.25))


def test_yarn_interpolates_frequencies_not_factors():
    """Mid-ramp 1/lambda is the mean of 1 and 1/s (hand-computed); interpolating lambda would give (1 + s)/2 = 4.5 instead of 16/9."""
    spec = YaRN(8.0, 4.0, 1.0, False).spec(64, 2.0**16, 1000)
    low, high = (64 * math.log(1000 / (n * 2 * math.pi)) / (2 * math.log(2.0**16)) for n in (4.0, 1.0))
    middle = (low + high) / 2
    i = round(middle)
    ramp = (i - low) / (high - low)
    assert 0 < ramp < 1
    assert spec.factors[i] == pytest.approx(1 / (ramp / 8 + 1 - ramp), rel=1e-12)
    assert spec.factors[0] == 1 and spec.factors[-1] == 8


def test_ntk_critical_by_hand():
    """lambda is s at the continuous critical dimension, and 652.9 at the end for (96, 1e4, 2048, 64), the value of the LongRoPE2 sheet."""
    spec = NTK(64.0, "critical").spec(96, 1e4, 2048)
    critical = 48 * math.log(2048 / 2 / math.pi) / math.log(1e4)
    ratio = spec.factors[1]  # lambda_i = ratio^i
    assert ratio**critical == pytest.approx(64.0, rel=1e-9)
    assert spec.factors[-1] == pytest.approx(652.9, abs=0.05)
    assert NTK(16.0, "critical").spec(128, 5e5, 8192).factors[-1] == pytest.approx(147.4, abs=0.05)


def test_plain_frequencies():
    spec = NoRescaling().spec(8, 1e4, 64)
    torch.testing.assert_close(
        inverse_frequencies(spec)[-1], torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("rule", [Linear(1), NTK(1, "base"), NTK(1, "critical"), YaRN(1, 32, 1, True)], ids=lambda r: type(r).__name__)
def test_factor_one_is_plain_rope(rule):
    spec = rule.spec(16, 1e4, 64)
    torch.testing.assert_close(inverse_frequencies(spec)[-1], inverse_frequencies(NoRescaling().spec(16, 1e4, 64))[-1], rtol=1e-15, atol=0)
    assert spec.attention_factor == 1 and spec.target_len == 64


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Linear(0.5), "rope.factor"),
        (lambda: Linear(float("nan")), "rope.factor"),
        (lambda: NTK(-1, "base"), "rope.factor"),
        (lambda: NTK("big", "base"), "rope.factor"),
        (lambda: NTK(2, "criticle"), "rope.variant.*did you mean critical"),
        (lambda: YaRN(float("inf"), 32, 1, True), "rope.factor"),
        (lambda: YaRN(2, 1, 32, True), "rope.beta_fast"),
        (lambda: YaRN(2, 32, 1, True, attention_factor=0.0), "rope.attention_factor"),
        (lambda: YaRN(2, 32, 1, True, mscale=0.7), "rope.mscale"),
        (lambda: YaRN(2, 32, 20, True).spec(8, 1e4, 64), "rope.beta_slow"),
        (lambda: Linear(2).spec(7, 1e4, 64), "model.partial_rotary_factor"),
        (lambda: NoRescaling().spec(8, 1.0, 64), "model.rope_theta"),
        (lambda: NoRescaling().spec(8, 1e4, 6), "model.max_length"),
    ],
)
def test_mistakes_are_named(make, named):
    with pytest.raises(UserError, match=named) as error:
        make()
    assert "\n" not in str(error.value)
