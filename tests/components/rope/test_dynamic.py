"""Dynamic NTK against transformers' rule at many lengths (fp32, hence 2e-6 relative), and its steps."""

import pytest
import torch

from components.contracts import UserError
from components.rope.dynamic import Dynamic
from components.rope.rules import NTK

# head_dim, partial rotary factor, base, original length, factor
CONFIGS = [
    (64, 1.0, 1e4, 256, 4.0),
    (128, 0.75, 1e4, 4096, 8.0),
    (128, 1.0, 5e5, 8192, 1.0),
    (24, 0.5, 1e4, 100, 3.7),
    (32, 0.75, 1e5, 2048, 10.5),
]


def frequencies(factors, dim, base):
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return 1 / (torch.tensor(factors or [1.0], dtype=torch.float64) * base**exponent)


def oracle(config, length):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    head, partial, base, original, factor = config
    parameters = {"rope_type": "dynamic", "rope_theta": base, "factor": factor, "partial_rotary_factor": partial}
    theirs = LlamaConfig(
        hidden_size=2 * head, num_attention_heads=2, head_dim=head, max_position_embeddings=original, rope_parameters=parameters
    )
    return modeling.ROPE_INIT_FUNCTIONS["dynamic"](theirs, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("config", CONFIGS)
def test_equals_transformers_at_any_length(config):
    head, partial, base, original, factor = config
    dim, rule = int(head * partial), Dynamic(factor, None)
    for length in (1, original - 1, original, original + 1, 2 * original, 5 * original // 2, 9 * original):
        theirs, attention = oracle(config, length)
        torch.testing.assert_close(frequencies(rule.factors_at(dim, original, length), dim, base), theirs.double(), rtol=2e-6, atol=0)
        assert attention == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_equals_transformers_at_its_end(config):
    head, partial, base, original, factor = config
    dim, target = int(head * partial), 7 * original // 2
    spec = Dynamic(factor, target).spec(dim, base, original)
    assert spec.bounds == (original, 2 * original, 3 * original) and spec.target_len == target and spec.attention_factor == 1
    for length in (*spec.bounds, target):
        ours = frequencies(spec.regimes[spec.regime_of(length)].factors, dim, base)
        torch.testing.assert_close(ours, oracle(config, length)[0].double(), rtol=2e-6, atol=0)
    assert spec.regimes[0].factors == () and spec.regime_of(original) == 0 and spec.regime_of(original + 1) == 1
    assert spec.regime_of(100 * original) == 3  # longer rows keep the last step


def test_by_hand():
    """alpha(3 L0) of f = 2 is 5: static NTK of that factor; f = 1 is static NTK of T / L0."""
    assert Dynamic(2.0, None).factors_at(16, 64, 192) == pytest.approx(NTK(5.0, "base").spec(16, 1e4, 64).factors, rel=1e-12)
    assert Dynamic(1.0, None).factors_at(16, 64, 192) == pytest.approx(NTK(3.0, "base").spec(16, 1e4, 64).factors, rel=1e-12)
    spec = Dynamic(4.0, None).spec(16, 1e4, 64)
    assert spec.bounds == (64, 128, 192) and spec.target_len == 256
    assert spec.factors[-1] == pytest.approx(13.0, rel=1e-12)  # f^2 - f + 1
    assert Dynamic(1.0, None).spec(16, 1e4, 64).plain and not spec.plain
    assert len(Dynamic(1.0, 128 * 64).spec(16, 1e4, 64).regimes) == 128  # the last index an int8 holds is 127


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Dynamic(0.5, None), r"rope\.factor: 0\.5"),
        (lambda: Dynamic(2.0, 3.5), r"rope\.target_len: 3\.5"),
        (lambda: Dynamic(2.0, True), r"rope\.target_len: True"),
        (lambda: Dynamic(2.0, 63).spec(8, 1e4, 64), r"rope\.target_len: 63 tokens; allowed are 64"),
        (lambda: Dynamic(2.0, 129 * 64).spec(8, 1e4, 64), r"rope\.target_len: 8256 tokens; allowed are 64 .* to 8192"),
        (lambda: Dynamic(200.0, None).spec(8, 1e4, 64), r"rope\.factor=200 .*12800 tokens"),
        (lambda: Dynamic(2.0, None).spec(2, 1e4, 64), "did you mean rope=linear"),
        (lambda: Dynamic(2.0, None).spec(7, 1e4, 64), r"model\.partial_rotary_factor"),
    ],
)
def test_mistakes_are_named(make, named):
    with pytest.raises(UserError, match=named) as error:
        make()
    assert "\n" not in str(error.value)
