"""Newton-Schulz: batched eager against the float64 specification, and the specification against the SVD."""

import pytest
import torch

from kernels.newton_schulz import newton_schulz
from kernels.newton_schulz.reference import newton_schulz as reference

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(3, 8, 5), (2, 5, 8), (1, 1, 7), (2, 7, 1), (6, 6), (2, 2, 9, 4), (1, 33, 65)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # measured worst: 2e-15, 1e-6, 2e-2; bf16 keeps 8 bits, and five steps with |slope| up to 3.4 amplify them
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_eager_equals_the_float64_reference(shape, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    expected = reference(x, 5, COEFFICIENTS, 1e-7)
    given = x if dtype == torch.float64 else x.float()
    got = newton_schulz(given, dtype=dtype)
    assert got.shape == x.shape and got.dtype == given.dtype
    assert relative(got, expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_singular_values_land_near_one_and_vectors_stay(dtype):
    torch.manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(24, 16, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    x = u @ torch.diag(torch.logspace(0, -1.5, 16, dtype=torch.float64)) @ v.T
    rotated = u.T @ newton_schulz(x if dtype == torch.float64 else x.float(), dtype=dtype).double() @ v
    values = rotated.diagonal()
    # the quintic's fixed band for these coefficients is [0.68, 1.14]; bf16 leaves it by its rounding
    assert values.min() > 0.65 and values.max() < 1.2
    assert (rotated - torch.diag(values)).abs().max() < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)


def test_zero_stays_zero_and_scale_does_not_matter():
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert relative(newton_schulz(x * 1e-3), newton_schulz(x)) < 1e-12


def test_result_does_not_depend_on_the_company():
    x = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([newton_schulz(matrix, dtype=torch.float32) for matrix in x])
    assert relative(newton_schulz(x, dtype=torch.float32), alone) < 1e-6


def test_input_is_not_written_and_may_be_strided():
    x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).transpose(0, 2)
    before = x.clone()
    assert relative(newton_schulz(x), newton_schulz(x.contiguous())) < 1e-14
    assert torch.equal(x, before)


def test_autocast_does_not_reach_inside():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = newton_schulz(x, dtype=torch.float32)
    assert torch.equal(got, newton_schulz(x, dtype=torch.float32))


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 3, dtype=torch.int64)], ids=["vector", "integer"])
def test_bad_input_is_refused(bad):
    with pytest.raises(ValueError, match="newton_schulz: x is"):
        newton_schulz(bad)
    with pytest.raises(ValueError, match="steps=-1"):
        newton_schulz(torch.eye(2), steps=-1)
