"""SOAP against a float64 oracle and another implementation, its invariances, and what happens at a refresh."""

import copy
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from components.contracts import NamedParameter, UserError
from components.optim import soap
from components.optim.groups import named_parameters
from components.optim.soap import Soap
from components.optim.soap_update import Side, State, refresh_bases, turn
from tests.components.optim.helpers import (
    SOAP,
    TinyModel,
    check_gradients_that_are_not_finite,
    common_mistakes,
    gradients,
    parameter,
    relative,
    train,
)

EXACT = {**SOAP, "weight_decay": 0.0}
SHAPES = [(24, 16), (16, 24), (12, 12)]


def run(grads: list[torch.Tensor], dtype=torch.float64, splits=(), **changes) -> tuple[list[torch.Tensor], list[dict]]:
    """What each step subtracts from the parameter, per unit of learning rate, in float64, and the state after it."""
    item = parameter(*grads[0].shape, dtype=dtype, splits=splits)
    optimizer, found, states = Soap([item], **{**EXACT, **changes}), [], []
    for grad in grads:
        item.parameter.data.zero_()
        item.parameter.grad = grad.to(dtype)
        optimizer.step()
        found.append(-item.parameter.detach().double() / EXACT["lr"])
        states.append({key: value.clone() for key, value in optimizer.state[item.parameter].items()})
    return found, states


def updates(grads: list[torch.Tensor], dtype=torch.float64, splits=(), **changes) -> list[torch.Tensor]:
    return run(grads, dtype, splits, **changes)[0]


def square(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(round(flat.numel() ** 0.5), -1)


def directions(grads: list[np.ndarray], bases: list[np.ndarray | None], frequency: int, initialise: bool, beta=0.95, eps=1e-8):
    """Algorithm 3 of arXiv 2409.11321 for one matrix, its momentum unrotated and projected in every step.

    bases: the first Q_L and Q_R, None for a side that is not rotated. They are given, since a gradient m x n says nothing about the order
    of the max(m, n) - min(m, n) vectors that it sends to 0.
    """
    sides = [None if q is None else (1 - beta) * gram for q, gram in zip(bases, (grads[0] @ grads[0].T, grads[0].T @ grads[0]))]
    left, right = (np.eye(k) if q is None else q for q, k in zip(bases, grads[0].shape))
    momentum, second, t, found = np.zeros_like(grads[0]), np.zeros_like(grads[0]), 0, []
    for i, g in enumerate(grads):
        if i == 0 and initialise:
            found.append(np.zeros_like(g))
            continue
        t += 1
        momentum = beta * momentum + (1 - beta) * g
        second = beta * second + (1 - beta) * (left.T @ g @ right) ** 2
        scale = np.sqrt(second / (1 - beta**t)) + eps
        if i == 0:  # the rounding noise beside the singular values
            scale = np.maximum(scale, 1e-4 * np.abs(left.T @ g @ right).max())
        found.append(left @ (left.T @ momentum @ right / (1 - beta**t) / scale) @ right.T)
        if i == 0:
            continue
        new = [left, right]
        for axis, gram in enumerate((g @ g.T, g.T @ g)):
            if sides[axis] is None:
                continue
            sides[axis] = beta * sides[axis] + (1 - beta) * gram
            if t % frequency == 0:
                old = new[axis]
                order = np.argsort(-np.diag(old.T @ sides[axis] @ old))
                second = np.take(second, order, axis=axis)
                new[axis] = np.linalg.qr(sides[axis] @ old[:, order])[0]
        left, right = new
    return found


@pytest.mark.parametrize("frequency", [10, 3])
@pytest.mark.parametrize("first_step", ["initialise", "update"])
@pytest.mark.parametrize("sides", ["both", "input"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_equals_the_paper_in_float64(m, n, sides, first_step, frequency):
    """12 steps: a refresh of 10 is seen once, one of 3 three times."""
    grads = gradients(m, n, 12)
    ours, states = run(grads, sides=sides, first_step=first_step, precondition_frequency=frequency)
    first = {key: square(states[0][key]) for key in ("left", "left_basis", "right", "right_basis") if key in states[0]}
    assert ("left" in first) == (sides == "both")
    for key in set(first) & {"left", "right"}:
        gram, basis = first[key], first[f"{key}_basis"]
        values = (basis.mT @ gram @ basis).diagonal()
        assert relative(basis @ values.diag() @ basis.mT, gram) < 1e-12
        assert relative(basis.mT @ basis, torch.eye(len(gram)).double()) < 1e-12
        assert (values.diff() < 1e-12 * values[0]).all()  # largest first
    bases = [first[key].numpy() if key in first else None for key in ("left_basis", "right_basis")]
    expected = directions([g.numpy() for g in grads], bases, frequency, first_step == "initialise")
    if first_step == "initialise":
        assert not ours.pop(0).any() and not expected.pop(0).any()
    for update, paper in zip(ours, expected, strict=True):
        assert relative(update, torch.from_numpy(paper)) < 1e-9


@pytest.mark.parametrize("sides", ["both", "input"])
def test_float32_follows_float64(sides):
    grads = gradients(16, 16, 12)
    for narrow, exact in list(zip(updates(grads, torch.float32, sides=sides), updates(grads, sides=sides), strict=True))[1:]:
        assert relative(narrow, exact) < 2e-3


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_equals_another_implementation(m, n):
    """pytorch-optimizer's SOAP over 25 steps. It decays after the step (so: no decay), adds eps before the bias correction (so: a small
    one; 1e-8 makes 1e-5 of difference in the first steps), and does its QR in float32: 1e-11 of difference before the first refresh, 8e-6
    after it, measured.
    """
    other_soap = pytest.importorskip("pytorch_optimizer").SOAP
    grads = gradients(m, n, 25)
    ours, states = run(grads, eps=1e-14)
    p = nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
    other = other_soap([p], lr=1.0, betas=(0.95, 0.95), eps=1e-14, weight_decay=0.0, precondition_frequency=10)
    for step, (grad, update) in enumerate(zip(grads, ours, strict=True)):
        p.data.zero_()
        p.grad = grad.clone()
        other.step()
        if step == 0:  # vectors that the first gradient sends to 0 are arbitrary, and signs are: start both with the same
            other.state[p]["Q"] = [square(states[0]["left_basis"]).clone(), square(states[0]["right_basis"]).clone()]
            assert not p.any() and not update.any()
        else:
            assert relative(update, -p.detach()) < (1e-9 if step <= 10 else 3e-5)


def test_a_side_beyond_the_limit_is_not_rotated_and_without_sides_it_is_adam():
    grads = gradients(24, 16, 6)
    _, states = run(grads, max_precond_dim=16)
    assert "left" not in states[-1] and states[-1]["right"].numel() == 16 * 16
    one_sided = updates(grads, sides="input")
    assert all(torch.equal(a, b) for a, b in zip(updates(grads, max_precond_dim=16), one_sided, strict=True))
    ours = updates(grads, max_precond_dim=15, first_step="update")
    p = nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    adam = torch.optim.AdamW([p], lr=1.0, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.0)
    for grad, update in zip(grads, ours, strict=True):
        p.data.zero_()
        p.grad = grad.clone()
        adam.step()
        assert relative(update, -p.detach()) < 1e-12


@pytest.mark.parametrize(("m", "n"), [(64, 64), (96, 64)])
def test_a_first_step_at_once_is_not_rounding_noise(m, n, monkeypatch):
    """In float32; see FIRST_FLOOR."""
    grad = gradients(m, n, 1)
    left, _, right = torch.linalg.svd(grad[0], full_matrices=False)
    assert relative(updates(grad, torch.float32, first_step="update")[0], left @ right) < 0.1
    monkeypatch.setattr(soap, "FIRST_FLOOR", 0.0)
    assert relative(updates(grad, torch.float32, first_step="update")[0], left @ right) > 1


def test_a_constant_gradient_gives_the_orthogonal_step_and_noise_that_of_adam():
    """Rotated, a constant gradient is the diagonal of its singular values, and Adam makes each of them 1: U V'."""
    grad = gradients(16, 16, 1)[0]
    left, _, right = torch.linalg.svd(grad)
    for update in updates([grad] * 5)[1:]:
        assert relative(update, left @ right) < 1e-5  # eps, over coordinates that are 0 up to rounding
    generator = torch.Generator().manual_seed(0)
    update = updates([torch.randn(24, 16, generator=generator, dtype=torch.float64) for _ in range(80)])[-1]
    assert update.square().mean().sqrt().item() == pytest.approx((0.05 / 1.95) ** 0.5, rel=0.25)  # sqrt((1 - beta) / (1 + beta))


def test_turning_a_side_turns_the_update():
    grads = gradients(16, 16, 13)
    turned = [torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(i), dtype=torch.float64))[0] for i in (1, 2)]
    plain, right = updates(grads)[-1], updates([g @ turned[1] for g in grads])[-1]
    assert relative(right, plain @ turned[1]) < 1e-8
    assert relative(updates([turned[0] @ g for g in grads])[-1], turned[0] @ plain) < 1e-8
    one_sided = updates(grads, sides="input")[-1]
    assert relative(updates([g @ turned[1] for g in grads], sides="input")[-1], one_sided @ turned[1]) < 1e-8
    assert relative(updates([turned[0] @ g for g in grads], sides="input")[-1], turned[0] @ one_sided) > 0.1


def test_a_refresh_sorts_the_vectors_and_what_is_known_along_them():
    """A basis of exact eigenvectors in the wrong order: the new one is the same in the right order, up to signs, and moments follow."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in (6, 4)]
    values = [torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 7.0]).double(), torch.tensor([2.0, 8.0, 1.0, 4.0]).double()]
    sides = [Side((q @ v.diag() @ q.mT)[None], q[None].clone()) for q, v in zip(vectors, values, strict=True)]
    momentum, second = torch.randn(1, 6, 4, generator=generator).double(), torch.rand(1, 6, 4, generator=generator).double()
    before = State(momentum, second, *sides)
    after = refresh_bases(before)
    orders = [v.argsort(descending=True) for v in values]
    for side, q, order in zip((after.left, after.right), vectors, orders, strict=True):
        assert (side.basis[0].mT @ q[:, order]).abs().sub(torch.eye(len(q))).abs().max() < 1e-12
    assert torch.equal(after.second[0], second[0][orders[0]][:, orders[1]])
    apart = [turn(s.momentum, s.left.basis.mT, s.right.basis.mT) for s in (before, after)]  # as the parameter sees it
    assert relative(apart[1], apart[0]) < 1e-12


@pytest.mark.parametrize(("first_step", "changed"), [("initialise", [5, 9]), ("update", [4, 8])])
def test_bases_change_at_the_refresh_only(first_step, changed):
    _, states = run(gradients(8, 8, 10), first_step=first_step, precondition_frequency=4)
    seen = [i + 2 for i, (a, b) in enumerate(pairwise(states)) if not torch.equal(a["right_basis"], b["right_basis"])]
    assert seen == changed
    assert all(not torch.equal(a["right"], b["right"]) for a, b in pairwise(states))  # L and R see every gradient


def test_the_first_step_leaves_matrices_in_place_undecayed():
    model = TinyModel()
    before = copy.deepcopy(model.state_dict())
    optimizer = Soap(named_parameters(model), **{**SOAP, "first_step": "initialise"})
    train(model, optimizer, 1)
    still = {name for name in before if torch.equal(before[name], model.state_dict()[name])}
    assert still == {"mixer.qkv_proj.weight", "mixer.o_proj.weight"}
    train(model, optimizer, 1, seed=1)
    assert not any(torch.equal(before[name], model.state_dict()[name]) for name in before)


def test_a_matrix_that_comes_in_later_starts_then():
    grads = gradients(8, 8, 6)
    items = [NamedParameter(f"w{i}", nn.Parameter(torch.zeros(8, 8, dtype=torch.float64)), "o") for i in range(2)]
    optimizer = Soap(items, **{**EXACT, "precondition_frequency": 4})
    for step, grad in enumerate(grads):
        items[0].parameter.grad, items[1].parameter.grad = grad.clone(), grad.clone() if step >= 2 else None
        optimizer.step()
        if step == 2:
            assert not items[1].parameter.any()
    assert items[1].parameter.abs().min() > 0
    late = updates(grads[2:5], precondition_frequency=100)[-1]  # before its refresh, which comes with the others'
    item = parameter(8, 8)
    alone = Soap([item, items[0]], **{**EXACT, "precondition_frequency": 100})
    for step, grad in enumerate(grads[:5]):
        item.parameter.data.zero_()
        item.parameter.grad = grad.clone() if step >= 2 else None
        alone.step()
    assert relative(-item.parameter.detach() / EXACT["lr"], late) < 1e-12


def test_fused_blocks_and_stacks_are_matrices_of_their_own():
    grads = gradients(32, 16, 13)
    fused = updates(grads, splits=(16, 8, 8))[-1]
    apart = torch.cat([updates([g.split([16, 8, 8])[i] for g in grads])[-1] for i in range(3)])
    assert relative(fused, apart) < 1e-8
    item = NamedParameter("experts", nn.Parameter(torch.zeros(4, 8, 16, dtype=torch.float64)), "down")
    optimizer = Soap([item], **{**EXACT, "matrix_roles": ["down"]})
    for grad in grads:
        item.parameter.data.zero_()
        item.parameter.grad = grad.view(4, 8, 16).clone()
        optimizer.step()
    alone = torch.stack([updates([g.view(4, 8, 16)[i] for g in grads])[-1] for i in range(4)])
    assert relative(-item.parameter.detach() / optimizer.param_groups[0]["lr"], alone) < 1e-8


def test_a_block_beyond_the_limit_among_others_within():
    grads = gradients(24, 8, 5)
    fused, states = run(grads, splits=(16, 8), max_precond_dim=8)
    apart = torch.cat([updates([g[:16] for g in grads], sides="input")[-1], updates([g[16:] for g in grads])[-1]])
    assert states[-1]["left"].numel() == 8 * 8 and relative(fused[-1], apart) < 1e-10


@pytest.mark.parametrize("elements", [1, 2 * 2 * 16 * 16])
def test_alone_equals_in_company_whatever_the_stack(elements, monkeypatch):
    monkeypatch.setattr(soap, "STACK_ELEMENTS", elements)
    items = [NamedParameter(f"w{i}", nn.Parameter(torch.zeros(16, 16)), "o") for i in range(3)]
    together = Soap(items, **EXACT)
    lone = parameter(16, 16, torch.float32)
    alone = Soap([lone], **EXACT)
    for step in range(12):
        for i, item in enumerate(items):
            item.parameter.grad = gradients(16, 16, 12, seed=i)[step].float()
        lone.parameter.grad = gradients(16, 16, 12, seed=1)[step].float()
        together.step()
        alone.step()
    assert relative(items[1].parameter.detach(), lone.parameter.detach()) < 1e-5


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("first_step", ["initialise", "update"])
def test_zero_gradients_move_nothing_and_spoil_nothing(first_step, eps):
    grads = gradients(24, 16, 6)
    zero = torch.zeros_like(grads[0])
    found, states = run([zero] * 5 + grads, first_step=first_step, eps=eps, precondition_frequency=2)
    assert not any(update.any() for update in found[:5]) and all(update.isfinite().all() for update in found)
    assert all(value.isfinite().all() for value in states[-1].values())
    assert found[-1].abs().max() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_touches_nothing(bad):
    check_gradients_that_are_not_finite(lambda pair, **changes: Soap(pair, **{**EXACT, **changes}), bad)


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_continues_bitwise_from_a_checkpoint_between_refreshes(steps):
    options = {**SOAP, "precondition_frequency": 3}
    stopped = TinyModel()
    first = Soap(named_parameters(stopped), **options)
    train(stopped, first, steps)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved, again = torch.load(file, weights_only=True), TinyModel()
    again.load_state_dict(saved["model"])
    second = Soap(named_parameters(again), **options)
    second.load_state_dict(saved["optimizer"])
    for model, optimizer in ((stopped, first), (again, second)):
        train(model, optimizer, 4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), again.parameters(), strict=True))
    assert all(
        torch.equal(value, second.state[q][key])
        for p, q in zip(stopped.parameters(), again.parameters(), strict=True)
        for key, value in first.state[p].items()
    )


@pytest.mark.parametrize(("key", "value"), [("sides", "input"), ("max_precond_dim", 8)])
def test_another_shape_of_state_is_refused_on_load(key, value):
    model = TinyModel()
    optimizer = Soap(named_parameters(model), **SOAP)
    train(model, optimizer, 1)
    other = Soap(named_parameters(model), **{**SOAP, key: value})
    with pytest.raises(UserError, match=rf"optimizer.{key}: {value}; the checkpoint's state was made with"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("masters", [False, True])
def test_narrow_parameters_keep_float32_state(masters):
    model = TinyModel().bfloat16()
    options = {**SOAP, "master_weights": masters}
    optimizer = Soap(named_parameters(model), **options)
    train(model, optimizer, 2)
    other = Soap(named_parameters(model), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in model.parameters():
        assert all(value.dtype == torch.float32 for value in other.state[p].values())
        assert not masters or torch.equal(other.state[p]["master"].bfloat16(), p)


@pytest.mark.parametrize("changes", [{}, {"sides": "input"}, {"max_precond_dim": 4}, {"master_weights": True}])
def test_memory_held_equals_the_formula(changes):
    model = TinyModel().bfloat16() if "master_weights" in changes else TinyModel()
    optimizer = Soap(named_parameters(model), **{**SOAP, **changes})
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        tensors = [value for p in group["params"] for value in optimizer.state[p].values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert len(storages) == len(tensors) and sum(storages.values()) == optimizer.state_bytes(group)
    if not changes:  # qkv of 8, 4 and 4 rows, and o of 8, on 8 columns
        moments, sides = 2 * (16 * 8 + 8 * 8), 2 * (8 * 8 + 2 * 4 * 4 + 8 * 8) + 2 * (3 + 1) * 8 * 8
        assert optimizer.state_bytes(optimizer.param_groups[0]) == 4 * (moments + sides) + 2 * 4


def test_one_schedule_scales_both_kinds_and_rates_may_be_tensors():
    same = []
    for lr in (3e-3, torch.tensor(3e-3)):
        model = TinyModel()
        optimizer = Soap(named_parameters(model), **{**SOAP, "lr": lr})
        train(model, optimizer, 3)
        same.append(model)
    for a, b in zip(*(m.parameters() for m in same), strict=True):
        assert relative(a.detach(), b.detach()) < 1e-6
    optimizer = Soap(named_parameters(TinyModel()), **SOAP)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25 * SOAP["lr"]] * 2


def test_learns():
    model = TinyModel()
    losses = train(model, Soap(named_parameters(model), **{**SOAP, "lr": 0.03}), 60)
    assert sum(losses[-5:]) / 5 < 0.5 * sum(losses[:5]) / 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *common_mistakes("soap"),
        ({"shampoo_beta": 1.0}, r"optimizer.shampoo_beta: 1.0; must be in \[0, 1\)"),
        ({"eps": float("nan")}, "optimizer.eps: nan"),
        ({"precondition_frequency": 0}, "optimizer.precondition_frequency: 0; must be a whole number >= 1"),
        ({"precondition_frequency": 2.5}, "optimizer.precondition_frequency: 2.5"),
        ({"max_precond_dim": -1}, "optimizer.max_precond_dim: -1"),
        ({"sides": "left"}, "optimizer.sides: left; allowed: both, input"),
        ({"first_step": "skip"}, "optimizer.first_step: skip; allowed: initialise, update"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        Soap([parameter(24, 16)], **{**SOAP, **changes})
