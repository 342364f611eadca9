"""Matrices shared out among processes, whole and by rows: the same weights as one process, less state, checkpoints of any number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from components.contracts import NamedParameter, UserError
from components.optim.cosmos import Cosmos
from components.optim.muon import Muon
from components.optim.sharding import matrix_cost, share_out
from tests.components.optim import sharding_workers as workers
from tests.components.optim.helpers import COSMOS, MUON


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def outcome(request, tmp_path_factory) -> dict[str, str]:
    """Scenario -> what went wrong, in any process; the processes are started once for all."""
    return start(request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


def start(ranks: int, folder: Path) -> dict[str, str]:
    torch.multiprocessing.spawn(workers.run, (ranks, str(folder)), nprocs=ranks)
    found = [json.loads((folder / f"failures{rank}.json").read_text()) for rank in range(ranks)]
    return {name: f"process {rank}: {trace}" for rank, failed in enumerate(found) for name, trace in failed.items()}


@pytest.mark.parametrize("scenario", [s.__name__ for s in workers.SCENARIOS])
def test_several_processes(outcome, scenario):
    assert scenario not in outcome, outcome[scenario]


@pytest.fixture
def one_thread():
    """As in the processes it is compared with: threads order the sums of a QR or a product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_checkpoints_move_between_numbers_of_processes(one_thread, tmp_path):
    """Two processes, then one, then three, equal one that was never interrupted: to the last bit where matrices are whole."""
    assert not start(2, tmp_path)
    alone = workers.Matrices()
    optimizer = workers.OPTIMIZERS["cosmos"](alone)
    workers.advance(alone, optimizer, range(10))
    for name in ("zero", "rows"):
        saved = torch.load(tmp_path / f"{name}2.ckpt", weights_only=True)
        model = workers.Matrices()
        model.load_state_dict(saved["model"])
        one = workers.OPTIMIZERS["cosmos"](model)
        if name == "zero":
            one.load_state_dict(saved["optimizer"])
        else:
            set_optimizer_state_dict(model, one, saved["optimizer"], options=workers.FULL)
        workers.advance(model, one, range(4, 7))
        state = one.state_dict() if name == "zero" else get_optimizer_state_dict(model, one, options=workers.FULL)
        torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / f"{name}.ckpt")
    torch.multiprocessing.spawn(workers.go_on, (3, str(tmp_path)), nprocs=3)
    zero, rows = (torch.load(tmp_path / f"{name}_done.ckpt", weights_only=True) for name in ("zero", "rows"))
    for name, p in alone.named_parameters():
        assert torch.equal(zero[name], p), name
        assert (rows[name] - p).norm() <= 1e-6 * p.norm(), name


def test_the_dearest_first_to_the_one_that_has_least():
    assert share_out([5, 9, 4, 1], 2) == [1, 0, 1, 0]
    assert share_out([1] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert share_out([], 2) == []
    costs = [matrix_cost(shape, rows) for shape, rows in (((4, 2), ()), ((2, 4), ()), ((3, 4, 2), ()), ((4, 2), (1, 3)))]
    assert costs == [16, 16, 48, 1 * 2 + 4 * 3]  # s^2 l, summed over stacks and blocks


class FlatParameter(nn.Parameter):
    """What FSDP1 calls its vectors."""


def test_mistakes_are_named():
    matrix = NamedParameter("w", nn.Parameter(torch.zeros(4, 4)), "o")
    for cls, options in ((Cosmos, {**COSMOS, "rank": 2}), (Muon, MUON)):
        with pytest.raises(UserError, match=r"optimizer.shard: rows; allowed: auto, none"):
            cls([matrix], **{**options, "shard": "rows"})
    with pytest.raises(UserError, match="flat is a flat shard of FSDP1"):
        Cosmos([NamedParameter("flat", FlatParameter(torch.zeros(16)), "o")], **COSMOS)
