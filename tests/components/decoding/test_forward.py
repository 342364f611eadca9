"""A model called for decoding: packed weights give its own numbers, and nothing of it is left between steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from components.blocks import Context
from components.contracts import Batch
from components.decoding.forward import Forward
from components.models import samba
from components.models.samba import MambaBlock, MambaMixer
from framework.build import build, build_model, compose
from kernels.packed import mamba as packed_mamba
from kernels.packed import pack

IDS = torch.randint(256, (5, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["phi4mini", "samba"])
def model(request):
    torch.manual_seed(0)
    return build_model(compose("train", [f"model={request.param}", "model/size=test", "data.seq_len=64"]), 320).eval()


def untouched(model):
    return not any({"forward", "feed", "branch"} & set(part.__dict__) for part in model.modules())


def logits(called, ids=IDS):
    with called.quiet():
        return called.logits(called.model(Batch(ids)).hidden)


def test_packed_weights_give_the_same_numbers_and_leave_nothing(model):
    plain, packed = logits(Forward(model)), Forward(model, packed=True)
    linears = [part for part in model.modules() if type(part) is nn.Linear]
    assert sum(type(part) is nn.Linear for part, *_ in packed._packed) == len(linears) and packed._head is not model.logits
    fused = [method for _, method, _ in packed._packed if method != "forward"]
    assert fused.count("feed") == fused.count("branch") == len(model.blocks)
    for _ in range(2):
        torch.testing.assert_close(logits(packed), plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    assert untouched(model)
    before = logits(packed)
    with torch.no_grad():  # the packed weights are copies: the model's own may change, a new object sees it
        linears[0].weight.mul_(2)
    assert torch.equal(logits(packed), before) and not torch.allclose(logits(Forward(model, packed=True)), plain)


def test_rows_of_packed_products_are_the_same_to_the_last_bit_in_any_number(model):
    packed = Forward(model, packed=True)
    hidden = torch.randn(64, model.embed_tokens.weight.shape[1])
    with packed.quiet():
        whole = packed.logits(hidden)
        for rows in (1, 2, 3, 4, 7, 16, 33):
            assert torch.equal(packed.logits(hidden[:rows]), whole[:rows]) and torch.equal(packed.logits(hidden[-rows:]), whole[-rows:])


@pytest.mark.parametrize("reason", ["autocast", "not asked"])
def test_where_nothing_is_packed(model, reason):
    called = Forward(model, torch.bfloat16 if reason == "autocast" else torch.float32, packed=reason != "not asked")
    assert called._packed == [] and logits(called).dtype == torch.float32


@torch.no_grad()
def test_prompts_in_pieces_and_steps_through_packed_layers_equal_the_plain_ones(model):
    """Longer than the window of 16, so that a piece that reads on in a window is met as well."""
    states = [model.new_state(3, 64) for _ in range(2)]
    plain, packed = Forward(model), Forward(model, packed=True)
    for begin, end in ((0, 20), (20, 33), (33, 34), (34, 35)):
        ids = torch.randint(256, (3, end - begin))
        found = []
        for called, state in zip((plain, packed), states, strict=True):
            with called.quiet():
                found.append(called.logits(called.model(Batch(ids), state).hidden))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5 * float(found[0].abs().max()))


def test_who_is_listened_to_is_called(model):
    """A hook on a layer inside a part that could be one call."""
    heard = []
    for block in model.blocks:
        block.mlp.down_proj.register_forward_hook(lambda *_: heard.append("down"))
        block.mixer_norm.register_forward_pre_hook(lambda *_: heard.append("norm"))
    logits(Forward(model, packed=True))
    assert heard.count("down") == heard.count("norm") == len(model.blocks)


@torch.no_grad()
def test_a_mixer_with_a_state_is_one_call(monkeypatch):
    """And without one it is not, since there is nothing to go on from."""
    calls = []
    monkeypatch.setattr(samba, "mamba", lambda *given: calls.append(1) or packed_mamba(*given))
    model = build_model(compose("train", ["model=samba", "model/size=test", "model.num_layers=4", "data.seq_len=64"]), 320).eval()
    called, state = Forward(model, packed=True), model.new_state(5, 64)
    logits(called)
    assert not calls
    for ids in (IDS, IDS[:, :1]):  # a prompt and a step
        with called.quiet():
            model(Batch(ids), state)
    assert len(calls) == 2 * sum(isinstance(block, MambaBlock) for block in model.blocks) == 4


def test_a_mixer_of_another_kind_or_that_is_listened_to_is_called():
    class Silent(MambaMixer):
        def forward(self, x, document_start=None, state=None):
            return torch.zeros_like(x)

    torch.manual_seed(0)
    model = build_model(compose("train", ["model=samba", "model/size=test", "model.num_layers=4", "data.seq_len=64"]), 320).eval()
    silent, _, watched, inner = (block.mixer for block in model.blocks)
    silent.__class__ = Silent
    heard = []
    watched.register_forward_hook(lambda *_: heard.append("mixer"))
    inner.qkv_proj.register_forward_hook(lambda *_: heard.append("inner"))
    states = [model.new_state(5, 64) for _ in range(2)]
    found = []
    for called, state in zip((Forward(model), Forward(model, packed=True)), states, strict=True):
        with called.quiet():
            found.append(called.logits(model(Batch(IDS), state).hidden))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5 * float(found[0].abs().max()))
    assert heard == ["mixer", "inner"] * 2


def test_a_state_that_may_not_be_overwritten_is_left_alone():
    """Made in inference mode, and the model is in training: such tensors cannot be changed outside of that mode."""
    block = MambaBlock(MambaMixer(8, 4, 3, 2, None), None, 8, 1e-5)
    branch, x = (
        block.packed_branch({part: pack(part.weight) for part in block.modules() if isinstance(part, nn.Linear)}.get),
        torch.randn(2, 5, 8),
    )
    with torch.inference_mode():
        states = [block.new_state(2, 64, torch.float32, torch.device("cpu")) for _ in range(2)]
    held = states[1].tensors
    with torch.no_grad():
        expected = block.branch(x, Context(), states[0])
        torch.testing.assert_close(branch(x, Context(), states[1]), expected, rtol=1e-5, atol=1e-6)
    assert not any(part.any() for part in held) and states[1].ssm.any()


def test_an_adapter_round_a_packed_layer_still_acts(model):
    build(compose("train", ["adapter=lora"]).adapter).apply(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    model.eval()
    plain = logits(Forward(model))
    torch.testing.assert_close(logits(Forward(model, packed=True)), plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_a_model_in_training_is_put_back_also_after_an_error(model):
    model.train()
    called = Forward(model, packed=True)
    with pytest.raises(IndexError), called.quiet():
        assert not model.training and not torch.is_grad_enabled()
        model(Batch(torch.full((1, 2), 999)))
    assert all(part.training for part in model.modules()) and torch.is_grad_enabled()
    assert untouched(model)
