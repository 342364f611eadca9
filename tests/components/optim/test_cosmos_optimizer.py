"""COSMOS as an optimizer object: bad gradients, checkpoints, dtypes, schedules, compilation, mistakes."""

import copy
import io

import pytest
import torch
from torch import nn

from components.contracts import NamedParameter, UserError
from components.optim.cosmos import Cosmos
from components.optim.groups import named_parameters
from tests.components.optim.helpers import (
    COSMOS,
    EXACT,
    TinyModel,
    check_gradients_that_are_not_finite,
    common_mistakes,
    gradients,
    parameter,
    relative,
    train,
)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_touches_nothing(bad):
    check_gradients_that_are_not_finite(lambda pair, **changes: Cosmos(pair, **{**EXACT, "rank": 4, **changes}), bad)


def test_gradients_are_only_read_and_absent_ones_wait():
    model = TinyModel()
    optimizer = Cosmos(named_parameters(model), **{**COSMOS, "rank": 4})
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    model.mixer["o_proj"].weight.grad = None
    kept, weight = [None if p.grad is None else p.grad.clone() for p in model.parameters()], model.mixer["o_proj"].weight.detach().clone()
    optimizer.step()
    assert all(a is None or torch.equal(a, p.grad) for a, p in zip(kept, model.parameters(), strict=True))
    assert torch.equal(weight, model.mixer["o_proj"].weight) and model.mixer["o_proj"].weight not in optimizer.state


def test_continues_bitwise_from_a_checkpoint():
    straight, stopped = TinyModel(), TinyModel()
    options = {**COSMOS, "rank": 4}
    train(straight, Cosmos(named_parameters(straight), **options), 4)
    first = Cosmos(named_parameters(stopped), **options)
    train(stopped, first, 4)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved, again = torch.load(file, weights_only=True), TinyModel()
    again.load_state_dict(saved["model"])
    second = Cosmos(named_parameters(again), **options)
    second.load_state_dict(saved["optimizer"])
    train(stopped, first, 3, seed=1)
    train(again, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), again.parameters(), strict=True))
    assert not torch.equal(straight.embed.weight, again.embed.weight)


def test_another_rank_is_refused_on_load():
    model = TinyModel()
    optimizer = Cosmos(named_parameters(model), **{**COSMOS, "rank": 4})
    train(model, optimizer, 1)
    other = Cosmos(named_parameters(model), **{**COSMOS, "rank": 2})
    with pytest.raises(UserError, match=r"optimizer.rank: 2; the checkpoint's state was made with 4"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_a_finite_gradient_in_float16_is_stepped():
    """Its norm, 1e5, is above the largest float16."""
    item = NamedParameter("w", nn.Parameter(torch.ones(512, 512, dtype=torch.float16)), "o")
    optimizer = Cosmos([item], **{**COSMOS, "rank": 2, "lr": 0.5})
    item.parameter.grad = torch.full((512, 512), 200.0, dtype=torch.float16)
    optimizer.step()
    assert not torch.equal(item.parameter, torch.ones_like(item.parameter))


def test_other_blocks_are_refused_on_load():
    grads = gradients(16, 8, 1)[0]
    saved, other = (Cosmos([parameter(16, 8, splits=rows)], **{**EXACT, "rank": 2}) for rows in ([8, 8], [8, 4, 4]))
    saved.param_groups[0]["params"][0].grad = grads
    saved.step()
    with pytest.raises(UserError, match="other blocks"):
        other.load_state_dict(saved.state_dict())
    assert not other.state


@pytest.mark.parametrize("masters", [False, True])
def test_narrow_parameters_keep_float32_state(masters):
    model = TinyModel().bfloat16()
    options = {**COSMOS, "rank": 4, "master_weights": masters}
    optimizer = Cosmos(named_parameters(model), **options)
    train(model, optimizer, 2)
    other = Cosmos(named_parameters(model), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in model.parameters():
        assert all(value.dtype == torch.float32 for value in other.state[p].values())
        assert ("master" in other.state[p]) == masters
        assert not masters or torch.equal(other.state[p]["master"].bfloat16(), p)


def test_steps_below_a_parameters_resolution_add_up_with_master_weights():
    moved = []
    for masters in (False, True):
        item = NamedParameter("w", nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16)), "o")
        optimizer = Cosmos([item], **{**COSMOS, "lr": 1e-3, "rank": 2, "weight_decay": 0.0, "master_weights": masters})
        for _ in range(30):  # each of RMS 2e-4; the resolution of bfloat16 at 1 is 4e-3
            item.parameter.grad = torch.ones(8, 8, dtype=torch.bfloat16)
            optimizer.step()
        moved.append((1 - item.parameter.float()).abs().max().item())
    assert moved[0] == 0.0 and moved[1] == pytest.approx(30 * 2e-4, rel=0.4)


def test_memory_held_equals_the_formula():
    model = TinyModel()
    optimizer = Cosmos(named_parameters(model), **{**COSMOS, "rank": 4})
    train(model, optimizer, 2)
    for group in optimizer.param_groups:
        tensors = [value for p in group["params"] for value in optimizer.state[p].values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert len(storages) == len(tensors) and sum(storages.values()) == optimizer.state_bytes(group)
    matrices = optimizer.param_groups[0]
    m, n, r = 16, 8, 4  # qkv of three blocks, and o
    assert optimizer.state_bytes(matrices) == 4 * (m * n + 3 * n * r + 3 * r * r + m * r) + 4 * (8 * n + n * r + r * r + 8 * r) + 2 * 4


def test_one_schedule_keeps_the_ratio_and_rates_may_be_tensors():
    model = TinyModel()
    optimizer = Cosmos(named_parameters(model), **{**COSMOS, "rank": 4})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.25)
    train(model, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25 * 0.2 * COSMOS["lr"], 0.25 * COSMOS["lr"]])
    same = []
    for lr in (3e-3, torch.tensor(3e-3)):
        model = TinyModel()
        train(model, Cosmos(named_parameters(model), **{**COSMOS, "rank": 4, "lr": lr}), 3)
        same.append(model)
    for a, b in zip(*(m.parameters() for m in same), strict=True):
        assert relative(a.detach(), b.detach()) < 1e-6


def test_decay_by_eta_or_by_lr():
    for mode, factor in (("eta", 0.2), ("lr", 1.0)):
        item = NamedParameter("w", nn.Parameter(torch.ones(8, 8, dtype=torch.float64)), "o")
        optimizer = Cosmos([item], **{**EXACT, "rank": 2, "weight_decay": 0.1, "wd_mode": mode})
        item.parameter.grad = torch.zeros(8, 8, dtype=torch.float64)
        optimizer.step()
        assert item.parameter.detach().mean().item() == pytest.approx(1 - factor * COSMOS["lr"] * 0.1, rel=1e-12)


def test_a_share_of_the_columns_as_rank():
    items = [NamedParameter(f"w{n}", nn.Parameter(torch.zeros(8, n)), "o") for n in (10, 30)]
    optimizer = Cosmos(items, **{**COSMOS, "rank": 0.25})
    for item in items:
        item.parameter.grad = torch.randn(item.parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert [optimizer.state[item.parameter]["basis"].shape[-1] for item in items] == [3, 8]


def test_learns():
    model = TinyModel()
    losses = train(model, Cosmos(named_parameters(model), **{**COSMOS, "rank": 4, "lr": 0.03}), 60)
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:5]) / 5


@pytest.mark.slow
def test_no_shape_compiles_the_update_anew(monkeypatch):
    """Tall, wide, square and long matrices, alone and in stacks; then others of new sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_as_it_is = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_as_it_is(function, backend=counter, **options))
    torch._dynamo.reset()

    def run(shapes, **options):
        items = [NamedParameter(f"w{i}", nn.Parameter(torch.zeros(m, n)), "o") for i, (m, n) in enumerate(shapes)]
        optimizer = Cosmos(items, **{**EXACT, "rank": 4, "ns_dtype": "float32", **options})
        for step in range(3):
            for i, item in enumerate(items):
                item.parameter.grad = gradients(*item.parameter.shape, 3, seed=i)[step].float()
            optimizer.step()
        return [item.parameter.detach() for item in items]

    known, new = [(24, 24), (24, 24), (48, 24), (20, 30), (20, 30)], [(36, 36), (30, 70), (30, 70), (40, 26)]
    for mine, plain in zip(run(known, compile=True), run(known), strict=True):
        assert relative(mine, plain) < 1e-5
    frames = counter.frame_count
    # One function compiled for all: `torch.compile` finds what it has by the function's code, also for another optimizer.
    assert frames > 0
    run(new, compile=True)
    assert counter.frame_count == frames


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *common_mistakes("cosmos"),
        ({"rank": 0}, "optimizer.rank: 0; must be a whole number >= 1"),
        ({"rank": -3}, "optimizer.rank: -3"),
        ({"rank": 2.5}, "optimizer.rank: 2.5"),
        ({"rank": float("inf")}, "optimizer.rank: inf"),
        ({"rank": float("nan")}, "optimizer.rank: nan"),
        ({"ns_steps": 5.5}, "optimizer.ns_steps: 5.5; must be a whole number"),
        ({"wd_mode": "lr", "lr_ratio": 0.0}, "optimizer.wd_mode: lr; with optimizer.lr_ratio=0"),
        ({"rank": 17}, "optimizer.rank: 17; the matrices have at most 16 columns"),
        ({"betas": [0.9]}, "optimizer.betas"),
        ({"gamma": float("nan")}, "optimizer.gamma: nan"),
        ({"qr": "svd"}, "optimizer.qr: svd; allowed: auto, qr, cholesky"),
        ({"ns_dtype": "float16"}, "optimizer.ns_dtype: float16"),
        ({"ns_steps": 0}, "optimizer.ns_steps: 0"),
        ({"wd_mode": "both"}, "optimizer.wd_mode: both; allowed: eta, lr"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        Cosmos([parameter(24, 16)], **{**COSMOS, "rank": 4, **changes})


def test_groups_and_gradients_that_do_not_fit():
    optimizer = Cosmos([parameter(24, 16)], **{**COSMOS, "rank": 4})
    with pytest.raises(UserError, match="kind None; it needs kind: cosmos or adamw"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    bare = {"params": [nn.Parameter(torch.zeros(2, 2))], "kind": "cosmos"}
    with pytest.raises(UserError, match=r"kind cosmos without .*parameter_names.*betas"):
        optimizer.add_param_group(bare)
    assert len(optimizer.param_groups) == 1
    conv = NamedParameter("conv", nn.Parameter(torch.zeros(8, 1, 4)), "conv")
    with pytest.raises(UserError, match="kind cosmos for conv, a convolution"):
        Cosmos([conv], **{**COSMOS, "rank": 1, "overrides": {"conv": {"kind": "cosmos"}}})
    with pytest.raises(UserError, match=r"w is torch.complex64; it must be real"):
        Cosmos([parameter(24, 16, torch.complex64)], **{**COSMOS, "rank": 4})
    embedding = nn.Embedding(10, 4, sparse=True)
    sparse = Cosmos([NamedParameter("embed", embedding.weight, "embedding")], **COSMOS)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="gradient of embed is sparse"):
        sparse.step()
    assert not sparse.state
