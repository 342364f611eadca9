"""Foreign state dicts against oracles written from their descriptions, round trips both ways, and everything that must be refused."""

import pytest
import torch

from components.contracts import UserError
from components.interop import layouts
from components.interop.common import period, unwrapped
from components.interop.samba_fla import config_json, from_fla, to_fla
from components.interop.samba_reference import from_samba, to_samba
from components.models.samba import Samba
from components.rope.rules import NoRescaling
from tests.components.interop.models import HEADS, config, fla_checkpoint, logits, model, reference_checkpoint, refused
from tests.components.interop.oracle import fla_logits, reference_logits

IDS = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(5))


def built(numbers, state):
    """Our model with the numbers that a layout inferred, laid over those that a checkpoint has no say in."""
    return model(config() | numbers, state)


def agree(ours, expected):
    """Relative error of fp32 logits of 4 layers against float64: 1.6e-6 measured."""
    assert (ours.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("heads", HEADS)
def test_reference_checkpoint_gives_its_logits(heads):
    w = reference_checkpoint(heads)
    numbers = layouts()["samba"].infer(w, {}, {"num_heads": HEADS[heads][0], "window": 7})
    assert tuple(numbers[key] for key in ("num_heads", "num_kv_heads", "head_dim")) == HEADS[heads]
    state = from_samba(w, numbers)
    agree(logits(built(numbers, state), IDS), reference_logits(w, IDS, HEADS[heads][0], 7))
    back = to_samba(state, config() | numbers)
    assert back.keys() == w.keys() and all(torch.equal(back[name], w[name]) for name in w)


@pytest.mark.parametrize("heads", HEADS)
def test_fla_checkpoint_gives_its_logits(heads):
    w = fla_checkpoint(heads)
    attn = {"layers": [1, 3], "num_heads": HEADS[heads][0], "window_size": 7, "rope_theta": 500.0}
    about = {"model_type": "samba", "hidden_size": 64, "attn": attn, "tie_word_embeddings": False, "norm_eps": 1e-5}
    numbers = layouts()["fla"].infer(w, about, {})
    assert tuple(numbers[key] for key in ("num_heads", "num_kv_heads", "head_dim", "window")) == (*HEADS[heads], 7)
    state = from_fla(w, numbers)
    agree(logits(built(numbers, state), IDS), fla_logits(w, IDS, HEADS[heads][0], 7, 500.0))
    back = to_fla(state, config() | numbers)
    assert back.keys() == w.keys() and all(torch.equal(back[name], w[name]) for name in w)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_our_model_written_as_either_samba_gives_our_logits(heads, tied):
    numbers = config(heads, tie_embeddings=tied)
    ours = model(numbers)
    expected = logits(ours, IDS)
    for write, oracle, read in ((to_samba, reference_logits, from_samba), (to_fla, fla_logits, from_fla)):
        theirs = write(ours.state_dict(), numbers)
        agree(expected, oracle(theirs, IDS, numbers["num_heads"], 7))
        again = model(numbers, read(theirs, numbers), seed=1)
        assert torch.equal(logits(again, IDS), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_pattern": ["mamba"], "mlp_pattern": [False]},
        {"layer_pattern": ["mamba"]},
        {"mlp_pattern": [False, True]},
        {"layer_pattern": ["attention"]},
        {"position": "none"},
        {"num_layers": 3, "conv_kernel": 3, "state_size": 5, "expand": 3, "dt_rank": 7},
    ],
    ids=["pure-mamba", "mamba-mlp", "mamba-swa-mlp", "attention", "nope", "odd-sizes"],
)
def test_the_reference_holds_the_ablations(changes):
    numbers = config(**changes)
    ours = model(numbers)
    theirs = to_samba(ours.state_dict(), numbers)
    base = 10000.0 if numbers["position"] == "rope" else None
    agree(logits(ours, IDS), reference_logits(theirs, IDS, 4, 7, base))
    found = layouts()["samba"].infer(theirs, {}, {"num_heads": 4, "window": 7, "position": numbers["position"]})
    assert torch.equal(logits(model(numbers | found, from_samba(theirs, found), seed=1), IDS), logits(ours, IDS))


def test_fused_attention_goes_by_kv_group():
    """Rows marked by what they are: [q1 q2 k1 v1 q3 q4 k2 v2] there, [q1 q2 q3 q4 k1 k2 v1 v2] here."""
    w = reference_checkpoint("gqa", layers=2)
    marks = torch.tensor([1.0, 2, 5, 7, 3, 4, 6, 8]).repeat_interleave(16)[:, None].expand(-1, 64)
    name = "transformer.h.1.attn.attn.weight"
    numbers = layouts()["samba"].infer(w, {}, {"num_heads": 4, "window": 7})
    fused = from_samba(w | {name: marks}, numbers)["layers.1.mixer.qkv_proj.weight"]
    assert torch.equal(fused[:, 0].reshape(8, 16)[:, 0], torch.arange(1.0, 9.0))


def test_half_precision_and_wrapped_names_are_read():
    w = reference_checkpoint("mqa", layers=2)
    half = {f"_forward_module.{name.replace('.h.', '.h._fsdp_wrapped_module.', 1)}": tensor.bfloat16() for name, tensor in w.items()}
    plain = unwrapped(half)
    assert plain.keys() == w.keys()
    numbers = layouts()["samba"].infer(plain, {}, {"num_heads": 4, "window": 7})
    state = from_samba(plain, numbers)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state["embed_tokens.weight"], w["transformer.wte.weight"].bfloat16().float())
    with pytest.raises(UserError, match=r"another tensor is lm_head\.weight too"):
        unwrapped({"lm_head.weight": torch.zeros(1), "module.lm_head.weight": torch.zeros(1)})


def test_unknown_and_missing_tensors_are_all_named():
    w = reference_checkpoint()
    numbers = layouts()["samba"].infer(w, {}, {"num_heads": 4, "window": 7})
    extra = {f"extra.{i}": torch.zeros(1) for i in range(7)}
    refused(lambda: from_samba(w | extra, numbers), "unknown tensors", *extra)
    gone = ("transformer.h.0.attn.D", "transformer.h.3.mlp.swiglu.w2.weight")
    refused(lambda: from_samba({k: v for k, v in w.items() if k not in gone}, numbers), "missing tensors", *gone)
    f = fla_checkpoint()
    attn = {"num_heads": 4, "window_size": 7}
    numbers = layouts()["fla"].infer(f, {"attn": attn}, {})
    refused(lambda: from_fla(f | {"backbone.layers.1.mixer.q_proj.bias": torch.zeros(64)}, numbers), "unknown tensors", "q_proj.bias")


def test_a_checkpoint_of_other_sizes_is_named():
    w, numbers = reference_checkpoint(), config()
    refused(lambda: from_samba(w, numbers | {"hidden_size": 32}), "a model of other sizes", "(96, 64), expected (96, 32)", "more")
    refused(lambda: from_samba(w, numbers | {"num_layers": 2}), "unknown tensors", "transformer.h.3.attn.proj.weight")
    w["transformer.h.2.attn.A_log"] = torch.zeros(128, 5)
    refused(lambda: from_samba(w, numbers), "transformer.h.2.attn.A_log is (128, 5), expected (128, 6)")


def test_what_cannot_be_inferred_is_asked_for_at_once():
    infer = layouts()["samba"].infer
    refused(lambda: infer(reference_checkpoint(), {}, {}), "model.num_heads, model.window", "model.num_heads=NUMBER model.window=NUMBER")
    refused(lambda: infer(reference_checkpoint(), {}, {"num_heads": 5, "window": 7}), "model.num_heads: 5 does not fit 64 rows")
    refused(lambda: layouts()["fla"].infer(fla_checkpoint(), {}, {"window": 7}), "model.num_heads: not stored")


@pytest.mark.parametrize("bad", [0, -1, "abc", None, 2.0])
def test_a_number_of_heads_that_is_none_is_one_line(bad):
    infer = layouts()["samba"].infer
    given = {"num_heads": bad, "window": 7}
    refused(lambda: infer(reference_checkpoint(), {}, given), f"model.num_heads: {bad!r}; allowed is a whole number")


def test_full_attention_beside_a_window_cannot_be_written_for_the_reference():
    """It has one window for all layers: read back, such a layer would see the window alone."""
    to_samba = layouts()["samba"].to_foreign
    for pattern, window in ((["mamba", "full_attention"], 7), (["attention", "full_attention"], None)):
        numbers = config(layer_pattern=pattern, window=window)
        refused(lambda n=numbers: to_samba(model(n).state_dict(), n), "model.layer_pattern", "one window for all layers that attend")
    numbers = config(layer_pattern=["mamba", "full_attention"], window=None)
    assert to_samba(model(numbers).state_dict(), numbers)
    refused(lambda: to_samba({}, config(layer_pattern=3)), "model.layer_pattern: 3")


def test_a_config_of_another_model_is_refused():
    f, infer = fla_checkpoint(), layouts()["fla"].infer
    attn = {"num_heads": 4, "window_size": 7}
    refused(lambda: infer(f, {"hidden_size": 2304, "attn": attn}, {}), "hidden_size=2304", "64")
    refused(lambda: infer(f, {"model_type": "mamba", "attn": attn}, {}), "model_type='mamba'")
    refused(lambda: infer(f, {"hidden_act": "gelu", "attn": attn}, {}), "hidden_act='gelu'")


def test_a_head_that_is_not_tied_is_noticed():
    w = reference_checkpoint()
    numbers = layouts()["samba"].infer(w, {}, {"num_heads": 4, "window": 7})
    assert numbers["tie_embeddings"]
    other = w | {"lm_head.weight": w["lm_head.weight"] + 1}
    refused(lambda: from_samba(other, numbers), "not tied", "model.tie_embeddings=false")
    assert not layouts()["samba"].infer(other, {}, {"num_heads": 4, "window": 7})["tie_embeddings"]
    alone = {k: v for k, v in w.items() if k != "lm_head.weight"}
    assert from_samba(alone, numbers).keys() == from_samba(w, numbers).keys()
    refused(lambda: from_samba(alone, numbers | {"tie_embeddings": False}), "missing tensors: lm_head.weight")


@pytest.mark.parametrize(
    ("write", "changes", "word"),
    [
        (to_samba, {"rope_theta": 500.0}, "model.rope_theta: 500.0"),
        (to_samba, {"norm_eps": 1e-6}, "model.norm_eps: 1e-06"),
        (to_samba, {"layer_pattern": ["mlp"]}, "model.layer_pattern: ['mlp']"),
        (to_samba, {"head_dim": 8}, "model.head_dim: 8"),
        (to_fla, {"head_dim": 8}, "model.head_dim: 8"),
        (to_fla, {"position": "none"}, "model.position: 'none'"),
        (to_fla, {"mlp_pattern": [False, True]}, "model.mlp_pattern: [False, True]"),
        (to_fla, {"layer_pattern": ["mamba", "attention", "mamba", "full_attention"]}, "model.layer_pattern"),
        (to_fla, {"intermediate_size": 250}, "model.intermediate_size: 250"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(write, changes, word):
    numbers = config(**changes)
    refused(lambda: write(model(numbers).state_dict(), numbers), word, "cannot be written as")


@pytest.mark.parametrize("inner", [256, 512, 768, 4096, 6144, 9984])
@pytest.mark.parametrize("width", [64, 1536, 2304, 2816])
def test_fla_computes_the_intermediate_size_from_the_ratio(width, inner):
    """Its rule: int(hidden_size * hidden_ratio * 2 / 3), rounded up to a multiple of 256; 4 is its default."""
    numbers = config(hidden_size=width, intermediate_size=inner, layer_pattern=["mamba"])
    ratio = config_json(numbers, 0)["hidden_ratio"]
    assert 256 * -(-int(width * ratio * 2 / 3) // 256) == inner
    assert (ratio == 4) == (inner == 256 * -(-int(width * 8 / 3) // 256))


def test_the_421m_model_of_the_paper_has_its_parameters_in_the_reference_too():
    """Shapes alone (meta tensors): 421,793,280 parameters with the tied head counted once."""
    sizes = {"vocab_size": 32000, "hidden_size": 1536, "num_layers": 12, "intermediate_size": 4096, "window": 2048, "state_size": 16}
    numbers = config(**sizes, num_heads=12, num_kv_heads=12, head_dim=128)
    with torch.device("meta"):
        ours = {name: torch.empty(p.shape) for name, p in Samba(**numbers, rope=NoRescaling()).state_dict().items()}
    theirs = to_samba(ours, numbers)
    assert sum(tensor.numel() for name, tensor in theirs.items() if name != "lm_head.weight") == 421_793_280
    assert theirs["transformer.h.11.attn.attn.weight"].shape == (3 * 1536, 1536)
    assert theirs["transformer.h.0.attn.x_proj.weight"].shape == (96 + 32, 3072)


def test_period():
    assert period(["a", "b", "a", "b"]) == ["a", "b"]
    assert period(["a", "b", "a"]) == ["a", "b"]
    assert period(["a", "a", "b"]) == ["a", "a", "b"]
