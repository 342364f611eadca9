"""Phi4Mini against transformers' Phi3ForCausalLM with copied random weights (fp32, eager attention)."""

import pytest
import torch
import torch.nn.functional as F

from components.contracts import Batch
from components.models.phi4mini import Phi4Mini
from components.rope.rules import NTK, Linear, NoRescaling, YaRN

transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")

# num_heads, num_kv_heads, head_dim, intermediate_size, partial rotary factor, tied
CONFIGS = {
    "gqa-4-2": (4, 2, 16, 96, 0.75, True),
    "mqa-5-1": (5, 1, 8, 56, 0.75, True),  # 6 rotary dims: an odd half; hidden 40
    "mha-6-6": (6, 6, 12, 100, 0.5, False),
    "gqa-6-2": (6, 2, 8, 64, 1.0, True),  # groups of three
}


def pair(config, rope=None, rope_parameters=None, window=None):
    heads, kv_heads, head_dim, intermediate, partial, tied = config
    hidden, vocab, length = heads * head_dim, 130, 64
    theirs_config = transformers.Phi3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        original_max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        sliding_window=window,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": partial, **(rope_parameters or {"rope_type": "default"})},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.Phi3ForCausalLM(theirs_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # larger than at init, so that attention is far from uniform
            parameter.copy_(torch.randn_like(parameter) * 0.2 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.5)
    ours = Phi4Mini(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=3,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        partial_rotary_factor=partial,
        position="rope",
        rope_theta=10000.0,
        max_length=length,
        norm_eps=1e-5,
        tie_embeddings=tied,
        initializer_range=0.02,
        rope=rope or NoRescaling(),
    ).eval()
    ours.load_state_dict({name: theirs.state_dict()[their_name(name)] for name in ours.state_dict()})
    return ours, theirs


def their_name(name):
    if name == "lm_head.weight":
        return name
    name = name.replace(".mixer_norm.", ".input_layernorm.").replace(".mlp_norm.", ".post_attention_layernorm.")
    return "model." + name.replace(".mixer.", ".self_attn.")


def ids(rows=2, length=50):
    return torch.randint(3, 130, (rows, length), generator=torch.Generator().manual_seed(1))


def check(ours, theirs, tokens):
    with torch.no_grad():
        got, expected = ours.logits(ours(Batch(tokens)).hidden), theirs(tokens).logits
    assert expected.abs().max() > 1
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() + 2e-6


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits(config):
    check(*pair(config), ids())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients(config):
    ours, theirs = pair(config)
    tokens = ids()
    F.cross_entropy(ours.logits(ours(Batch(tokens)).hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(theirs(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        reference = expected[their_name(name)]
        assert (parameter.grad - reference).norm() <= 1e-5 * reference.norm(), name


def test_window_counts_the_query_itself():
    check(*pair(CONFIGS["gqa-4-2"], window=7), ids())


@pytest.mark.parametrize(
    "rule", [Linear(4.0), NTK(3.0, "base"), NTK(3.0, "critical"), YaRN(4.0, 32.0, 1.0, True)], ids=["linear", "ntk", "ntk-critical", "yarn"]
)
def test_rope_rules_inside_the_model(rule):
    """Phi3 knows only longrope beside the default; any static rule is one with its factors in both lists and its attention factor."""
    spec = rule.spec(12, 10000.0, 64)
    parameters = {
        "rope_type": "longrope",
        "short_factor": list(spec.factors),
        "long_factor": list(spec.factors),
        "original_max_position_embeddings": 64,
        "attention_factor": spec.attention_factor,
    }
    check(*pair(CONFIGS["gqa-4-2"], rope=rule, rope_parameters=parameters), ids())


def test_greedy_cached_decoding():
    ours, theirs = pair(CONFIGS["gqa-6-2"])
    prompt = ids(1, 11)
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 11:].tolist()
    state, tokens, out = ours.new_state(1, 31), prompt, []
    with torch.no_grad():
        for _ in range(20):
            tokens = ours.logits(ours(Batch(tokens), state).hidden[:, -1:]).argmax(-1)
            out.append(int(tokens))
    assert out == expected
