"""COSMOS against the paper's equations in float64, its invariances, and the gradients that break naive versions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from components.contracts import NamedParameter
from components.optim.cosmos import Cosmos
from components.optim.cosmos_update import first_basis
from tests.components.optim.helpers import EXACT, gradients, parameter, relative, updates

ORACLE_SHAPES = [(24, 16, 4), (16, 24, 4), (96, 64, 16)]


def newton_schulz(x: np.ndarray) -> np.ndarray:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def directions(grads: list[np.ndarray], rank: int, gamma: float, eps: float, floor: float, nesterov: bool) -> list[np.ndarray]:
    """Algorithm 1 of arXiv 2502.17410, one matrix, H never formed, epsilon outside the root, least denominator `floor` of max |G U|."""
    b1, b2, (m, n) = 0.9, 0.95, grads[0].shape
    momentum, second = np.zeros((m, n)), np.zeros((m, rank))
    basis, gram = np.linalg.svd(grads[0])[2][:rank].T, np.zeros((rank, rank))
    found = []
    for t, g in enumerate(grads, 1):
        momentum = b1 * momentum + (1 - b1) * g
        old = basis
        if t > 1:
            basis = np.linalg.qr(b2 * old @ gram + (1 - b2) * g.T @ (g @ old))[0]
        turn = old.T @ basis
        gram = b2 * turn.T @ gram @ turn + (1 - b2) * (g @ basis).T @ (g @ basis)
        second = b2 * second + (1 - b2) * (g @ basis) ** 2
        if nesterov:
            total = momentum / (1 - b1)  # the sum form
            ahead = (g + b1 * total) / (1 + b1 * (1 - b1**t) / (1 - b1))
        else:
            ahead = momentum / (1 - b1**t)
        scale = np.maximum(np.sqrt(second / (1 - b2**t)) + eps, floor * np.abs(g @ basis).max())
        inner = (ahead @ basis / scale) @ basis.T
        rest = newton_schulz(ahead - ahead @ basis @ basis.T)
        total_ = inner + gamma * math.sqrt(m * n) * rest / np.linalg.norm(rest)
        found.append(math.sqrt(m * n) * total_ / np.linalg.norm(total_))
    return found


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("m", "n", "rank"), ORACLE_SHAPES)
def test_equals_the_paper_in_float64(m, n, rank, nesterov):
    grads = gradients(m, n, 6)
    expected = directions([g.numpy() for g in grads], rank, 0.2, 1e-8, 1e-5, nesterov)
    for ours, paper in zip(updates(grads, rank=rank, nesterov=nesterov), expected, strict=True):
        assert relative(ours, torch.from_numpy(paper)) < 1e-9


@pytest.mark.parametrize("qr", ["qr", "cholesky"])
@pytest.mark.parametrize(("m", "n", "rank"), ORACLE_SHAPES)
def test_float32_follows_float64(m, n, rank, qr):
    grads = gradients(m, n, 6)
    expected = directions([g.numpy() for g in grads], rank, 0.2, 1e-8, 1e-5, True)
    for ours, paper in zip(updates(grads, torch.float32, rank=rank, qr=qr, ns_dtype="float32"), expected, strict=True):
        assert relative(ours, torch.from_numpy(paper)) < 1e-3


@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96), (64, 64)])
def test_the_first_step_in_float32_finds_directions_a_thousandth_of_the_largest(m, n):
    """Steep spectra are real: a Gram matrix in float32 knows nothing below 3e-4 of the largest, and missed this by up to 0.5."""
    ratio = 1e-3 ** (1 / 15)  # the 16th singular value is a thousandth of the first
    grad = gradients(m, n, 1, noise=0.0, ratio=ratio)[0]
    expected = torch.from_numpy(directions([grad.numpy()], 16, 0.2, 1e-8, 1e-5, True)[0])
    assert relative(updates([grad], rank=16)[0], expected) < 1e-7  # squaring costs 1e-16 x 1e3^2, and the floor and NS enlarge it
    exact, ours = (first_basis(g[None], 16)[0].double() for g in (grad, grad.float()))
    sizes = torch.linalg.svdvals(grad)
    gap = (sizes[15] - sizes[16]) / sizes[0]
    bound = 20 * torch.finfo(torch.float32).eps / gap  # Wedin's, with errors of rounding of 20 eps
    assert relative(ours @ ours.mT, exact @ exact.mT) < bound


def test_a_floor_that_binds_is_the_oracles_too():
    grads = gradients(24, 16, 4)
    plain, floored = (directions([g.numpy() for g in grads], 4, 0.2, 1e-8, floor, True) for floor in (0.0, 0.3))
    assert relative(torch.from_numpy(floored[-1]), torch.from_numpy(plain[-1])) > 1e-2
    assert relative(updates(grads, rank=4, rel_floor=0.3)[-1], torch.from_numpy(floored[-1])) < 1e-9


def test_every_update_has_rms_eta():
    for m, n in ((24, 16), (16, 24), (8, 40), (40, 8), (1, 6), (6, 1)):
        for update in updates(gradients(m, n, 3), rank=1 if n == 1 else 4):
            assert update.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-12)


def test_turning_the_input_side_turns_the_update_and_the_output_side_does_not():
    grads = gradients(24, 16, 5)
    right = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    left = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    plain = updates(grads, rank=4)[-1]
    assert relative(updates([g @ right for g in grads], rank=4)[-1], plain @ right) < 1e-10
    assert relative(updates([g[order] for g in grads], rank=4)[-1], plain[order]) < 1e-10
    assert relative(updates([left @ g for g in grads], rank=4)[-1], left @ plain) > 0.1  # Adam's coordinates are rows


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_size_of_gradients_does_not_matter(size):
    grads = gradients(24, 16, 5)
    plain, small = updates(grads, rank=4, eps=0.0)[-1], updates([size * g for g in grads], rank=4, eps=0.0)[-1]
    assert relative(small, plain) < 1e-6
    assert relative(updates([size * g for g in grads], rank=4)[-1], updates(grads, rank=4)[-1]) < 0.03


def test_tiny_gradients_in_float32():
    """Squares of 1e-25 vanish in float32; norms must not. With eps=0 the second moment sets the limit, at 1e-19."""
    grads = gradients(24, 16, 4)
    plain = updates(grads, torch.float32, rank=4, eps=0.0, ns_dtype="float32")
    small = updates([1e-15 * g for g in grads], torch.float32, rank=4, eps=0.0, ns_dtype="float32")
    assert relative(small[-1], plain[-1]) < 1e-3


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_basis_follows_a_planted_subspace(nesterov):
    """Four directions visited in turn under noise: only an average over steps sees all of them."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(32, 4, generator=generator, dtype=torch.float64))[0]
    item = parameter(48, 32)
    optimizer = Cosmos([item], **{**EXACT, "rank": 4, "nesterov": nesterov})
    for step in range(200):
        left = torch.randn(48, generator=generator, dtype=torch.float64)
        noise = torch.randn(48, 32, generator=generator, dtype=torch.float64)
        item.parameter.grad = torch.outer(left, planted[:, step % 4]) + 0.02 * noise
        optimizer.step()
    basis = optimizer.state[item.parameter]["basis"][0]
    overlap = (planted.mT @ basis).square().sum() / 4
    assert overlap >= 0.99


def leak(**changes) -> float:
    """Share of the first update's energy outside of the row space of a gradient of rank 8, in float32."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(96, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    update = updates([grad], torch.float32, rank=64, ns_dtype="float32", **changes)[0]
    inside = torch.linalg.svd(grad.double())[2][:8]
    return (1 - (update @ inside.mT).square().sum() / update.square().sum()).item()


def test_gradients_of_low_rank_do_not_blow_up_rounding_noise():
    assert leak() <= 1e-3
    assert leak(rel_floor=0.0) > 0.1 and leak(residual_tol=0.0) > 0.1  # each guard is needed


def test_the_first_basis_is_the_leading_right_singular_space():
    for m, n, rank in ((20, 12, 5), (12, 20, 5), (12, 20, 12)):
        grad = gradients(m, n, 1)[0]
        ours, exact = first_basis(grad[None], rank)[0], torch.linalg.svd(grad)[2][:rank].mT
        assert relative(ours @ ours.mT, exact @ exact.mT) < 1e-10
    wider = first_basis(gradients(4, 20, 1)[0][None], 9)[0]  # five columns that the gradient says nothing about
    assert relative(wider.mT @ wider, torch.eye(9, dtype=torch.float64)) < 1e-12


def test_without_the_subspace_it_is_muon():
    """gamma -> infinity: torch's Muon, but for the leading direction, which is missing: 1 of 96 of the energy, hence the cosine."""
    grads = [torch.randn(128, 96, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    weight = nn.Parameter(torch.zeros(128, 96))
    muon = torch.optim.Muon([weight], lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.0)
    ours = updates([grad.double() for grad in grads], torch.float32, rank=1, gamma=1e9, ns_dtype="float32")
    for grad, update in zip(grads, ours, strict=True):
        weight.data.zero_()
        weight.grad = grad
        muon.step()
        cosine = nn.functional.cosine_similarity(update.flatten(), -weight.detach().double().flatten(), dim=0)
        assert 1 - cosine < 1 / 96 + 2e-3  # 2e-3: torch iterates in bfloat16


def test_with_all_of_the_space_it_is_one_sided_soap():
    """r = n: Adam in the eigenbasis alone, rescaled."""
    grad = gradients(24, 16, 1)[0]
    soap = torch.from_numpy(directions([grad.numpy()], 16, 0.0, 1e-8, 1e-5, True)[0])
    assert relative(updates([grad], rank=16)[0], soap) < 1e-9


def test_fused_blocks_and_stacks_equal_separate_matrices():
    grads = gradients(32, 16, 3)
    fused = updates(grads, splits=[16, 8, 8], rank=4)[-1]
    apart = torch.cat([updates([g.split([16, 8, 8])[i] for g in grads], rank=4)[-1] for i in range(3)])
    assert relative(fused, apart) < 1e-12
    item = NamedParameter("experts", nn.Parameter(torch.zeros(4, 8, 16, dtype=torch.float64)), "down")
    optimizer = Cosmos([item], **{**EXACT, "rank": 4, "matrix_roles": ["down"]})
    for grad in grads:
        item.parameter.data.zero_()
        item.parameter.grad = grad.view(4, 8, 16).clone()
        optimizer.step()
    alone = torch.stack([updates([g.view(4, 8, 16)[i] for g in grads], rank=4)[-1] for i in range(4)])
    assert relative(-item.parameter.detach() / optimizer.param_groups[0]["lr"], alone) < 1e-12


def test_alone_equals_in_company():
    items = [NamedParameter(f"w{i}", nn.Parameter(torch.zeros(24, 16)), "o") for i in range(3)]
    together = Cosmos(items, **{**EXACT, "rank": 4, "ns_dtype": "float32"})
    lone = parameter(24, 16, torch.float32)
    alone = Cosmos([lone], **{**EXACT, "rank": 4, "ns_dtype": "float32"})
    for step in range(4):
        for i, item in enumerate(items):
            item.parameter.grad = gradients(24, 16, 4, seed=i)[step].float()
        lone.parameter.grad = gradients(24, 16, 4, seed=1)[step].float()
        together.step()
        alone.step()
    assert relative(items[1].parameter.detach(), lone.parameter.detach()) < 1e-6


def test_zero_gradients_move_nothing_and_spoil_nothing():
    grads = gradients(24, 16, 2)
    with_zero = updates([torch.zeros_like(grads[0]), *grads], rank=4)
    assert with_zero[0].abs().max() == 0 and all(update.isfinite().all() for update in with_zero)
    assert with_zero[-1].square().mean().sqrt().item() == pytest.approx(1.0)
