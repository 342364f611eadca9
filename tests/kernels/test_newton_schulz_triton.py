"""Newton-Schulz with Triton's symmetric products against the float64 specification.

Without a GPU the kernel runs in Triton's interpreter; the slow test compiles it for the hardware.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl
from triton import knobs

from kernels.dispatch import force
from kernels.newton_schulz import eager, gram_factor, newton_schulz, triton_kernel
from kernels.newton_schulz.reference import newton_schulz as reference
from tests.kernels.compile_support import MAX_SHARED_BYTES, compiled_launches
from tests.kernels.support import assert_close

pytestmark = pytest.mark.interpret
DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.fixture(autouse=True)
def backend():
    with force("triton", op="newton_schulz"):
        yield


# one element, less than a tile, several tiles with a ragged last one, exactly two tiles, a depth of one and of several ragged steps
SHAPES = [(1, 1, 1), (2, 5, 9), (2, 70, 33), (1, 128, 32), (1, 150, 1), (1, 17, 100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # measured 2.0e-7; bf16 in the interpreter, which multiplies in float32 here: 3.9e-3
    [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)],
    ids=["fp32", "bf16"],
)
def test_symmetric_product(shape, dtype, tolerance):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    wide = x.double()
    gram = triton_kernel.symmetric_product(x, x.mT)
    assert gram.dtype == dtype and torch.equal(gram, gram.mT)
    assert_close(gram, wide @ wide.mT, tolerance, "XX'")
    wide = gram.double()
    polynomial = triton_kernel.symmetric_product(gram, gram, gram, beta=-4.775, alpha=2.0315)
    assert torch.equal(polynomial, polynomial.mT)
    assert_close(polynomial, -4.775 * wide + 2.0315 * wide @ wide, tolerance, "polynomial")


def test_of_each_pair_of_tiles_only_the_lower_is_computed():
    """An operand that makes the product unsymmetric on purpose: what comes out is its lower half, mirrored."""
    left, right = torch.randn(2, 150, 20, device=DEVICE), torch.randn(2, 20, 150, device=DEVICE)
    lower = (left.double() @ right.double()).tril()
    add = torch.randn(2, 150, 150, device=DEVICE)
    assert_close(triton_kernel.symmetric_product(left, right), lower + lower.tril(-1).mT, 1e-6, "product")
    lower += 0.5 * add.double().tril()
    assert_close(triton_kernel.symmetric_product(left, right, add, beta=0.5), lower + lower.tril(-1).mT, 1e-6, "sum")


@triton.jit
def _places(out, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    row, column = triton_kernel._lower_tile(index)
    tl.store(out + index, row)
    tl.store(out + COUNT + index, column)


def test_the_number_of_a_tile_gives_its_row_and_column():
    """By a rounded square root; 65536 tiles are a side of 46000 and more."""
    out = torch.zeros(2, 65536, dtype=torch.int32, device=DEVICE)
    _places[(1,)](out, COUNT=65536)
    assert torch.equal(out.cpu(), torch.tril_indices(362, 362)[:, :65536].int())


def test_strides_do_not_matter():
    x = torch.randn(40, 3, 24, device=DEVICE).permute(1, 2, 0)[:, ::2]  # (3, 12, 40), no dimension contiguous but the last of memory
    assert torch.equal(triton_kernel.symmetric_product(x, x.mT), triton_kernel.symmetric_product(x.contiguous(), x.contiguous().mT))


# measured 5.6e-7 and 1.7e-6; the Gram form amplifies rounding more where singular values are small, as in the square one: 5.7e-5
@pytest.mark.parametrize(
    ("shape", "form", "tolerance"), [((2, 1, 9, 30), "direct", 1e-5), ((70, 33), "gram", 1e-5), ((20, 20), "gram", 2e-4)], ids=str
)
def test_newton_schulz(shape, form, tolerance):
    x = torch.randn(shape, device=DEVICE)
    assert_close(newton_schulz(x, dtype=torch.float32, form=form), reference(x.double(), 5, COEFFICIENTS, 1e-7), tolerance, form)


def test_low_rank():
    x = torch.randn(12, 3, device=DEVICE) @ torch.randn(3, 20, device=DEVICE)
    assert_close(newton_schulz(x, dtype=torch.float32), reference(x.double(), 5, COEFFICIENTS, 1e-7), 1e-3, "gram")


def test_gram_factor():
    x = torch.randn(2, 40, 21, device=DEVICE)
    x = x / torch.linalg.norm(x, dim=(-2, -1), keepdim=True)
    assert_close(x @ gram_factor(x.mT @ x, steps=3), reference(x.double(), 3, COEFFICIENTS, 1e-7), 1e-5, "X P")


def test_company_zero_and_nothing():
    x = torch.randn(3, 12, 20, device=DEVICE)
    x[1] = 0
    together = newton_schulz(x, steps=2, dtype=torch.float32)
    assert together[1].abs().max() == 0
    assert_close(together[2], newton_schulz(x[2], steps=2, dtype=torch.float32), 1e-6, "alone")
    assert newton_schulz(x[:0], dtype=torch.float32).shape == (0, 12, 20)


def test_float64_is_eager():
    x = torch.randn(2, 9, 30, device=DEVICE, dtype=torch.float64)
    assert torch.equal(newton_schulz(x), eager.newton_schulz(x, 5, COEFFICIENTS, 1e-7))


def launches():
    """What an optimizer launches, for `compiled_launches`."""
    with force("triton", op="newton_schulz"):
        for dtype in (torch.bfloat16, torch.float32):
            newton_schulz(torch.zeros(2, 256, 320), steps=1, dtype=dtype, form="direct")
        gram_factor(torch.zeros(1, 77, 77), steps=2)
        newton_schulz(torch.zeros(5, 20), steps=1, dtype=torch.bfloat16)


@pytest.mark.slow
def test_compiles_without_spills():
    compiled = compiled_launches("tests.kernels.test_newton_schulz_triton")
    assert len(compiled) == 2 * (2 * 2 + 5 + 2)
    for c in compiled:
        assert c.shared_bytes <= MAX_SHARED_BYTES[c.capability] and c.stack_bytes == 0, c
