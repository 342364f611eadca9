"""Groups by role, the user's overrides, and the printed table."""

import io

import pytest
import torch
from torch import nn

from components.contracts import NamedParameter, UserError
from components.optim.adamw import adamw
from components.optim.cosmos import Cosmos
from components.optim.groups import check_roles, describe, named_parameters
from components.optim.muon import Muon
from tests.components.adapters.helpers import lora
from tests.components.optim.helpers import ADAMW, COSMOS, MUON, TinyModel

FACTORIES = {
    "adamw": lambda p: adamw(p, **ADAMW),
    "muon": lambda p: Muon(p, **MUON),
    "cosmos": lambda p: Cosmos(p, **{**COSMOS, "rank": 4}),
}


def by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {group["name"]: group for group in optimizer.param_groups}


def test_every_trainable_parameter_is_listed_once_with_role_and_splits():
    model = TinyModel()
    listed = {p.name: p for p in named_parameters(model)}
    assert {name: p.role for name, p in listed.items()} == model.roles()
    assert "head.weight" not in listed  # tied to the embedding
    assert listed["mixer.qkv_proj.weight"] == NamedParameter("mixer.qkv_proj.weight", model.mixer["qkv_proj"].weight, "qkv", (8, 4, 4))
    assert type(listed["norm.weight"]) is NamedParameter


def test_one_group_a_treatment():
    groups = by_name(adamw(named_parameters(TinyModel()), **{**ADAMW, "no_decay_roles": ["norm", "ssm"]}))
    assert list(groups) == ["adamw", "adamw/no_decay"]
    assert groups["adamw"]["weight_decay"] == 0.1 and groups["adamw/no_decay"]["weight_decay"] == 0.0
    assert groups["adamw/no_decay"]["parameter_names"] == ["A_log", "norm.weight"]
    assert groups["adamw/no_decay"]["roles"] == ["ssm", "norm"]


def test_overrides_by_pattern_later_wins():
    overrides = {".*proj.*": {"lr": 0.5}, r".*\.o_proj\.weight": {"lr": 0.25, "weight_decay": 0.0}}
    groups = by_name(adamw(named_parameters(TinyModel()), **{**ADAMW, "overrides": overrides}))
    assert groups["adamw/.*proj.*"]["parameter_names"] == ["mixer.qkv_proj.weight"]
    both = groups[r"adamw/.*proj.* & .*\.o_proj\.weight"]
    assert (both["lr"], both["weight_decay"], both["parameter_names"]) == (0.25, 0.0, ["mixer.o_proj.weight"])


def test_override_of_decay_wins_over_its_role():
    options = {**ADAMW, "no_decay_roles": ["norm"], "overrides": {"norm.*": {"weight_decay": 0.3}}}
    assert by_name(adamw(named_parameters(TinyModel()), **options))["adamw/norm.*"]["weight_decay"] == 0.3


def test_adapter_parameters_go_to_adamw():
    model = TinyModel()
    lora(r=2, alpha=4, targets="role:qkv,o").apply(model)
    listed = named_parameters(model)
    assert {p.role for p in listed} == {"adapter"} and len(listed) == 4
    (group,) = Muon(listed, **MUON).param_groups
    assert group["kind"] == "adamw" and group["weight_decay"] == 0.0


def test_table_adds_up():
    model = TinyModel()
    rows = describe(Muon(named_parameters(model), **MUON))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert rows[0] == {
        "name": "muon",
        "kind": "muon",
        "roles": "qkv,o",
        "tensors": 2,
        "parameters": 16 * 8 + 8 * 8,
        "lr": MUON["lr"],
        "weight_decay": 0.1,
        "state_bytes": 4 * (16 * 8 + 8 * 8) + 2 * 4,
    }


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_table_is_honest_about_state_and_schedule(factory):
    model = TinyModel()
    optimizer = factory(named_parameters(model))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert all(row["lr"] == group["initial_lr"] for row, group in zip(describe(optimizer), optimizer.param_groups, strict=True))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for row, group in zip(describe(optimizer), optimizer.param_groups, strict=True):
        held = [value.untyped_storage().nbytes() for p in group["params"] for value in optimizer.state[p].values()]
        assert sum(held) == row["state_bytes"]


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_checkpoint_loads_with_weights_only(factory):
    file = io.BytesIO()
    torch.save(factory(named_parameters(TinyModel())).state_dict(), file)
    file.seek(0)
    groups = torch.load(file, weights_only=True)["param_groups"]
    assert all(set(group) >= {"name", "kind", "parameter_names", "roles"} for group in groups)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({".*q_prj.*": {"lr": 1.0}}, ["'.*q_prj.*' matches no trainable parameter", "mixer.qkv_proj.weight"]),
        ({"*": {"lr": 1.0}}, ["not a regular expression"]),
        ({"norm.*": {"learning_rate": 1.0}}, ["unknown key 'learning_rate'", "allowed: lr, weight_decay, kind"]),
        ({"norm.*": {"wieght_decay": 1.0}}, ["did you mean weight_decay?"]),
        ({"norm.*": {"lr": -1.0}}, ["optimizer.overrides.norm.*.lr: -1.0"]),
        ({"norm.*": {"lr": "fast"}}, ["'fast'; must be a finite number"]),
        ({"norm.*": {"kind": "sgd"}}, ["'sgd'; this optimizer has adamw"]),
        ({"norm.*": {}}, ["must be a mapping"]),
    ],
)
def test_mistaken_overrides_are_named(overrides, words):
    with pytest.raises(UserError) as caught:
        adamw(named_parameters(TinyModel()), **{**ADAMW, "overrides": overrides})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(caught.value).startswith("optimizer.overrides") and "\n" not in str(caught.value)


def test_unknown_role_and_nothing_trainable():
    with pytest.raises(UserError, match=r"'norms' is not a role.*did you mean norm"):
        check_roles("no_decay_roles", ["norms"])
    model = TinyModel().requires_grad_(False)
    with pytest.raises(UserError, match="nothing is trainable"):
        named_parameters(model)


def test_a_parameter_without_a_role_is_a_fault_of_the_model():
    model = TinyModel()
    model.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"roles\(\) does not name the trainable parameter 'extra'"):
        named_parameters(model)


def test_tied_twice_is_refused():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="listed twice"):
        adamw([NamedParameter("a", p, "norm"), NamedParameter("b", p, "norm")], **ADAMW)
