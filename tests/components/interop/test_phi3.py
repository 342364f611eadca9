"""Phi3ForCausalLM folders without transformers: names, config.json in both dialects, what is refused, what is never run."""

import json
import logging
import runpy

import pytest
import torch

from components.contracts import Batch, RopeRegime, RopeSpec
from components.interop import layouts, read
from components.interop.files import write_folder
from components.interop.phi3 import config_json, entries, from_phi3, fuse, infer, rope_of, to_phi3, undo, unfuse
from components.models.phi4mini import Phi4Mini
from components.rope.rules import NoRescaling
from tests.components.interop.models import refused
from tests.components.models.conftest import build, load_config

LAYOUT = layouts()["phi3"]
NUMBERS = {
    "vocab_size": 96, "hidden_size": 36, "num_layers": 2, "intermediate_size": 50, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8,
    "window": None, "partial_rotary_factor": 0.75, "position": "rope", "rope_theta": 10000.0, "max_length": 64, "norm_eps": 1e-5,
    "tie_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip
IDS = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(5))
NESTED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}


def numbers_of(**changes):
    return NUMBERS | changes


def model(numbers, state=None):
    torch.manual_seed(0)
    built = Phi4Mini(**numbers, rope=NoRescaling()).eval()
    if state is not None:
        built.load_state_dict(state)
    return built


def checkpoint(**changes):
    """Tensors and config.json of a random model."""
    numbers = numbers_of(**changes)
    return to_phi3(model(numbers).state_dict(), numbers), config_json(numbers, 5, torch.float32)


def without(about, *keys):
    return {key: value for key, value in about.items() if key not in keys}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 9000], ids=["one file", "shards"])
def test_a_folder_comes_back_bit_for_bit(tmp_path, tied, shard_bytes):
    numbers = numbers_of(tie_embeddings=tied)
    ours = model(numbers)
    LAYOUT.write(tmp_path, to_phi3(ours.state_dict(), numbers), numbers, 5, shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_bytes == 9000)
    source = read(tmp_path)
    assert len(source.tensors) == 2 * 6 + 2 + (not tied) and ("lm_head.weight" in source.tensors) != tied
    assert [name for name, layout in layouts().items() if layout.matches(source.tensors)] == ["phi3"]
    assert infer(source.tensors, source.about, {}) == numbers
    state = from_phi3(source.tensors, numbers)
    assert same(state, dict(ours.state_dict()))
    assert same(without(undo(state, numbers), *(["lm_head.weight"] if tied else [])), source.tensors)


def test_the_real_size():
    """Shapes alone (meta tensors): 194 tensors, 100,669,440 parameters a layer, 3,836,021,760 with the tied head counted once."""
    with torch.device("meta"):
        ours = build("phi4mini", "3b8")
    numbers = dict(load_config("phi4mini", "3b8"))
    assert len(entries(numbers)) == len(ours.state_dict()) == 194
    theirs = without(to_phi3(ours.state_dict(), numbers), "lm_head.weight")
    assert len(theirs) == 194 and sum(tensor.numel() for tensor in theirs.values()) == 3_836_021_760
    assert sum(tensor.numel() for name, tensor in theirs.items() if name.startswith("model.layers.7.")) == 100_669_440
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in theirs.items()}
    assert shapes["embed_tokens.weight"] == (200064, 3072) and shapes["norm.weight"] == (3072,)
    assert shapes["layers.31.self_attn.qkv_proj.weight"] == (5120, 3072)
    assert shapes["layers.31.mlp.gate_up_proj.weight"] == (16384, 3072) and shapes["layers.31.mlp.down_proj.weight"] == (3072, 8192)
    about = config_json(numbers, 199999, torch.bfloat16, stops=[200020])
    assert infer(theirs, about, {}) == without(numbers, "_target_")
    assert about["eos_token_id"] == [199999, 200020] and about["torch_dtype"] == "bfloat16" and "head_dim" not in about


def test_split_projections_and_back():
    tensors, about = checkpoint()
    split = unfuse(tensors, NUMBERS)
    layer = "model.layers.1."
    names = {f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"} | {
        f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert names <= set(split) and not any("qkv" in name or "gate_up" in name for name in split)
    assert [len(split[f"{layer}self_attn.{part}_proj.weight"]) for part in "qkv"] == [48, 16, 16]
    assert torch.equal(split[f"{layer}mlp.up_proj.weight"], tensors[f"{layer}mlp.gate_up_proj.weight"][50:])
    assert torch.equal(split[f"{layer}self_attn.k_proj.weight"], tensors[f"{layer}self_attn.qkv_proj.weight"][48:64])
    assert same(fuse(split), tensors) and same(unfuse(fuse(split), NUMBERS), split) and same(fuse(tensors), tensors)
    assert same(fuse(dict(reversed(split.items()))), tensors)  # whatever order a file has
    assert LAYOUT.matches(split) and same(LAYOUT.canonical(split), tensors)
    assert infer(split, about, {}) == NUMBERS and same(from_phi3(split, NUMBERS), from_phi3(tensors, NUMBERS))
    half = {name: tensor.bfloat16() for name, tensor in split.items()}
    assert same(unfuse(fuse(half), NUMBERS), half)


def test_rows_go_where_they_belong():
    """Rows marked by what they are: queries by head, then keys, then values; the gate before the other half."""
    tensors, _ = checkpoint()
    marks = torch.arange(80.0)[:, None].expand(80, 36)
    state = from_phi3(tensors | {"model.layers.0.self_attn.qkv_proj.weight": marks}, NUMBERS)
    assert torch.equal(state["layers.0.mixer.qkv_proj.weight"], marks)
    split = {f"model.layers.0.self_attn.{part}_proj.weight": marks[a:b] for part, a, b in (("q", 0, 48), ("k", 48, 64), ("v", 64, 80))}
    rest = without(tensors, "model.layers.0.self_attn.qkv_proj.weight")
    assert torch.equal(from_phi3(rest | split, NUMBERS)["layers.0.mixer.qkv_proj.weight"], marks)
    assert model(NUMBERS).layers[0].mixer.fused_splits() == {"qkv_proj.weight": [48, 16, 16]}


def test_unknown_missing_and_misshapen_tensors_are_all_named():
    tensors, _ = checkpoint()
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)} | {"score.weight": torch.zeros(1)}
    refused(lambda: from_phi3(tensors | extra, NUMBERS), "unknown tensors", *extra)
    gone = ("model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight")
    refused(lambda: from_phi3(without(tensors, *gone), NUMBERS), "missing tensors", *gone)
    split = without(unfuse(tensors, NUMBERS), "model.layers.1.self_attn.k_proj.weight")
    q, v, qkv = (f"model.layers.1.self_attn.{part}_proj.weight" for part in ("q", "v", "qkv"))
    refused(lambda: from_phi3(split, NUMBERS), f"unknown tensors: {q}, {v}", f"missing tensors: {qkv}")
    refused(lambda: from_phi3(tensors, numbers_of(intermediate_size=49)), "other sizes", "(100, 36), expected (98, 36)")
    refused(lambda: from_phi3(tensors, numbers_of(num_layers=1)), "unknown tensors", "model.layers.1.mlp.down_proj.weight")


def test_a_tied_head_that_is_stored_is_compared(caplog):
    tensors, about = checkpoint()
    stored = tensors | {"lm_head.weight": tensors["lm_head.weight"].clone()}
    with caplog.at_level(logging.WARNING):
        without_one = from_phi3(without(tensors, "lm_head.weight"), NUMBERS)
        assert not caplog.records
        state = from_phi3(stored, NUMBERS)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "lm_head.weight" in caplog.text
    assert same(state, without_one) and "lm_head.weight" not in state
    other = tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}
    assert infer(other, about, {})["tie_embeddings"]
    refused(lambda: from_phi3(other, NUMBERS), "lm_head.weight differs from model.embed_tokens.weight", "model.tie_embeddings=false")
    untied = numbers_of(tie_embeddings=False)
    assert torch.equal(from_phi3(other, untied)["lm_head.weight"], other["lm_head.weight"])
    refused(lambda: from_phi3(without(tensors, "lm_head.weight"), untied), "missing tensors: lm_head.weight")
    silent = without(about, "tie_word_embeddings")
    assert [infer(w, silent, {})["tie_embeddings"] for w in (stored, other)] == [True, False]


OLD = {"rope_theta": 10000.0, "partial_rotary_factor": 0.75, "rope_scaling": None}


@pytest.mark.parametrize(
    "keys",
    [OLD, {"rope_parameters": NESTED}, OLD | {"rope_parameters": NESTED}, OLD | {"rope_scaling": {"type": "default"}}],
    ids=["old", "new", "both", "old with a type"],
)
def test_both_dialects(keys):
    tensors, about = checkpoint()
    plain = without(about, "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")
    assert infer(tensors, plain | keys, {}) == NUMBERS


def test_both_dialects_are_written():
    _, about = checkpoint(rope_theta=500, window=9)
    assert about["rope_parameters"] == NESTED | {"rope_theta": 500.0}
    assert (about["rope_theta"], about["partial_rotary_factor"], about["rope_scaling"]) == (500.0, 0.75, None)
    assert (about["max_position_embeddings"], about["original_max_position_embeddings"], about["sliding_window"]) == (64, 64, 9)
    assert (about["model_type"], about["architectures"], about["eos_token_id"]) == ("phi3", ["Phi3ForCausalLM"], [5])
    assert about["torch_dtype"] == "float32" and about["head_dim"] == 8  # 36 / 6 is 6
    json.dumps(about)


def test_no_number_comes_from_a_default_of_a_class():
    """Phi3Config's own are 32 heads, no groups, 4096 tokens: what config.json does not say is asked for, all at once."""
    tensors, about = checkpoint()
    words = ("model.num_heads", "model.window", "model.rope_theta", "model.max_length", "model.norm_eps")
    refused(lambda: infer(tensors, {}, {}), *words, "not stored in the checkpoint")
    refused(lambda: infer(tensors, without(about, "rms_norm_eps"), {}), "model.norm_eps: not stored", "model.norm_eps=NUMBER")
    given = {"num_heads": 6, "window": None, "rope_theta": 10000.0, "max_length": 64, "norm_eps": 1e-5, "partial_rotary_factor": 0.75}
    assert infer(tensors, {}, given) == without(NUMBERS, "initializer_range")
    assert infer(tensors, about, {"norm_eps": 1e-3})["norm_eps"] == 1e-3
    whole = without(about, "partial_rotary_factor", "rope_parameters")  # Phi-3's files have no such key
    assert infer(tensors, whole, {})["partial_rotary_factor"] == 1.0
    nulls = about | {"num_key_value_heads": None, "head_dim": None}
    assert infer(tensors, nulls, {}) == NUMBERS


@pytest.mark.parametrize(("window", "found"), [(None, None), (262144, None), (64, None), (63, 63), (7, 7)])
def test_a_window_that_hides_nothing_is_none(window, found):
    tensors, about = checkpoint()
    assert infer(tensors, about | {"sliding_window": window}, {})["window"] == found


def test_the_length_before_rescaling():
    tensors, about = checkpoint()
    long = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    new = about | {"max_position_embeddings": 512, "rope_parameters": NESTED | long | {"original_max_position_embeddings": 64}}
    assert infer(tensors, new, {}) == NUMBERS
    assert infer(tensors, new | {"sliding_window": 100}, {})["window"] == 100
    for kind in ("longrope", "su", "yarn"):
        old = without(about, "rope_parameters") | {
            "max_position_embeddings": 512,
            "rope_scaling": without(long, "rope_type") | {"type": kind},
        }
        assert infer(tensors, old, {}) == NUMBERS
    stale = new | {"original_max_position_embeddings": 4096}  # what Phi3Config puts there when nobody says otherwise
    refused(
        lambda: infer(tensors, stale, {}), "rope_parameters.original_max_position_embeddings=64", "original_max_position_embeddings=4096"
    )
    unscaled = about | {"max_position_embeddings": 512, "original_max_position_embeddings": 4096}
    assert infer(tensors, unscaled, {})["max_length"] == 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type='llama'", "'phi3'"]),
        ({"model_type": "phi4_multimodal"}, ["model_type='phi4_multimodal'"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"attention_bias": True, "resid_pdrop": 0.1}, ["attention_bias=True", "resid_pdrop=0.1", "0.0"]),
        ({"embd_pdrop": 0.1}, ["embd_pdrop=0.1"]),
        ({"attention_dropout": 0.2}, ["attention_dropout=0.2"]),
        ({"hidden_size": 40}, ["hidden_size=40", "36"]),
        ({"num_hidden_layers": 3}, ["num_hidden_layers=3", "2"]),
        ({"intermediate_size": 64}, ["intermediate_size=64", "50"]),
        ({"vocab_size": 95}, ["vocab_size=95", "96"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "2"]),
        ({"head_dim": 6}, ["head_dim=6", "8"]),
        ({"num_attention_heads": 7}, ["model.num_heads: 7 does not fit 48 rows"]),
        ({"num_attention_heads": "6"}, ["model.num_heads: '6'", "allowed are numbers"]),
        ({"rope_theta": 500.0}, ["rope_parameters.rope_theta=10000.0", "rope_theta=500.0", "must be equal"]),
        ({"rope_parameters": 3}, ["rope_parameters=3", "allowed is null or an object"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type='linear'", "'longrope'"]),
        ({"max_position_embeddings": "4k", "sliding_window": 3}, ["max_position_embeddings", "'4k'", "allowed are numbers"]),
    ],
)
def test_a_config_of_another_model_is_refused(changes, words):
    tensors, about = checkpoint()
    refused(lambda: infer(tensors, about | changes, {}), *words)


def test_positions_that_cannot_be_written():
    numbers = numbers_of(position="none")
    refused(lambda: to_phi3(model(numbers).state_dict(), numbers), "model.position: 'none' cannot be written as")


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 40]}


def scaled(about, **changes):
    """config.json in the new dialect with LongRoPE from 64 to 512 tokens."""
    nested = NESTED | LONG | {"original_max_position_embeddings": 64} | changes
    return about | {"max_position_embeddings": 512, "rope_parameters": nested}


def test_the_rule_of_the_real_model():
    """48 factors of either kind; the released file gives no attention factor, which then holds for short rows too."""
    numbers = dict(load_config("phi4mini", "3b8"))
    short, long = [1.0] * 48, [1.0 + i for i in range(48)]
    nested = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 4096}
    spec = rope_of({"rope_parameters": nested, "max_position_embeddings": 131072}, numbers)
    assert (spec.rotary_dim, spec.original_len, spec.target_len, spec.bounds, spec.rule) == (96, 4096, 131072, (4096,), "longrope")
    assert [spec.regime_of(length) for length in (4095, 4096, 4097)] == [0, 0, 1]
    assert [round(regime.attention_factor, 10) for regime in spec.regimes] == [1.1902380714] * 2
    assert [regime.factors for regime in spec.regimes] == [(), tuple(long)]  # () stands for ones
    about = config_json(numbers, 199999, torch.bfloat16, spec)
    assert about["rope_scaling"] == {"type": "longrope", "short_factor": short, "long_factor": long}
    assert about["rope_parameters"] == nested | {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert (about["max_position_embeddings"], about["original_max_position_embeddings"]) == (131072, 4096)
    assert rope_of(about, numbers) == spec


def test_a_rule_comes_back_as_it_was_written():
    _, about = checkpoint(hidden_size=48)
    numbers = numbers_of(hidden_size=48)  # 6 heads of 8: the quotient
    assert rope_of(about, numbers) is None and LAYOUT.rope is rope_of
    for spec in (
        RopeSpec(6, 10000.0, (RopeRegime((), 1.0, 64), RopeRegime((1.0, 2.0, 3.0), 1.0)), 64, 512, "longrope"),
        RopeSpec(6, 10000.0, (RopeRegime((1.0, 1.5, 2.0), 1.25, 64), RopeRegime((1.0, 2.0, 3.0), 1.25)), 64, 512, "longrope"),
        RopeSpec(6, 10000.0, (RopeRegime((4.0, 4.0, 4.0)),), 64, 256, "longrope"),
    ):
        written = json.loads(json.dumps(config_json(numbers, 5, torch.float32, spec)))
        assert rope_of(written, numbers) == spec
        assert rope_of(without(written, "rope_parameters"), numbers) == rope_of(without(written, "rope_scaling"), numbers) == spec
    plain = RopeSpec(6, 10000.0, original_len=64, target_len=64)
    assert config_json(numbers, 5, torch.float32, plain) == config_json(numbers, 5, torch.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"long_factor": [1.0] * 4}, ["long_factor is a list of 4", "allowed are 3 numbers > 0", "6 rotary dims"]),
        ({"short_factor": [1.0] * 2}, ["short_factor is a list of 2"]),
        ({"short_factor": None}, ["short_factor is None"]),
        ({"long_factor": "1, 2, 3"}, ["long_factor is '1, 2, 3'"]),
        ({"long_factor": [1.0, 0.0, 2.0]}, ["long_factor is a list of 3", "> 0"]),
        ({"long_factor": [1.0, True, 2.0]}, ["long_factor is a list of 3"]),
        ({"long_factor": [1.0, float("nan"), 2.0]}, ["long_factor is a list of 3"]),
        ({"factor": -1.0}, ["factor=-1.0", "> 0"]),
        ({"attention_factor": "1.2"}, ["attention_factor='1.2'", "> 0"]),
    ],
)
def test_factors_that_do_not_fit_are_refused(changes, words):
    _, about = checkpoint()
    refused(lambda: rope_of(scaled(about, **changes), NUMBERS), *words)
    assert rope_of(scaled(about), NUMBERS).factors == (1.0, 2.0, 40.0)


def test_rules_that_cannot_be_written():
    numbers = numbers_of(hidden_size=48)
    factors = ((1.0, 1.0, 1.0), (1.0, 2.0, 3.0))
    for multipliers, end, word in (((1.0, 1.2), 64, "[1.0, 1.2]"), ((1.2, 1.2), 32, "[32] tokens, transformers' Phi3ForCausalLM once")):
        regimes = (RopeRegime(factors[0], multipliers[0], end), RopeRegime(factors[1], multipliers[1]))
        spec = RopeSpec(6, 10000.0, regimes, 64, 512, "longrope")
        ways = ("rope.switch=always_long", "rope.switch=always_short")
        refused(lambda spec=spec: config_json(numbers, 5, torch.float32, spec), "rope: longrope", word, *ways)
        for switch in ("always_long", "always_short"):  # the ways out
            one = spec.switched(switch)
            assert rope_of(config_json(numbers, 5, torch.float32, one), numbers).attention_factor == one.attention_factor
    spec = RopeSpec(6, 10000.0, (RopeRegime(factors[1]),), 64, 512, "ntk")
    refused(lambda: config_json(NUMBERS, 5, torch.float32, spec), "model.head_dim: 8 cannot be written as", "hidden_size / num_heads = 6")


def test_code_that_a_folder_names_is_never_run(tmp_path):
    """auto_map and a module beside it, as folders that ship their own code have them."""
    tensors, about = checkpoint()
    code = tmp_path / "modeling_phi3.py"
    code.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Phi3ForCausalLM: ...\n")
    for name in ("configuration_phi3.py", "__init__.py"):
        (tmp_path / name).write_text(code.read_text())
    names = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    write_folder(tmp_path, tensors, about | {"auto_map": names, "trust_remote_code": True})
    source = read(tmp_path)
    numbers = infer(source.tensors, source.about, {})
    ours = model(numbers, from_phi3(source.tensors, numbers))
    assert torch.equal(ours(Batch(IDS)).hidden, model(NUMBERS)(Batch(IDS)).hidden) and not (tmp_path / "ran").exists()
    LAYOUT.write(tmp_path / "out", to_phi3(ours.state_dict(), numbers), numbers, 5, 10**9)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    runpy.run_path(str(code))
    assert (tmp_path / "ran").exists()  # it would have been seen
