"""Which modules get an adapter, and what a user hears when none or the wrong ones would."""

import pytest
import torch
from torch import nn

from components.adapters.base import breakdown, parameter_roles
from components.adapters.none import NoAdapter
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, lora

PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("role:qkv,o", None, [f"blocks.{i}.{p}" for i in (0, 1) for p in ("qkv_proj", "o_proj")]),
        ("role:qkv, in_proj", None, ["blocks.0.qkv_proj", "blocks.1.qkv_proj"]),  # a role that this model lacks is skipped
        ("all-linear", None, [f"blocks.{i}.{p}" for i in (0, 1) for p in PROJECTIONS]),
        ("all-linear", r"blocks\.0\..*", [f"blocks.1.{p}" for p in PROJECTIONS]),
        (r".*\.o_proj", None, ["blocks.0.o_proj", "blocks.1.o_proj"]),
        (["o_proj", "0.down_proj"], None, ["blocks.0.o_proj", "blocks.0.down_proj", "blocks.1.o_proj"]),
    ],
)
def test_selection(targets, exclude, expected):
    assert list(lora(targets=targets, exclude=exclude).apply(Toy())["modules"]) == expected


@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        (".*q_proj", r".*\.qkv_proj|.*", ["adapter.targets: '.*q_proj' matches no module outside adapter.exclude"]),
        (".*query", None, ["'.*query' matches no module; nearest linear modules: ", "blocks.0.qkv_proj"]),
        (["proj"], None, ["no module's name ends in 'proj'", "blocks.1.o_proj"]),  # endings are bounded by dots
        (["o_proj", "key"], None, ["no module's name ends in 'key'"]),
        ("role:router", None, ["'role:router' matches no module"]),
        ("role:quv", None, ["'quv' is not a role", "did you mean qkv?"]),
        (r"blocks\.0\..*", None, ["matches blocks.0.norm, a LayerNorm; only nn.Linear, Conv1D and nn.Embedding can be wrapped"]),
        ("head", None, ["matches the head head"]),
        ("(", None, ["adapter.targets: '(' is not a regular expression"]),
        ("all-linear", "(", ["adapter.exclude: '(' is not a regular expression"]),
    ],
)
def test_mistakes_are_named_and_change_nothing(targets, exclude, words):
    model = Toy()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UserError) as caught:
        lora(targets=targets, exclude=exclude).apply(model)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value) and "lora_" not in str(caught.value)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_a_head_that_is_tied_has_no_module():
    model = Toy()
    own = {name: role for name, role in model.roles().items() if role != "head"}
    model.roles = lambda: own
    with pytest.raises(UserError, match="matches no module; the head is tied to the embedding and no module of its own; nearest linear"):
        lora(targets="role:head").apply(model)


def test_twenty_nearest_names_at_most():
    model = nn.ModuleDict({f"layer_{i}": nn.Linear(2, 2) for i in range(30)})
    with pytest.raises(UserError) as caught:
        lora(targets="layers").apply(model)
    assert str(caught.value).count("layer_") == 20


def test_double_injection_is_refused():
    model = Toy()
    lora(targets=["o_proj"]).apply(model)
    with pytest.raises(UserError, match=r"blocks\.0\.o_proj has an adapter already"):
        lora(targets="all-linear").apply(model)


def test_tied_modules_are_refused():
    model = Toy()
    model.blocks[1].o_proj.weight = model.blocks[0].o_proj.weight
    with pytest.raises(UserError, match=r"o_proj shares its weight with blocks\.\d\.o_proj; leave it out by adapter\.exclude"):
        lora(targets=r"blocks\.0\.o_proj").apply(model)
    twice = Toy()
    twice.again = twice.blocks[0].o_proj
    with pytest.raises(UserError, match="shares its weight with"):
        lora(targets=["o_proj"]).apply(twice)


def test_roles_stay_and_adapters_are_adapters():
    model = Toy(tied=True)
    plain = dict(model.roles())
    lora().apply(model)
    roles = parameter_roles(model)
    assert set(roles) == {name for name, _ in model.named_parameters()}
    assert {name.replace(".base_layer", ""): role for name, role in roles.items() if role != "adapter"} == plain
    assert {name for name, role in roles.items() if role == "adapter"} == {name for name in roles if "lora_" in name}
    assert parameter_roles(Toy(tied=True)) == plain


def test_report_equals_the_formula():
    """r (in + out) a module; everything else is frozen, tied weights count once."""
    model = Toy(tied=True)
    base = sum(p.numel() for p in model.parameters())
    report = lora(r=3).apply(model)
    sizes = {"qkv_proj": (8, 24), "o_proj": (8, 8), "gate_up_proj": (8, 32), "down_proj": (16, 8)}
    expected = {f"blocks.{i}.{name}": 3 * (a + b) for i in (0, 1) for name, (a, b) in sizes.items()}
    trainable = sum(expected.values())
    assert report == {
        "trainable": trainable,
        "total": base + trainable,
        "percent": pytest.approx(100 * trainable / (base + trainable)),
        "modules": expected,
        "types": {"lora_A": 3 * 2 * (8 + 8 + 8 + 16), "lora_B": 3 * 2 * (24 + 8 + 32 + 8)},
        "roles": {"qkv": 2 * 3 * 32, "o": 2 * 3 * 16, "gate_up": 2 * 3 * 40, "down": 2 * 3 * 24},
        "in_full": 0,
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_none_trains_everything():
    model = Toy()
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = NoAdapter().apply(model)
    total = sum(p.numel() for p in model.parameters())
    nothing: dict[str, int] = {}
    whole = {"trainable": total, "total": total, "percent": 100.0}
    assert report == {**whole, "modules": nothing, "types": nothing, "roles": nothing, "in_full": 0}
    assert breakdown(model) == ""
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
