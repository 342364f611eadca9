"""What lora, dora and mtl_lora share: ranks by module, modules trained in full, biases, matched ranks."""

import json
import math

import pytest
import torch
from torch import nn

from components.adapters.base import adapter_layers, adapter_state, disabled, merge, parameter_roles, task_ids, unwrap
from components.adapters.base.low_rank import matched_rank
from components.adapters.dora import DoRA
from components.adapters.lora import LoRA
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, dora, ids, lora, mtl_lora, relative

ADAPTERS = [lora, dora, mtl_lora]
EXTRAS = {
    "rank_pattern": {r"0\.o_proj": 5, "o_proj": 3},
    "alpha_pattern": {"qkv_proj|down_proj": 1.5},
    "modules_to_save": ["1.norm", "head"],
    "train_bias": "adapted",
}


def adapted(make, **changes):
    adapter, model = make(**changes), Toy()
    adapter.apply(model)
    if task_ids(model).names:
        task_ids(model).set("b")
    return adapter, model


def stir(model: nn.Module) -> nn.Module:
    """As training would move it: the adapter, and whatever else is trainable."""
    awaken(model)
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" not in name:
            p.data += 0.1 * torch.empty_like(p).normal_(generator=generator)
    return model


@pytest.mark.parametrize("make", ADAPTERS)
def test_rank_and_scale_by_module(make):
    """The first pattern that fits the end of a name, from a dot; the scale has the module's own rank and alpha."""
    for use_rslora in (False, True):
        _, model = adapted(make, use_rslora=use_rslora, **EXTRAS)
        for name, layer in adapter_layers(model):
            rank = 5 if name == "blocks.0.o_proj" else 3 if name == "blocks.1.o_proj" else 2
            alpha = 1.5 if name.endswith(("qkv_proj", "down_proj")) else 6
            a = layer.lora_A if isinstance(layer.lora_A, nn.Parameter) else layer.lora_A.weight
            assert a.shape[0] == rank and layer.scale == alpha / (math.sqrt(rank) if use_rslora else rank), name


@pytest.mark.parametrize("make", ADAPTERS)
def test_what_is_trained_in_full_learns_and_nothing_else_of_the_base(make):
    _, model = adapted(make, **EXTRAS)
    stir(model)(ids()).square().sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    biases = {f"blocks.{i}.{name}.base_layer.bias" for i in (0, 1) for name in ("qkv_proj", "down_proj")}
    assert {name for name in learned if "lora_" not in name} == biases | {"blocks.1.norm.weight", "blocks.1.norm.bias", "head.weight"}
    assert learned == set(adapter_state(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}
    assert parameter_roles(model)["head.weight"] == "head"


def test_all_biases():
    _, model = adapted(lora, targets=["o_proj"], train_bias="all")
    own = {name for name in adapter_state(model) if "lora_" not in name}
    assert own == {f"blocks.{i}.{name}.bias" for i in (0, 1) for name in ("norm", "qkv_proj", "down_proj")}


def test_two_adapters_on_other_modules_learn_side_by_side():
    model = Toy()
    mtl_lora(targets=["qkv_proj"], modules_to_save=["head"]).apply(model)
    dora(targets=["o_proj"], modules_to_save=["norm"]).apply(model)
    with pytest.raises(UserError, match=r"blocks\.0\.qkv_proj has an adapter already; apply one adapter to a module"):
        dora(targets=["qkv_proj"]).apply(model)
    task_ids(model).set("c")
    stir(model)(ids()).square().sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == set(adapter_state(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learned if "lora_" not in name} == {
        "head.weight", *(f"blocks.{i}.norm.{part}" for i in (0, 1) for part in ("weight", "bias"))
    }  # fmt: skip


@pytest.mark.parametrize("make", ADAPTERS)
def test_folder_round_trip_is_exact(make, tmp_path):
    adapter, model = adapted(make, **EXTRAS)
    adapter.save(stir(model), tmp_path)
    again, other = adapted(make, **EXTRAS)
    again.load(other, tmp_path)
    assert torch.equal(other(ids()), model(ids()))
    for key, value in {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {}, "modules_to_save": ["head"], "train_bias": "none"}.items():
        changed, third = adapted(make, **{**EXTRAS, key: value})
        with pytest.raises(UserError, match=str(tmp_path)):
            changed.load(third, tmp_path)


@pytest.mark.parametrize("train_bias", ["none", "adapted", "all"])
@pytest.mark.parametrize("make", [lora, dora])
def test_peft_reads_our_folder(make, train_bias, tmp_path):
    peft = pytest.importorskip("peft")
    adapter, ours = adapted(make, **EXTRAS | {"train_bias": train_bias, "modules_to_save": ["head", "norm"]})
    adapter.save(stir(ours), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Toy(), tmp_path)
    assert relative(theirs.eval()(ids()), ours.eval()(ids())) < 1e-6
    state = peft.get_peft_model_state_dict(theirs)
    copies = (".original_module.", ".modules_to_save.")  # of biases in modules_to_save, with bias=all alone
    assert {name: tuple(value.shape) for name, value in state.items() if not any(word in name for word in copies)} == {
        f"base_model.model.{name}": tuple(value.shape) for name, value in adapter_state(ours).items()
    }


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_we_read_the_folder_of_peft(use_dora, bias, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["o_proj", "qkv_proj"], use_dora=use_dora, bias=bias, rank_pattern=EXTRAS["rank_pattern"],
        alpha_pattern={"^blocks.1.qkv_proj": 9}, modules_to_save=["down_proj", "norm", "head"],
    )  # fmt: skip
    theirs = stir(peft.get_peft_model(Toy(), config))
    theirs.save_pretrained(tmp_path)
    ours, adapter = Toy(), (DoRA if use_dora else LoRA).from_folder(tmp_path)
    adapter.apply(ours)
    adapter.load(ours, tmp_path)
    assert relative(ours.eval()(ids()), theirs.eval()(ids())) < 1e-6


def test_a_task_exported_keeps_the_extras(tmp_path):
    peft = pytest.importorskip("peft")
    adapter, model = adapted(mtl_lora, **EXTRAS)
    stir(model).eval()
    adapter.export_peft(model, "b", tmp_path)
    assert relative(peft.PeftModel.from_pretrained(Toy(), tmp_path).eval()(ids()), model(ids())) < 1e-6


def test_merged_and_unwrapped_keeps_what_was_trained_in_full():
    _, model = adapted(lora, **EXTRAS)
    expected = stir(model).eval()(ids())
    merge(model)
    unwrap(model)
    assert relative(model(ids()), expected) < 1e-5 and not any("lora_" in name for name in model.state_dict())
    lora().apply(model)
    assert not any("norm" in name for name in adapter_state(model))


def test_a_model_whose_base_is_trained_cannot_be_switched_off():
    for changes in ({"modules_to_save": ["head"]}, {"train_bias": "adapted"}):
        _, model = adapted(lora, **changes)
        with pytest.raises(UserError, match="is trained in full, so that the base model is gone"), disabled(model):
            pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "adapter.rank_pattern: 'q_proj' fits none of the wrapped modules, such as blocks.0.qkv_proj"),
        ({"alpha_pattern": {"proj": 4}}, "adapter.alpha_pattern: 'proj' fits none"),  # ends are bounded by dots
        ({"rank_pattern": {"o_proj": 0}}, "adapter.rank_pattern.o_proj: 0; the rank must be a whole number, at least 1"),
        ({"alpha_pattern": {"o_proj": -1}}, "adapter.alpha_pattern.o_proj: -1; must be a finite number above 0"),
        ({"rank_pattern": {"(": 3}}, "adapter.rank_pattern: '(' is not a regular expression"),
        ({"modules_to_save": ["nrm"]}, "adapter.modules_to_save: no module's name ends in 'nrm'; nearest: "),
        ({"modules_to_save": ["o_proj"]}, "adapter.modules_to_save: blocks.0.o_proj hits blocks.0.o_proj, which has an adapter"),
        ({"modules_to_save": ["blocks.1"]}, "adapter.modules_to_save: blocks.1 hits blocks.1.qkv_proj, which has an adapter"),
        ({"train_bias": "lora_only"}, "adapter.train_bias: 'lora_only'; allowed are none, adapted, all"),
    ],
)
@pytest.mark.parametrize("make", ADAPTERS)
def test_mistakes_are_named_and_change_nothing(make, changes, words):
    model = Toy()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UserError) as caught:
        make(**changes).apply(model)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_a_tied_head_cannot_be_trained_in_full():
    with pytest.raises(UserError, match=r"adapter\.modules_to_save: (head|embed) shares its weight with (head|embed)"):
        lora(modules_to_save=["head"]).apply(Toy(tied=True))


@pytest.mark.parametrize("make", [lora, dora])
def test_rank_that_matches_the_parameters_of_another_adapter(make, tmp_path):
    """No other rank comes nearer."""
    wanted = mtl_lora(r=4).apply(Toy())["trainable"]
    adapter, model = make(r=None, match_parameters=wanted), Toy()
    got = adapter.apply(model)["trainable"]
    counts = {r: make(r=r).apply(Toy())["trainable"] for r in range(1, 20)}
    assert got == counts[adapter.r] and abs(got - wanted) == min(abs(count - wanted) for count in counts.values())
    assert adapter.r > 4  # the fair twin of r = 4 has a higher rank
    adapter.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == adapter.r
    again, other = make(r=None, match_parameters=wanted), Toy()
    again.apply(other)
    again.load(other, tmp_path)


def test_matched_rank_of_the_paper_s_setting():
    """LLaMA2-7B, q k v o: MTL-LoRA's 16,845,824 parameters at r = 8 are LoRA's at r = 16."""
    assert matched_rank([(4096, 4096)] * 128, 16_845_824) == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"match_parameters": 500}, "adapter.r: 2 and adapter.match_parameters: 500; one of them decides"),
        ({"r": None}, "adapter.r: None and adapter.match_parameters: None; one of them decides"),
        ({"r": None, "match_parameters": 500, "rank_pattern": {"o_proj": 1}}, "adapter.rank_pattern: set, but"),
        ({"r": None, "match_parameters": 5}, "adapter.match_parameters: 5, but rank 1 has "),
    ],
)
def test_contradictions_about_the_rank(changes, words):
    with pytest.raises(UserError) as caught:
        lora(**changes).apply(Toy())
    assert str(caught.value).startswith(words)
