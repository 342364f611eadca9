"""The peer takes COSMOS's step, written out in float64 numpy; the benchmark counts, compares and judges as it says."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from benchmarks import common, optimizer_step
from benchmarks.official_cosmos import OfficialCosmos
from tests.components.optim.helpers import options

ETA, BETA1, BETA2, GAMMA, EPS, DECAY = 1e-2, 0.9, 0.95, 0.25, 1e-8, 0.1


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Where rows would go."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def normed(x):
    return math.sqrt(x.shape[1]) * x / np.linalg.norm(x)


def orthogonalised(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def cosmos_by_equations(weight, gradients, rank):
    """Algorithm 1 with Nesterov momentum, the running Gram matrix formed in full, momentum from its definition as a weighted sum."""
    m, second = len(weight), np.zeros((len(weight), rank))
    for t, grad in enumerate(gradients, start=1):
        if t == 1:
            gram, basis = (1 - BETA2) * grad.T @ grad, np.linalg.svd(grad)[2][:rank].T
        else:
            gram = BETA2 * basis @ basis.T @ gram @ basis @ basis.T + (1 - BETA2) * grad.T @ grad
            basis = np.linalg.qr(gram @ basis)[0]
        second = BETA2 * second + (1 - BETA2) * (grad @ basis) ** 2
        shares = [BETA1 * BETA1 ** (t - i) for i in range(1, t)] + [1 + BETA1]  # of the gradients in G + beta1 * (sum of momentum)
        ahead = sum(share * g for share, g in zip(shares, gradients)) / sum(shares)
        adam = (ahead @ basis / (np.sqrt(second / (1 - BETA2**t)) + EPS)) @ basis.T
        rest = orthogonalised(ahead - ahead @ basis @ basis.T)
        step = normed(adam + GAMMA * math.sqrt(m) * normed(rest))
        weight = (1 - ETA * DECAY) * weight - ETA * math.sqrt(m) * step
    return weight


def trajectories(shape, rank, dtype):
    """Weights after five steps by the peer and by the equations."""
    random = np.random.default_rng(0)
    weight, *gradients = random.standard_normal((6, *shape))
    p = torch.nn.Parameter(torch.tensor(weight, dtype=dtype))
    optimizer = OfficialCosmos([p], ETA, (BETA1, BETA2), rank, GAMMA, EPS, DECAY, ns_dtype=dtype)
    for gradient in gradients:
        p.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    return p.detach().double().numpy(), cosmos_by_equations(weight, gradients, rank)


@pytest.mark.parametrize("shape, rank", [((24, 16), 4), ((16, 24), 4), ((96, 64), 16)])
def test_the_peer_follows_the_equations(shape, rank):
    peer, expected = trajectories(shape, rank, torch.float64)
    assert np.abs(peer - expected).max() < 1e-11 * ETA  # 1.5e-12 at most was measured
    peer, expected = trajectories(shape, rank, torch.float32)
    assert np.abs(peer - expected).max() < 3e-3 * ETA  # 6e-4 at most


def test_the_peer_refuses_what_has_no_rest():
    for shape in ((8,), (8, 4), (2, 3, 8)):
        with pytest.raises(ValueError, match="needs matrices"):
            OfficialCosmos([torch.zeros(shape)], ETA, (BETA1, BETA2), 4, GAMMA)


def test_shapes_have_the_weights_of_their_models():
    weights = {name: sum(m * n for _, m, n in matrices) for name, matrices in optimizer_step.SHAPES.items()}
    assert weights["d256x4"] == 12 * 256**2 * 4 and weights["d768x2"] == 12 * 768**2 * 2
    assert weights["llama130m"] == 84_934_656 and weights["llama350m"] == 302_383_104 and weights["phi4mini_layer"] == 100_663_296
    state = {  # published counts of numbers in COSMOS's state at rank 64, 32 layers for the last
        name: sum(m * n + 64 * (m + n + 64) for _, m, n in matrices) for name, matrices in optimizer_step.SHAPES.items()
    }
    assert state["llama130m"] == 96_485_376 and state["llama350m"] == 332_980_224 and 32 * state["phi4mini_layer"] == 3_314_024_448


def test_state_bytes_count_storages_and_lists():
    sides, _ = optimizer_step.makers(rank=8)
    matrices = optimizer_step.SHAPES["smoke"]
    held = {}
    for name, make in sides.items():
        parameters = optimizer_step.parameters_of(matrices, torch.device("cpu"))
        optimizer = make(parameters)
        optimizer.step()
        held[name] = optimizer_step.state_bytes(optimizer)
    numbers = lambda count: 4 * sum(count(m, n) for _, m, n in matrices)  # noqa: E731
    counters = 4 * len(matrices)
    assert held["torch.optim.AdamW"] == numbers(lambda m, n: 2 * m * n) + counters
    assert held["torch.optim.Muon"] == numbers(lambda m, n: m * n)
    assert held["official COSMOS"] == numbers(lambda m, n: m * n + n * n + 8 * m + 8 * 8)  # all n x n behind the basis
    assert held["Cosmos"] == numbers(lambda m, n: m * n + 8 * n + 8 * m + 8 * 8) + counters
    soap = numbers(lambda m, n: 2 * m * n + 2 * (m * m + n * n))
    assert held["SOAP"] == soap + counters
    if "pytorch-optimizer SOAP" in held:
        assert held["pytorch-optimizer SOAP"] == soap


def test_every_side_moves_its_own_weights_and_leaves_the_gradients():
    sides, _ = optimizer_step.makers(rank=8)
    start = optimizer_step.parameters_of(optimizer_step.SHAPES["smoke"], torch.device("cpu"))
    gradients = [p.parameter.grad.clone() for p in start]
    before = [p.parameter.detach().clone() for p in start]
    for name, make in sides.items():
        mine = optimizer_step.copied(start)
        optimizer = make(mine)
        for _ in range(2):
            optimizer.step()
        for p, old, gradient in zip(mine, before, gradients, strict=True):
            assert torch.equal(p.parameter.grad, gradient), name
            assert not torch.equal(p.parameter, old), name
    assert all(torch.equal(p.parameter, old) for p, old in zip(start, before, strict=True))


@pytest.mark.parametrize("side", ["Muon", "Cosmos", "SOAP"])
def test_ours_are_set_as_the_shipped_options(side):
    start = optimizer_step.parameters_of([("o", 80, 80)], torch.device("cpu"))
    timed = optimizer_step.makers(rank=64)[0][side](start)
    assert timed.param_groups == type(timed)(start, **options(side.lower())).param_groups


def test_first_steps_are_taken_by_fresh_optimizers():
    taken = []

    class Counting:
        state = {}  # noqa: RUF012

        def __init__(self):
            taken.append(0)
            self.place = len(taken) - 1

        def step(self):
            taken[self.place] += 1

    start = optimizer_step.parameters_of([("o", 4, 4)], torch.device("cpu"))
    found = optimizer_step.measure(start, {"a": lambda _: Counting()}, 5, first_rounds=3, limit_seconds=60, clock=common.wall_seconds)
    assert taken == [7, 1, 1, 1]  # two before the measured ones
    assert found["a"]["ms"]["runs"] == 5 and found["a"]["first_ms"]["runs"] == 3 and found["a"]["state_bytes"] == 0


def test_it_runs_and_writes_nothing(results, capsys):
    optimizer_step.main(["--smoke"])
    out = capsys.readouterr().out
    assert "smoke: Cosmos / official COSMOS" in out and "smoke: first step of Cosmos" in out
    assert not results.exists()


def test_ratios_are_judged_and_kept(results, capsys, monkeypatch):
    monkeypatch.setitem(optimizer_step.SHAPES, "d256x4", optimizer_step.SHAPES["smoke"])
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # as if it were not installed
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    optimizer_step.main(["--shapes", "d256x4", "--rank", "8", "--rounds", "2", "--threads", "1"])
    out = capsys.readouterr().out
    for line in ("at most 0.8 is wanted", "at most 1.6 is wanted", "(aim 1.3)", "at most 0.2 is wanted", "SOAP: not measured"):
        assert line in out
    (row,) = (results / "optimizer_step.jsonl").read_text().splitlines()
    row = json.loads(row)
    found = row["shapes"]["d256x4"]
    assert row["threads"] == torch.get_num_threads() and (results / "optimizer_step_cpu.png").exists()
    assert row["ratios"]["d256x4"]["Cosmos / official COSMOS"] == pytest.approx(
        found["Cosmos"]["ms"]["median"] / found["official COSMOS"]["ms"]["median"]
    )


def test_a_peer_that_steps_differently_is_not_timed(monkeypatch):
    real = optimizer_step.official
    monkeypatch.setattr(optimizer_step, "official", lambda *args: _with(real(*args), gamma=0.3))
    with pytest.raises(SystemExit, match="nothing was timed"):
        optimizer_step.main(["--smoke"])


def _with(optimizer, **values):
    vars(optimizer).update(values)
    return optimizer


def test_an_unknown_name_ends_the_command(capsys):
    for arguments in (["--shapes", "d256"], ["--arms", "Shampoo"]):
        with pytest.raises(SystemExit):
            optimizer_step.main(arguments)
        assert "unknown: " in capsys.readouterr().err
