"""Rotary embedding in Triton against the rotation matrix in float64: partial rotation, tables of a row or of all, strides.

Without a GPU the kernel runs in Triton's interpreter; the slow test compiles it for the hardware.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from triton import knobs

from kernels.dispatch import force
from kernels.rope import apply_rope, eager, triton_kernel
from tests.kernels.compile_support import MAX_SHARED_BYTES, compiled_launches
from tests.kernels.support import assert_close, compare, gradients

pytestmark = pytest.mark.interpret
DEVICE = "cpu" if knobs.runtime.interpret else "cuda"


@pytest.fixture(autouse=True)
def backend():
    with force("triton", op="rope"):
        yield


def tables(rows, length, half):
    angles = torch.randn(rows, length, half, device=DEVICE)
    return angles.cos() * 1.2, angles.sin() * 1.2  # with an attention factor


def check(x, cos, sin, cotangent=None, tolerance=1e-5):
    cotangent = torch.randn(x.shape, device=DEVICE).to(x.dtype) if cotangent is None else cotangent
    actual = gradients(lambda x: (apply_rope(x, cos, sin),), {"x": x}, [cotangent])
    with force("reference", op="rope"):
        expected = gradients(lambda x: (apply_rope(x, cos, sin),), {"x": x.double()}, [cotangent.double()])
    compare(actual, expected, tolerance)  # fp32, measured: below 6e-8
    return actual


@pytest.mark.parametrize(("rows", "half"), [(1, 4), (2, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("length", [1, 5])
def test_matches_the_rotation_matrix(rows, half, length):
    check(torch.randn(2, 3, length, 8, device=DEVICE), *tables(rows, length, half))


def test_several_tiles_of_positions(monkeypatch):
    monkeypatch.setattr(triton_kernel, "_ELEMENTS", 16)
    check(torch.randn(2, 2, 11, 9, device=DEVICE), *tables(2, 11, 3))


def test_the_untouched_dimensions_are_bitwise_the_same():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 2, 5, 9, device=DEVICE).to(dtype)
        cos, sin = tables(1, 5, 3)
        assert torch.equal(apply_rope(x, cos, sin)[..., 6:], x[..., 6:])


def test_strided_heads_keep_their_layout():
    fused = torch.randn(2, 5, 4, 16, device=DEVICE).transpose(1, 2)  # (B, H + G, T, K) as a projection leaves it
    cos, sin = tables(1, 5, 4)
    assert apply_rope(fused[:, :3], cos, sin).transpose(1, 2).is_contiguous()
    for x in (fused[:, :3], fused[..., ::2], fused.transpose(1, 2).contiguous().transpose(1, 2).flip(1)):
        check(x, cos, sin)
    check(fused, cos, sin, cotangent=torch.ones(1, device=DEVICE).expand(fused.shape))
    wide = torch.randn(1, 5, 8, device=DEVICE)
    check(fused, wide[..., ::2], wide[..., 1::2])  # tables that are not contiguous either


def test_bfloat16():
    """Measured in the interpreter, whose stores truncate: 3.3e-3 at most over three seeds."""
    actual = check(torch.randn(2, 3, 5, 8, device=DEVICE).bfloat16(), *tables(1, 5, 4), tolerance=4e-3)
    assert {v.dtype for v in actual.values()} == {torch.bfloat16}


def test_backward_undoes_a_rotation_and_is_bitwise_reproducible():
    angles = torch.randn(1, 5, 4, device=DEVICE)
    x = torch.randn(1, 2, 5, 8, device=DEVICE, requires_grad=True)
    first, second = (torch.autograd.grad((out := apply_rope(x, angles.cos(), angles.sin())), x, out)[0] for _ in range(2))
    assert_close(first, x, 1e-6, "x")
    assert torch.equal(first, second)


def test_which_kernel_runs():
    cos, sin = tables(1, 5, 4)
    x = torch.randn(1, 2, 5, 8, device=DEVICE, requires_grad=True)
    saved = apply_rope(x, cos, sin).grad_fn.saved_tensors
    assert len(saved) == 2 and saved[0].shape == cos.shape  # the tables alone
    assert "triton" in apply_rope.__globals__["pick"]("rope", DEVICE).__name__
    assert torch.equal(apply_rope(x.double(), cos, sin), eager.apply_rope(x.double(), cos, sin))


def launches():
    """What the models launch, for `compiled_launches`."""
    for dtype, head_dim, half in ((torch.bfloat16, 128, 64), (torch.bfloat16, 256, 128), (torch.float32, 96, 36)):
        fused = torch.zeros(1, 64, 4, head_dim, dtype=dtype, requires_grad=True).transpose(1, 2)
        triton_kernel.apply_rope(fused[:, :3], torch.zeros(1, 64, half), torch.zeros(1, 64, half)).sum().backward()


@pytest.mark.slow
def test_compiles_without_spills():
    compiled = compiled_launches("tests.kernels.test_rope_triton")
    assert len(compiled) == 2 * 3 * 2
    for c in compiled:
        assert c.shared_bytes <= MAX_SHARED_BYTES[c.capability] and c.stack_bytes == 0, c
