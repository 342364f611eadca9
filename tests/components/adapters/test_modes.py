"""router=modality outside of training: which adapter a mode takes is written down, and a row keeps its mode while it is generated."""

import json

import pytest
import torch

from components.adapters.base import OFF, task_ids
from components.contracts import Batch, UserError
from framework.build import build_model, compose
from tests.components.adapters.helpers import awaken
from tests.components.adapters.moe_helpers import RULES, adapted


def test_routing_is_saved_with_modes_alone(tmp_path):
    for router in ("modality", "task", "token"):
        adapter, model = adapted(router)
        adapter.save(model, tmp_path / router)
    assert json.loads((tmp_path / "modality" / "routing.json").read_text()) == RULES
    assert not any((tmp_path / router / "routing.json").exists() for router in ("task", "token"))


def decoder():
    """A model of the contract with four modes, its adapter awake."""
    config = compose("train", ["model=samba", "model/size=test"])
    torch.manual_seed(0)
    return awaken(adapted("modality", build_model(config, 16), targets="all-linear")[1]).eval()


@torch.no_grad()
def test_a_row_keeps_its_mode_while_it_is_generated():
    """Through forks, selections and joined states; a new state, or a row that was reset, may have another."""
    model, tokens = decoder(), torch.arange(6).view(2, 3)
    task_ids(model).set("vision")
    state = model.new_state(2, 9)
    model(Batch(tokens), state)
    model(Batch(tokens[:, :1]), state)
    task_ids(model).set("text")
    other = model.new_state(1, 9)
    model(Batch(tokens[:1]), other)
    for changed in (state, state.fork(2), state.select(torch.tensor([1])), type(state).load(state.save()), type(state).cat([state, other])):
        length, rows = changed.length.clone(), torch.zeros(changed.batch_size, 1, dtype=torch.int64)
        with pytest.raises(UserError) as caught:
            model(Batch(rows), changed)
        assert str(caught.value) == "adapter.task: text, but row 0 was read for vision so far; read it anew to change in mid-generation"
        assert torch.equal(changed.length, length)
    with pytest.raises(UserError, match=r"adapter\.task: none, but row 1 was read for vision"):
        model(Batch(tokens[:, :1], task_ids=torch.tensor([1, OFF])), state)
    joined = type(state).cat([state, other])
    model(Batch(torch.zeros(3, 1, dtype=torch.int64), task_ids=torch.tensor([1, 1, 0])), joined)  # each row as before
    state.reset(torch.tensor([0]))
    model(Batch(tokens[:, :1], task_ids=torch.tensor([2, 1])), state)
    with pytest.raises(UserError, match="row 0 was read for speech"):
        model(Batch(tokens[:, :1], task_ids=torch.tensor([0, 1])), state)
