"""RMS norm, alone and behind a residual sum, and SwiGLU: eager against the written-out form, gradients, dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rms_norm import reference as rms_norm_reference
from kernels.swiglu import reference as swiglu_reference
from kernels.swiglu import swiglu
from tests.kernels.support import assert_close, compare, gradients


@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 1), (4,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rms_norm(shape, dtype, tolerance):
    inputs = {"x": 3 * torch.randn(shape, dtype=torch.float64), "weight": torch.randn(shape[-1], dtype=torch.float64)}
    cotangents = [torch.randn(shape, dtype=torch.float64)]
    expected = gradients(lambda **kw: (rms_norm_reference.rms_norm(**kw, eps=1e-2),), inputs, cotangents)
    if shape[-1] == 1:  # x / |x| has almost no gradient; eps keeps it away from cancellation
        tolerance *= 100
    compare(
        gradients(lambda **kw: (rms_norm(**kw, eps=1e-2),), {k: v.to(dtype) for k, v in inputs.items()}, cotangents), expected, tolerance
    )


def test_rms_norm_statistics_are_float32():
    x = (torch.randn(4, 512) * 300).bfloat16()
    weight = torch.rand(512)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = rms_norm(x, weight)
        assert out.dtype == torch.bfloat16
        assert_close(out, rms_norm_reference.rms_norm(x.double(), weight.double()), 3e-3, "out")  # one rounding of the result
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert rms_norm(x.float(), weight).dtype == torch.float32


def test_rms_norm_of_zeros_is_zero():
    assert rms_norm(torch.zeros(2, 3), torch.ones(3)).abs().max() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_add_rms_norm(dtype, tolerance, used):
    """Both results carry gradients, and each alone."""
    inputs = {name: torch.randn(2, 3, 7, dtype=torch.float64) for name in ("x", "residual")}
    cotangents = [torch.randn(2, 3, 7, dtype=torch.float64) for _ in used]
    if used != (1,):
        inputs["weight"] = torch.randn(7, dtype=torch.float64)
    options = {} if "weight" in inputs else {"weight": torch.ones(7, dtype=dtype)}
    pick = lambda results: [results[i] for i in used]  # noqa: E731
    expected = gradients(lambda **kw: pick(rms_norm_reference.add_rms_norm(**kw, **options)), inputs, cotangents)
    actual = gradients(lambda **kw: pick(add_rms_norm(**kw, **options)), {k: v.to(dtype) for k, v in inputs.items()}, cotangents)
    compare(actual, expected, tolerance)


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "expected"),
    [(torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16,) * 3, (torch.float32, torch.bfloat16, torch.float32)],
)
def test_add_rms_norm_equals_its_two_steps_bit_for_bit(x_dtype, residual_dtype, expected):
    x, residual, weight = torch.randn(4, 32).to(x_dtype), torch.randn(4, 32).to(residual_dtype), torch.rand(32)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            normed, total = add_rms_norm(x, residual, weight)
            assert normed.dtype == total.dtype == expected
            assert torch.equal(total, residual + x) and torch.equal(normed, rms_norm(residual + x, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_swiglu(dtype, tolerance):
    inputs = {"gate": 4 * torch.randn(2, 3, 7, dtype=torch.float64), "up": torch.randn(2, 3, 7, dtype=torch.float64)}
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    cotangents = [torch.randn(2, 3, 7).to(dtype)]
    doubled = {k: v.double() for k, v in inputs.items()}
    expected = gradients(lambda **kw: (swiglu_reference.swiglu(**kw),), doubled, cotangents)
    compare(gradients(lambda **kw: (swiglu(**kw),), inputs, cotangents), expected, tolerance)  # bf16: three roundings of 2e-3
    assert_close(swiglu(**doubled), F.silu(doubled["gate"]) * doubled["up"], 1e-12, "torch")


def test_swiglu_keeps_only_its_inputs():
    gate, up = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    saved = swiglu(gate, up).grad_fn.saved_tensors
    assert len(saved) == 2 and saved[0] is gate and saved[1] is up


def test_gradcheck():
    tensors = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, tensors)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, [tensors[0], weight])
    assert torch.autograd.gradcheck(add_rms_norm, [*tensors, weight])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(4,\); expected \(D,\) = \(3,\)"):
        rms_norm(torch.zeros(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"add_rms_norm: residual has shape \(3,\); expected x's shape = \(2, 3\)"):
        add_rms_norm(torch.zeros(2, 3), torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="add_rms_norm: weight has shape"):
        add_rms_norm(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="swiglu: up has shape"):
        swiglu(torch.zeros(2, 3), torch.ones(3))
