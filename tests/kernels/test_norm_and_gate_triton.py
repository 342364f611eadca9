"""RMS norm, alone and behind a residual sum, and SwiGLU in Triton, against their specifications in float64.

Without a GPU the kernels run in Triton's interpreter; the slow test compiles them for the hardware.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from triton import knobs

from kernels.dispatch import force
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rms_norm import eager as norm_eager
from kernels.rms_norm import triton_kernel as norm_kernel
from kernels.swiglu import swiglu
from kernels.swiglu import triton_kernel as gate_kernel
from tests.kernels.compile_support import MAX_SHARED_BYTES, compiled_launches
from tests.kernels.support import assert_close, compare, gradients

pytestmark = pytest.mark.interpret
DEVICE = "cpu" if knobs.runtime.interpret else "cuda"


@pytest.fixture(autouse=True)
def backend():
    with force("triton"):
        yield


def check(function, inputs, cotangents, tolerance=1e-5):
    inputs = {k: v.to(DEVICE) for k, v in inputs.items()}
    cotangents = [c.to(DEVICE) for c in cotangents]
    actual = gradients(function, inputs, cotangents)
    with force("reference"):
        expected = gradients(function, {k: v.double() for k, v in inputs.items()}, [c.double() for c in cotangents])
    compare(actual, expected, tolerance)  # fp32, measured: below 2e-7
    return actual


# rows that share a program, one row, one column, a size between powers of two, more rows than the programs of the backward hold at once
SHAPES = [(2, 3, 7), (5, 1), (4,), (1, 130), (70, 5), (3, 4097)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape):
    # x / |x| of one column has almost no gradient; a large eps keeps it away from cancellation
    inputs = {"x": torch.randn(shape), "weight": torch.randn(shape[-1])}
    check(lambda **kw: (rms_norm(**kw, eps=1.0 if shape[-1] == 1 else 1e-5),), inputs, [torch.randn(shape)])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (5, 1)])
def test_add_rms_norm(shape):
    inputs = {"x": torch.randn(shape), "residual": torch.randn(shape), "weight": torch.randn(shape[-1])}
    check(add_rms_norm, inputs, [torch.randn(shape), torch.randn(shape)])


@pytest.mark.parametrize("unused", [0, 1])
def test_each_result_of_add_rms_norm_alone(unused):
    leaves = {k: torch.randn(3, 7, device=DEVICE, requires_grad=True) for k in ("x", "residual")}
    weight, g = torch.randn(7, device=DEVICE, requires_grad=True), torch.randn(3, 7, device=DEVICE)
    add_rms_norm(**leaves, weight=weight)[1 - unused].backward(g)
    if unused == 0:
        assert torch.equal(leaves["x"].grad, g) and torch.equal(leaves["residual"].grad, g) and weight.grad is None
        return
    with force("reference"):
        total = (leaves["x"] + leaves["residual"]).detach().requires_grad_()
        expected = torch.autograd.grad(rms_norm(total, weight), [total, weight], g)
    for actual, wanted in zip((leaves["x"].grad, leaves["residual"].grad, weight.grad), (expected[0], *expected)):
        assert_close(actual, wanted, 1e-5, "gradient")


def test_an_autocast_branch_joins_a_float32_stream():
    """x is bf16, the stream and both results fp32; the gradient of x is rounded once: 3.2e-3 measured, as the interpreter truncates."""
    inputs = {"x": torch.randn(6, 40).bfloat16(), "residual": torch.randn(6, 40), "weight": torch.rand(40)}
    function = lambda **kw: add_rms_norm(**kw, eps=1e-5)  # noqa: E731
    cotangents = [torch.randn(6, 40), torch.randn(6, 40)]
    actual = check(function, inputs, cotangents, tolerance=4e-3)
    assert [actual[k].dtype for k in ("out0", "out1", "d_x", "d_residual")] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    x, residual = inputs["x"].to(DEVICE), inputs["residual"].to(DEVICE)
    assert torch.equal(actual["out1"], residual + x)
    assert_close(actual["out0"], norm_eager.rms_norm(residual + x, inputs["weight"].to(DEVICE)), 1e-6, "normed")
    inputs["x"] = inputs["x"].float()
    assert_close(actual["d_residual"], check(function, inputs, cotangents)["d_residual"], 1e-6, "d_residual")


# relative RMS error measured in the interpreter, the largest of output and gradients over three seeds: 3.8e-3
def test_bfloat16():
    inputs = {"x": torch.randn(6, 40).bfloat16(), "weight": torch.rand(40).bfloat16()}
    actual = check(lambda **kw: (rms_norm(**kw),), inputs, [torch.randn(6, 40).bfloat16()], tolerance=5e-3)
    assert {v.dtype for v in actual.values()} == {torch.bfloat16}


def test_statistics_are_float32():
    x = (torch.randn(4, 512) * 300).bfloat16().to(DEVICE)
    weight = torch.rand(512, device=DEVICE)
    assert_close(rms_norm(x, weight), norm_eager.rms_norm(x.double(), weight.double()), 4e-3, "out")  # one rounding of the result
    assert rms_norm(torch.zeros(2, 3, device=DEVICE), torch.ones(3, device=DEVICE)).abs().max() == 0


def test_rows_apart_in_memory():
    wide = torch.randn(2, 5, 3, 14)
    for x in (wide[..., :7], wide[..., ::2], wide.transpose(1, 2)[..., :7]):
        inputs = {"x": x, "residual": x.flip(0).transpose(0, 1).contiguous().transpose(0, 1), "weight": torch.randn(7)}
        check(add_rms_norm, inputs, [torch.randn(x.shape), torch.ones(1).expand(x.shape)])
        check(lambda **kw: (rms_norm(**kw),), {"x": x, "weight": torch.randn(7)}, [torch.ones(1).expand(x.shape)])


def test_no_rows():
    inputs = {"x": torch.zeros(0, 4), "residual": torch.zeros(0, 4), "weight": torch.ones(4)}
    result = gradients(add_rms_norm, {k: v.to(DEVICE) for k, v in inputs.items()}, [torch.zeros(0, 4, device=DEVICE)] * 2)
    assert result["out0"].shape == (0, 4) and result["d_weight"].abs().max() == 0


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(3, 7, device=DEVICE, requires_grad=True), torch.randn(7, device=DEVICE)
    (alone,) = torch.autograd.grad(rms_norm(x, weight).sum(), x)
    both = torch.autograd.grad(rms_norm(x, weight.requires_grad_()).sum(), [x, weight])
    assert torch.equal(alone, both[0])


@pytest.mark.parametrize("shape", [(2, 3, 7), (4,), (1, 1), (3, 1500), (40, 33)])
def test_swiglu(shape):
    check(lambda **kw: (swiglu(**kw),), {"gate": 4 * torch.randn(shape), "up": torch.randn(shape)}, [torch.randn(shape)])


def test_swiglu_in_bfloat16():
    """Measured in the interpreter, whose stores truncate: 4.3e-3 at most over three seeds."""
    inputs = {"gate": 4 * torch.randn(6, 40), "up": torch.randn(6, 40)}
    actual = check(lambda **kw: (swiglu(**kw),), {k: v.bfloat16() for k, v in inputs.items()}, [torch.randn(6, 40).bfloat16()], 5e-3)
    assert {v.dtype for v in actual.values()} == {torch.bfloat16}


def test_swiglu_of_halves_of_a_fused_matrix():
    gate, up = torch.randn(2, 5, 14).chunk(2, dim=-1)
    check(lambda **kw: (swiglu(**kw),), {"gate": gate, "up": up}, [torch.ones(1).expand(2, 5, 7)])
    assert gate_kernel._rows(gate).data_ptr() == gate.data_ptr() and gate_kernel._rows(up).stride() == (14, 1)  # no copy
    check(lambda **kw: (swiglu(**kw),), {"gate": gate.transpose(0, 1), "up": up.transpose(0, 1)}, [torch.randn(5, 2, 7)])


def test_swiglu_keeps_only_its_inputs_and_saturates():
    gate = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0], device=DEVICE, requires_grad=True)
    up = torch.ones(5, device=DEVICE, requires_grad=True)
    out = swiglu(gate, up)
    saved = out.grad_fn.saved_tensors
    assert len(saved) == 2 and saved[0] is gate and saved[1] is up
    out.sum().backward()
    assert_close(out, torch.tensor([0.0, 0.0, 0.0, 30.0, 200.0], device=DEVICE), 1e-6, "out")
    assert_close(gate.grad, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=DEVICE), 1e-6, "d_gate")
    assert swiglu(gate[:0], up[:0]).shape == (0,)


@pytest.mark.parametrize("function", [add_rms_norm, swiglu])
def test_gradients_are_bitwise_reproducible(function):
    names = ("x", "residual") if function is add_rms_norm else ("gate", "up")
    inputs = {name: torch.randn(40, 33, device=DEVICE) for name in names}
    if function is add_rms_norm:
        inputs["weight"] = torch.randn(33, device=DEVICE)
    call = (lambda **kw: function(**kw)) if function is add_rms_norm else (lambda **kw: (function(**kw),))
    g = [torch.randn(40, 33, device=DEVICE)] * 2
    first, second = gradients(call, inputs, g), gradients(call, inputs, g)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_which_kernel_runs():
    x, weight = torch.randn(2, 3, device=DEVICE, requires_grad=True), torch.ones(3, device=DEVICE)
    assert type(rms_norm(x, weight).grad_fn).__name__ == "_NormBackward"
    assert type(add_rms_norm(x, x, weight)[1].grad_fn).__name__ == "_NormBackward"
    assert swiglu(x, x).grad_fn.name().startswith("_SwiGLU") and "triton" in swiglu.__globals__["pick"]("swiglu", DEVICE).__name__
    assert torch.equal(rms_norm(x.double(), weight), norm_eager.rms_norm(x.double(), weight))


def launches():
    """What the models launch, for `compiled_launches`."""
    for size in (1536, 8192):
        x = torch.zeros(2, size, dtype=torch.bfloat16, requires_grad=True)
        residual, weight = torch.zeros(2, size, requires_grad=True), torch.zeros(size, requires_grad=True)
        normed, total = norm_kernel.add_rms_norm(x, residual, weight)
        torch.autograd.backward([normed, total], [residual, residual])
        norm_kernel.rms_norm(residual, weight).sum().backward()
    gate, up = torch.zeros(64, 8192, dtype=torch.bfloat16, requires_grad=True).chunk(2, dim=-1)
    gate_kernel.swiglu(gate, up).sum().backward()


@pytest.mark.slow
def test_compiles_without_spills():
    compiled = compiled_launches("tests.kernels.test_norm_and_gate_triton")
    assert len(compiled) == 2 * (4 * 2 + 2)
    for c in compiled:
        assert c.shared_bytes <= MAX_SHARED_BYTES[c.capability] and c.stack_bytes == 0, c
