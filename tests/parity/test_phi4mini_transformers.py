"""Phi4Mini against transformers' Phi3ForCausalLM with copied random weights (eager attention), name by name and through folders.

Relative errors measured with these configurations, worst of six: logits 1.1e-6 in fp32, 7.3e-7 in float64 (its RMSNorm and its rotary
tables are fp32) and 2.5e-15 against the float64 reference below; gradients 4.0e-6 in fp32, ours and theirs 5e-6 and 7e-6 off float64.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from components.contracts import Batch
from components.interop import layouts, read
from components.interop.phi3 import config_json, fuse, unfuse
from components.models.phi4mini import Phi4Mini
from components.rope.rules import NTK, Linear, NoRescaling, YaRN
from tests.components.models.conftest import build, load_config

transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")

# num_heads, num_kv_heads, head_dim, intermediate_size, partial rotary factor, tied
CONFIGS = {
    "gqa-4-2": (4, 2, 16, 96, 0.75, True),
    "mqa-5-1": (5, 1, 8, 56, 0.75, True),  # 6 rotary dims: an odd half; hidden 40
    "mha-6-6": (6, 6, 12, 100, 0.5, False),
    "gqa-6-2": (6, 2, 8, 64, 1.0, True),  # groups of three
    "gqa-3-1": (3, 1, 20, 90, 0.6, False),  # hidden 60, 12 rotary dims
    "gqa-10-5": (10, 5, 8, 72, 0.75, False),  # hidden 80, an odd half again
}
LAYOUT = layouts()["phi3"]


def pair(config, rope=None, rope_parameters=None, window=None, original=64):
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
        original_max_position_embeddings=original,
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
    """Each block of a fused matrix by itself: a small one must not hide behind a large one."""
    ours, theirs = pair(config)
    tokens = ids()
    F.cross_entropy(ours.logits(ours(Batch(tokens)).hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(theirs(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    heads, kv_heads, head_dim, intermediate, *_ = config
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "intermediate_size": intermediate}
    expected = unfuse({name: parameter.grad for name, parameter in theirs.named_parameters()}, sizes)
    found = unfuse({their_name(name): parameter.grad for name, parameter in ours.named_parameters()}, sizes)
    assert len(found) == 3 * 9 + 2 + (not config[-1]) and found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


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


def loaded(folder, **given):
    """Our model from a folder, with nothing but what the folder says; and its numbers."""
    source = read(folder)
    numbers = LAYOUT.infer(source.tensors, source.about, given)
    ours = Phi4Mini(**numbers, rope=NoRescaling()).eval()
    ours.load_state_dict(LAYOUT.from_foreign(source.tensors, numbers))
    return ours, numbers


def reopened(folder, **options):
    """Their model from a folder, which must hold exactly its tensors."""
    options |= {"attn_implementation": "eager", "output_loading_info": True}
    built, report = transformers.Phi3ForCausalLM.from_pretrained(folder, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return built.eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_their_folder_gives_their_logits_and_goes_back_bit_for_bit(config, tmp_path):
    _, theirs = pair(config, window=None if config[0] % 2 else 7)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours, numbers = loaded(tmp_path / "theirs")
    check(ours, theirs, ids())
    tensors = LAYOUT.to_foreign(ours.state_dict(), numbers)
    LAYOUT.write(tmp_path / "ours", tensors, numbers, 2, 10**9)
    assert read(tmp_path / "ours").tensors.keys() == read(tmp_path / "theirs").tensors.keys()
    again = reopened(tmp_path / "ours")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, theirs(ids()).logits)
    same, _ = loaded(tmp_path / "ours")
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in same.state_dict().items())


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_lengths(length):
    check(*pair(CONFIGS["gqa-10-5"]), ids(3, length))


def test_the_head_size_need_not_be_the_quotient(tmp_path):
    """40 channels and 3 heads of 12: config.json says it then."""
    numbers = {
        "vocab_size": 130, "hidden_size": 40, "num_layers": 2, "intermediate_size": 50, "num_heads": 3, "num_kv_heads": 1, "head_dim": 12,
        "window": None, "partial_rotary_factor": 0.5, "position": "rope", "rope_theta": 500.0, "max_length": 64, "norm_eps": 1e-6,
        "tie_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    ours = Phi4Mini(**numbers, rope=NoRescaling()).eval()
    LAYOUT.write(tmp_path, LAYOUT.to_foreign(ours.state_dict(), numbers), numbers, 2, 10**9)
    theirs = reopened(tmp_path)
    check(ours, theirs, ids())
    assert loaded(tmp_path)[1] == numbers


def test_transformers_builds_these_tensors_from_the_real_config():
    numbers = dict(load_config("phi4mini", "3b8")) | {"num_layers": 3}
    with torch.device("meta"):
        ours = build("phi4mini", "3b8", num_layers=3)
        theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**config_json(numbers, 199999, torch.float32)))
    mine = LAYOUT.to_foreign(ours.state_dict(), numbers)
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    config = theirs.config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert (config.max_position_embeddings, config.original_max_position_embeddings, config.eos_token_id) == (4096, 4096, [199999])


def plain(tensors, about, tokens):
    """Logits from tensors and config.json as the model is described, in float64 and without any code of ours or theirs."""
    w = {name: tensor.double() for name, tensor in fuse(tensors).items()}
    heads, groups = about["num_attention_heads"], about["num_key_value_heads"]
    size, rope, eps = about["hidden_size"] // heads, about["rope_parameters"], about["rms_norm_eps"]
    turning, length = int(size * rope["partial_rotary_factor"]), tokens.shape[1]
    half = turning // 2
    frequency = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().float().double(), angle.sin().float().double()  # our tables are fp32 in every precision

    def norm(x, name):
        return w[name] * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def turn(x):
        a, b, rest = x[..., :half], x[..., half:turning], x[..., turning:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    rows = []
    for row in tokens:
        h = w["model.embed_tokens.weight"][row]
        for i in range(about["num_hidden_layers"]):
            p = f"model.layers.{i}."
            qkv = (norm(h, p + "input_layernorm.weight") @ w[p + "self_attn.qkv_proj.weight"].T).view(length, heads + 2 * groups, size)
            mixed = []
            for head in range(heads):
                group = head // (heads // groups)
                q, k, v = turn(qkv[:, head]), turn(qkv[:, heads + group]), qkv[:, heads + groups + group]
                scores = (q @ k.T / size**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
                mixed.append(scores.softmax(-1) @ v)
            h = h + torch.cat(mixed, -1) @ w[p + "self_attn.o_proj.weight"].T
            gate, up = (norm(h, p + "post_attention_layernorm.weight") @ w[p + "mlp.gate_up_proj.weight"].T).chunk(2, -1)
            h = h + (gate / (1 + (-gate).exp()) * up) @ w[p + "mlp.down_proj.weight"].T
        rows.append(norm(h, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T)
    return torch.stack(rows)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float64(config, tmp_path):
    _, theirs = pair(config)
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path)[0].double()
    tokens = ids(2, 30)
    with torch.no_grad():
        found, expected = ours.logits(ours(Batch(tokens)).hidden), theirs.double()(tokens).logits
    assert found.dtype == expected.dtype == torch.float64
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    reference = plain(read(tmp_path).tensors, json.loads((tmp_path / "config.json").read_text()), tokens)
    assert (found - reference).norm() <= 1e-10 * reference.norm()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bfloat16(config, tmp_path):
    """Matrices half as large as elsewhere, 5 times those at init: as large as there, the two differ by 3e-2, theirs being further off fp32.

    Measured: 1.1e-2 to 1.7e-2 between the two, 8e-3 to 1.1e-2 from ours to fp32, 9e-3 to 1.3e-2 from theirs.
    """
    _, theirs = pair(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    theirs.bfloat16().save_pretrained(tmp_path / "theirs")
    ours, numbers = loaded(tmp_path / "theirs")
    state = {name: tensor.bfloat16() for name, tensor in ours.state_dict().items()}
    LAYOUT.write(tmp_path / "ours", LAYOUT.to_foreign(state, numbers), numbers, 2, 10**9)
    before, after = (read(tmp_path / name).tensors for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    half, single = reopened(tmp_path / "ours"), reopened(tmp_path / "theirs", dtype=torch.float32)
    assert half.dtype == torch.bfloat16 and half.model.rotary_emb.inv_freq.dtype == torch.float32  # a cast would have rounded it
    check(ours, single, ids())
    ours = ours.bfloat16()
    with torch.no_grad():
        found, expected, exact = ours.logits(ours(Batch(ids())).hidden).float(), half(ids()).logits.float(), single(ids()).logits
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    assert (found - exact).norm() <= 1.2 * (expected - exact).norm()


def long_folder(config, folder, **parameters):
    """Their model with LongRoPE from 24 tokens to 64, with factors of its own for both regimes, and the folder that it wrote."""
    pairs = int(config[2] * config[4]) // 2
    factors = {"short_factor": [1 + 0.1 * i for i in range(pairs)], "long_factor": [1 + 2.5 * i for i in range(pairs)]}
    _, theirs = pair(config, rope_parameters={"rope_type": "longrope"} | factors | parameters, original=24)
    theirs.save_pretrained(folder)
    return theirs


def with_rope(folder):
    """Our model from a folder, turning as the folder says; its numbers and its spec."""
    ours, numbers = loaded(folder)
    spec = LAYOUT.rope(read(folder).about, numbers)
    ours.set_rope(spec)
    return ours, numbers, spec


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gqa-4-2", {}), ("mqa-5-1", {}), ("gqa-10-5", {}), ("gqa-4-2", {"attention_factor": 1.3}), ("mqa-5-1", {"factor": 5.0})],
    ids=["gqa-4-2", "mqa-5-1", "gqa-10-5", "attention factor given", "from factor"],
)
def test_longrope_in_both_regimes(name, parameters, tmp_path):
    """Their regime goes by the longest row of a batch; 24 tokens is the last short length."""
    theirs = long_folder(CONFIGS[name], tmp_path / "theirs", **parameters)
    ours, numbers, spec = with_rope(tmp_path / "theirs")
    assert (numbers["max_length"], spec.bounds, spec.target_len) == (24, (24,), 64)
    assert all(regime.attention_factor == theirs.model.rotary_emb.attention_scaling for regime in spec.regimes)
    for length in (7, 24, 25, 60):
        check(ours, theirs, ids(2, length))
    LAYOUT.write(tmp_path / "ours", LAYOUT.to_foreign(ours.state_dict(), numbers), numbers, 2, 10**9, rope=spec)
    again = reopened(tmp_path / "ours")
    assert again.config.original_max_position_embeddings == again.config.rope_parameters["original_max_position_embeddings"] == 24
    with torch.no_grad():
        for length in (24, 25):
            assert torch.equal(again(ids(2, length)).logits, theirs(ids(2, length)).logits)
    assert with_rope(tmp_path / "ours")[2] == spec


def test_transformers_reads_either_dialect_of_ours_alone(tmp_path):
    """It prefers rope_scaling where both stand: without it, and without rope_parameters, the logits stay the same."""
    theirs = long_folder(CONFIGS["gqa-4-2"], tmp_path / "theirs")
    ours, numbers, spec = with_rope(tmp_path / "theirs")
    LAYOUT.write(tmp_path, LAYOUT.to_foreign(ours.state_dict(), numbers), numbers, 2, 10**9, rope=spec)
    whole = json.loads((tmp_path / "config.json").read_text())
    assert sorted(whole["rope_scaling"]) == ["long_factor", "short_factor", "type"]  # transformers 4 refuses more
    for dropped in (["rope_scaling", "rope_theta", "partial_rotary_factor"], ["rope_parameters"]):
        (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if key not in dropped}))
        assert with_rope(tmp_path)[2] == spec
        again = reopened(tmp_path)
        with torch.no_grad():
            for length in (24, 25):
                assert torch.equal(again(ids(2, length)).logits, theirs(ids(2, length)).logits), dropped


@pytest.mark.parametrize("rule", [Linear(4.0), YaRN(4.0, 32.0, 1.0, True)], ids=["linear", "yarn"])
def test_a_rule_of_fixed_factors_is_written_as_longrope(rule, tmp_path):
    ours, _ = pair(CONFIGS["gqa-4-2"], rope=rule)
    heads, kv_heads, head_dim, intermediate, partial, tied = CONFIGS["gqa-4-2"]
    numbers = {
        "vocab_size": 130, "hidden_size": heads * head_dim, "num_layers": 3, "intermediate_size": intermediate, "num_heads": heads,
        "num_kv_heads": kv_heads, "head_dim": head_dim, "window": None, "partial_rotary_factor": partial, "position": "rope",
        "rope_theta": 10000.0, "max_length": 64, "norm_eps": 1e-5, "tie_embeddings": tied, "initializer_range": 0.02,
    }  # fmt: skip
    LAYOUT.write(tmp_path, LAYOUT.to_foreign(ours.state_dict(), numbers), numbers, 2, 10**9, rope=ours.rope_spec)
    for length in (50, 70):
        check(ours, reopened(tmp_path), ids(2, length))
    again, found, spec = with_rope(tmp_path)
    assert found == numbers and spec.regimes == ours.rope_spec.regimes and spec.target_len == 256
    assert torch.equal(again(Batch(ids())).hidden, ours(Batch(ids())).hidden)
