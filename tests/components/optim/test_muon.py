"""Muon against torch.optim.Muon, a float64 step by hand, and torch.optim.AdamW for the part that is not Muon."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from components.contracts import NamedParameter, UserError
from components.optim.groups import named_parameters
from components.optim.muon import Muon
from kernels.newton_schulz.reference import newton_schulz as reference
from tests.components.optim.helpers import MUON, TinyModel, train

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (5, 11), (1, 6)]


def matrices(dtype=torch.float32, shapes=SHAPES) -> list[NamedParameter]:
    generator = torch.Generator().manual_seed(3)
    return [NamedParameter(f"w{i}", nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)), "o") for i, s in enumerate(shapes)]


def set_grads(parameters, seed: int, dtype=None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype or p.dtype).to(p.dtype)


def relative(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_over_several_steps(scale, nesterov, monkeypatch):
    """torch iterates in bfloat16 only; with that cast made a copy, its own code runs in float32 and only rounding differs."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, **{**MUON, "scale": scale, "nesterov": nesterov, "ns_dtype": "float32", "lr": 0.02})
    other = torch.optim.Muon([p.parameter for p in theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=scale)
    for step in range(5):
        set_grads([p.parameter for p in ours], step)
        set_grads([p.parameter for p in theirs], step)
        mine.step()
        other.step()
    start = matrices()
    for a, b, zero in zip(ours, theirs, start, strict=True):
        assert relative(a.parameter, b.parameter) < 1e-5
        assert relative(a.parameter - zero.parameter, b.parameter - zero.parameter) < 1e-5


def test_equals_torch_muon_in_bfloat16():
    """Both in bfloat16: torch divides by a norm rounded to 8 bits, we do not, so updates agree to a few parts in a hundred."""
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, **{**MUON, "ns_dtype": "bfloat16", "weight_decay": 0.0})
    other = torch.optim.Muon([p.parameter for p in theirs], lr=MUON["lr"], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    set_grads([p.parameter for p in ours], 0)
    set_grads([p.parameter for p in theirs], 0)
    mine.step()
    other.step()
    for a, b, zero in zip(ours, theirs, matrices(), strict=True):
        assert relative(a.parameter - zero.parameter, b.parameter - zero.parameter) < 6e-2


def test_two_steps_by_hand_in_float64():
    rows = [4, 2, 2]
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    item = NamedParameter("qkv", nn.Parameter(weight.clone()), "qkv", tuple(rows))
    optimizer = Muon([item], **{**MUON, "ns_dtype": "float64", "lr": 0.1, "momentum": 0.9})
    momentum = torch.zeros_like(weight)
    for step in range(2):
        set_grads([item.parameter], step)
        gradient = item.parameter.grad.clone()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = 0.1 * gradient + 0.9 * momentum
        parts = [0.2 * math.sqrt(max(block.shape)) * reference(block, 5, (3.4445, -4.7750, 2.0315), 1e-7) for block in update.split(rows)]
        weight = weight * (1 - 0.1 * 0.1) - 0.1 * torch.cat(parts)
        optimizer.step()
        assert relative(item.parameter, weight) < 1e-13
        assert torch.equal(item.parameter.grad, gradient)


def test_update_has_the_rms_of_adamw():
    """match_rms_adamw: RMS 0.2 * lr times that of the singular values, which lie in [0.68, 1.14], whatever the shape."""
    for shape in [(64, 64), (96, 32), (32, 96)]:
        (item,) = matrices(shapes=[shape])
        before = item.parameter.detach().clone()
        optimizer = Muon([item], **{**MUON, "lr": 1.0, "weight_decay": 0.0})
        set_grads([item.parameter], 0)
        optimizer.step()
        assert 0.2 * 0.68 < (item.parameter - before).pow(2).mean().sqrt().item() < 0.2 * 1.14


def test_fused_blocks_equal_separate_matrices():
    whole, parts = TinyModel(), matrices(shapes=[(8, 8), (4, 8), (4, 8)])
    qkv = whole.mixer["qkv_proj"].weight
    for item, block in zip(parts, qkv.detach().split([8, 4, 4]), strict=True):
        item.parameter.data.copy_(block)
    fused = Muon([NamedParameter("qkv", qkv, "qkv", (8, 4, 4))], **{**MUON, "ns_dtype": "float32"})
    apart = Muon(parts, **{**MUON, "ns_dtype": "float32"})
    for step in range(3):
        set_grads([qkv], step)
        for item, block in zip(parts, qkv.grad.split([8, 4, 4]), strict=True):
            item.parameter.grad = block.clone()
        fused.step()
        apart.step()
    assert relative(qkv, torch.cat([p.parameter for p in parts])) < 1e-6


def test_alone_equals_in_company_and_stacks_are_matrices():
    crowd, lonely = matrices(), matrices()
    stacked = NamedParameter("experts", nn.Parameter(torch.stack([p.parameter.detach() for p in matrices()[:2]])), "o")
    together = Muon(crowd, **{**MUON, "ns_dtype": "float32"})
    set_grads([p.parameter for p in crowd], 0)
    stacked.parameter.grad = torch.stack([p.parameter.grad for p in crowd[:2]])
    together.step()
    Muon([stacked], **{**MUON, "ns_dtype": "float32"}).step()
    assert relative(stacked.parameter, torch.stack([p.parameter for p in crowd[:2]])) < 1e-6
    for item, other in zip(lonely, crowd, strict=True):
        item.parameter.grad = other.parameter.grad
        Muon([item], **{**MUON, "ns_dtype": "float32"}).step()
        assert relative(item.parameter, other.parameter) < 1e-6


def test_adamw_part_equals_torch_adamw():
    """Everything that is no hidden matrix, with betas unlike any hard-coded default."""
    ours, theirs = TinyModel(), TinyModel()
    mine = Muon(named_parameters(ours), **{**MUON, "adamw_betas": [0.8, 0.97], "adamw_lr": 2e-3})
    rest = [name for name, role in theirs.roles().items() if role not in ("qkv", "o")]
    other = torch.optim.AdamW([theirs.get_parameter(n) for n in rest], lr=2e-3, betas=(0.8, 0.97), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(5):
        set_grads(ours.parameters(), step)
        set_grads(theirs.parameters(), step)
        mine.step()
        other.step()
    for name in rest:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name


def test_continues_bitwise_from_a_checkpoint():
    model = TinyModel()
    first = Muon(named_parameters(model), **MUON)
    train(model, first, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = TinyModel()
    again.load_state_dict(saved["model"])
    second = Muon(named_parameters(again), **MUON)
    second.load_state_dict(saved["optimizer"])
    assert train(model, first, 3, seed=1) == train(again, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_narrow_parameters_keep_float32_state_over_a_checkpoint():
    parameters = [
        *matrices(torch.bfloat16, [(8, 8), (4, 8)]),
        NamedParameter("norm", nn.Parameter(torch.ones(8, dtype=torch.bfloat16)), "norm"),
    ]
    first = Muon(parameters, **MUON)
    set_grads([p.parameter for p in parameters], 0)
    first.step()
    twin = copy.deepcopy(parameters)
    second = Muon(twin, **MUON)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, items in ((first, parameters), (second, twin)):
        set_grads([p.parameter for p in items], 1)
        optimizer.step()
        assert all(v.dtype == torch.float32 for p in items for v in optimizer.state[p.parameter].values())
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(parameters, twin, strict=True))
    assert all(p.parameter.dtype == torch.bfloat16 for p in parameters)


def test_another_grouping_is_refused_on_load():
    state = Muon(named_parameters(TinyModel()), **MUON).state_dict()
    with pytest.raises(UserError, match="hold other parameters"):
        Muon(named_parameters(TinyModel()), **{**MUON, "matrix_roles": ["qkv"]}).load_state_dict(state)


def test_without_gradient_nothing_moves():
    model = TinyModel()
    before = copy.deepcopy(model.state_dict())
    optimizer = Muon(named_parameters(model), **MUON)
    model.norm.weight.grad = torch.ones(8)
    optimizer.step()
    changed = [name for name in before if not torch.equal(before[name], model.state_dict()[name])]
    assert changed == ["norm.weight"] and len(optimizer.state) == 1


def test_one_schedule_scales_both_kinds_and_closure_runs_once():
    model = TinyModel()
    optimizer = Muon(named_parameters(model), **MUON)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 7.0

    assert optimizer.step(closure) == 7.0 and calls == [True]
    schedule.step()
    assert {group["kind"]: group["lr"] for group in optimizer.param_groups} == {"muon": MUON["lr"] / 2, "adamw": MUON["adamw_lr"] / 2}


def test_learns():
    model = TinyModel()
    losses = train(model, Muon(named_parameters(model), **{**MUON, "lr": 0.05}), 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1.0}, "optimizer.lr: -1.0;"),
        ({"adamw_lr": -1.0}, "optimizer.adamw_lr: -1.0;"),
        ({"momentum": 1.0}, "optimizer.momentum: 1.0;"),
        ({"ns_steps": 0}, "optimizer.ns_steps: 0;"),
        ({"ns_coefficients": [1.0, 2.0]}, "optimizer.ns_coefficients: [1.0, 2.0];"),
        ({"ns_dtype": "fp8"}, "optimizer.ns_dtype: fp8; allowed: auto, bfloat16, float32, float64"),
        ({"scale": "rms"}, "optimizer.scale: rms; allowed: match_rms_adamw, original"),
        ({"matrix_roles": ["mlp"]}, "optimizer.matrix_roles: 'mlp' is not a role"),
        ({"adamw_betas": [0.9, 2.0]}, "optimizer.adamw_betas: [0.9, 2.0];"),
        ({"overrides": {"norm.*": {"kind": "muon"}}}, "optimizer.overrides: kind muon for norm.weight of shape (8,);"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError) as caught:
        Muon(named_parameters(TinyModel()), **{**MUON, **changes})
    assert str(caught.value).startswith(words), str(caught.value)


def test_overrides_move_a_matrix_to_adamw():
    optimizer = Muon(named_parameters(TinyModel()), **{**MUON, "overrides": {".*o_proj.*": {"kind": "adamw"}}})
    kinds = {name: group["kind"] for group in optimizer.param_groups for name in group["parameter_names"]}
    assert kinds["mixer.o_proj.weight"] == "adamw" and kinds["mixer.qkv_proj.weight"] == "muon"


def test_wrong_splits_are_a_fault_of_the_model():
    with pytest.raises(ValueError, match="do not add up"):
        Muon([NamedParameter("w", nn.Parameter(torch.zeros(4, 2)), "qkv", (3, 2))], **MUON)
