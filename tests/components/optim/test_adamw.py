"""adamw against torch.optim.AdamW over the same parameters."""

import copy
import warnings

import pytest
import torch
from torch import nn

from components.contracts import NamedParameter, UserError
from components.optim.adamw import adamw
from components.optim.groups import named_parameters
from tests.components.optim.helpers import ADAMW, TinyModel, train


@pytest.mark.parametrize("fused", [None, True, False])
def test_equals_torch(fused):
    """Same options, betas unlike torch's defaults: same weights; only a fused step against an unfused one may differ by rounding."""
    ours, theirs = TinyModel(), TinyModel()
    train(ours, adamw(named_parameters(ours), **{**ADAMW, "fused": fused}), 6)
    train(
        theirs,
        torch.optim.AdamW(theirs.parameters(), lr=ADAMW["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=fused is not False),
        6,
    )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_null_is_fused_wherever_torch_can():
    optimizer = adamw(named_parameters(TinyModel()), **ADAMW)
    assert isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
    with torch.device("meta"):
        nowhere = [NamedParameter("w", nn.Parameter(torch.empty(2)), "norm")]
    meta = adamw(nowhere, **ADAMW)
    assert not any(group["fused"] for group in meta.param_groups)
    with pytest.raises(UserError, match=r"^optimizer\.fused: true;"):
        adamw(nowhere, **{**ADAMW, "fused": True})


def test_no_decay_roles_do_not_decay():
    """With zero gradients the step is the decay alone: 1 - lr * weight_decay, or nothing."""
    model = TinyModel()
    before = copy.deepcopy(model.state_dict())
    optimizer = adamw(named_parameters(model), **{**ADAMW, "lr": 0.5, "no_decay_roles": ["norm", "ssm"]})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, role in model.roles().items():
        factor = 1.0 if role in ("norm", "ssm") else 1 - 0.5 * 0.1
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_continues_bitwise_from_a_checkpoint(tmp_path):
    model = TinyModel()
    first = adamw(named_parameters(model), **ADAMW)
    train(model, first, 3)
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "x.ckpt")
    train(model, first, 2, seed=1)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    again = TinyModel()
    again.load_state_dict(saved["model"])
    second = adamw(named_parameters(again), **ADAMW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(saved["optimizer"])
    train(again, second, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1.0}, "optimizer.lr: -1.0;"),
        ({"lr": float("nan")}, "optimizer.lr: nan;"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay: -0.1;"),
        ({"betas": [0.9, 1.0]}, "optimizer.betas: [0.9, 1.0];"),
        ({"betas": [0.9]}, "optimizer.betas: [0.9];"),
        ({"no_decay_roles": ["bias"]}, "optimizer.no_decay_roles: 'bias' is not a role"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError) as caught:
        adamw(named_parameters(TinyModel()), **{**ADAMW, **changes})
    assert str(caught.value).startswith(words)
