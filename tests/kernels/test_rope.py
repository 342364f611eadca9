"""Rotary embedding: eager against the rotation matrix, partial rotation, gradients, angles at large positions."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.rope import apply_rope, eager, reference, rope_tables
from tests.kernels.support import assert_close, compare, gradients


def tables(batch, length, half, dtype=torch.float64):
    angles = torch.randn(batch, length, half, dtype=dtype)
    return angles.cos() * 1.2, angles.sin() * 1.2  # with an attention factor


@pytest.mark.parametrize(("rows", "half"), [(1, 4), (2, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("length", [1, 5])
def test_matches_the_rotation_matrix(rows, half, length):
    x = torch.randn(2, 3, length, 8, dtype=torch.float64)
    cos, sin = tables(rows, length, half)
    inputs, cotangents = {"x": x}, [torch.randn_like(x)]
    expected = gradients(lambda x: (reference.apply_rope(x, cos, sin),), inputs, cotangents)
    compare(gradients(lambda x: (eager.apply_rope(x, cos, sin),), inputs, cotangents), expected, 1e-12)


def test_the_untouched_dimensions_are_bitwise_the_same():
    x = torch.randn(1, 2, 5, 8)
    cos, sin = tables(1, 5, 3, torch.float32)
    assert torch.equal(apply_rope(x, cos, sin)[..., 6:], x[..., 6:])


def test_scores_depend_on_relative_positions_only():
    inv_freq = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        turn = lambda x, p: apply_rope(x, *rope_tables(torch.tensor([[p]]), inv_freq))  # noqa: E731
        return (turn(q, i) * turn(k, j)).sum()

    # The tables are float32 (2^-24 relative), so far shifts agree to 1e-6 of |q||k|.
    assert abs(score(7, 3) - score(1_000_007, 1_000_003)) < 1e-6 * q.norm() * k.norm()
    assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_angles_are_float64():
    cos, sin = rope_tables(torch.tensor([[1_000_003]]), torch.tensor([0.1], dtype=torch.float64), attention_factor=2.0)
    assert cos.dtype == torch.float32 and cos.shape == (1, 1, 1)
    assert abs(cos.item() - 2 * math.cos(100000.3)) < 2e-7 and abs(sin.item() - 2 * math.sin(100000.3)) < 2e-7


def test_frequencies_may_differ_between_rows():
    positions, frequencies = torch.arange(4).repeat(2, 1), torch.tensor([[1.0, 0.5], [2.0, 0.25]])
    cos, _ = rope_tables(positions, frequencies)
    assert_close(cos[1], rope_tables(positions[:1], frequencies[1])[0][0], 0.0, "cos")


def test_bfloat16_and_strided():
    x = torch.randn(2, 5, 3, 8).bfloat16().transpose(1, 2)  # (B, H, T, K) as a view of (B, T, H, K)
    cos, sin = tables(1, 5, 4, torch.float32)
    out = apply_rope(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert_close(out, reference.apply_rope(x.double(), cos, sin), 4e-3, "out")  # one bf16 rounding


def test_gradcheck():
    cos, sin = tables(1, 4, 2)
    x = torch.randn(2, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: eager.apply_rope(x, cos, sin), [x])


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 4), (1, 5, 5), (5, 4)])
def test_bad_tables(shape):
    with pytest.raises(ValueError, match="apply_rope: cos"):
        apply_rope(torch.zeros(2, 1, 5, 8), torch.zeros(shape), torch.zeros(shape))


def test_bad_positions():
    with pytest.raises(ValueError, match=r"position_ids is torch.float32 \(1, 3\); expected integer"):
        rope_tables(torch.zeros(1, 3), torch.ones(2))
