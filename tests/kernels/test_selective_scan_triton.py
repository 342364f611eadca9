"""Selective scan, Triton kernels under the interpreter: gradients against the float64 loop, resets, layouts, same bits; and compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.dispatch import force
from kernels.selective_scan import eager, reference, selective_scan, triton_kernel
from tests.kernels.compile_support import CAPABILITIES, MAX_SHARED_BYTES, compiled_launches
from tests.kernels.support import assert_close, compare, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU the interpreter runs the kernels, see tests/conftest.py
pytestmark = pytest.mark.interpret
LOW = ("u", "dt", "B", "C", "z")  # what a mixed-precision model gives in bfloat16


def make(batch=1, length=9, dim=3, states=2, dt_range=(1e-3, 0.1), a_max=16.0):
    """float32 inputs as the model gives them: dt is the raw value before bias and softplus."""
    g = torch.Generator().manual_seed(length + 100 * dim)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    low, high = dt_range
    dt = low * (high / low) ** torch.rand(batch, length, dim, generator=g, dtype=torch.float64)
    bias = 0.1 * normal(dim)
    inputs = {
        "u": normal(batch, length, dim),
        "dt": (dt + torch.log(-torch.expm1(-dt))).float() - bias,  # inverse softplus
        "A": -a_max * torch.rand(dim, states, generator=g),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(dim),
        "z": normal(batch, length, dim),
        "dt_bias": bias,
        "initial_state": normal(batch, dim, states),
    }
    return {k: v.to(DEVICE) for k, v in inputs.items()}, [normal(batch, length, dim).to(DEVICE), normal(batch, dim, states).to(DEVICE)]


def bound(function, start=None, softplus=True):
    return lambda **inputs: function(**inputs, dt_softplus=softplus, document_start=start)


def expected_of(inputs, cotangents, start=None, softplus=True):
    doubled = {k: v.double() for k, v in inputs.items()}
    return gradients(bound(reference.selective_scan, start, softplus), doubled, cotangents)


def check(inputs, cotangents, start=None, softplus=True, tolerance=1e-5):
    """fp32 errors measured over all tests of this file: at most 1e-6."""
    actual = gradients(bound(triton_kernel.selective_scan, start, softplus), inputs, cotangents)
    compare(actual, expected_of(inputs, cotangents, start, softplus), tolerance)


@pytest.fixture
def small_tiles(monkeypatch):
    """Four channels a tile at N <= 4, and a state kept every 8 steps, so that small shapes reach every edge."""
    monkeypatch.setattr(triton_kernel, "_TILE_ELEMENTS", 16)
    monkeypatch.setattr(triton_kernel, "_KEPT_GROUPS", 2)


# A group is 4 steps, the state is kept every 8: less than a group, one, one more, an odd end after a kept state.
@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_lengths(small_tiles, length):
    check(*make(length=length, states=3))


@pytest.mark.parametrize(("batch", "dim", "states"), [(2, 5, 4), (1, 1, 1)])
def test_shapes_that_no_tile_divides(small_tiles, batch, dim, states):
    check(*make(batch=batch, length=4, dim=dim, states=states))


def test_tiles_as_on_a_gpu():
    check(*make(length=17, dim=5, states=6))


@pytest.mark.parametrize("dt_range", [(1e-4, 1e-3), (1e-3, 0.1), (0.5, 5.0)])
def test_step_sizes_and_decays(dt_range):
    check(*make(length=8, dim=8, dt_range=dt_range, a_max=64.0))


def test_softplus_keeps_small_and_large_steps():
    raw = torch.tensor([-60.0, -30, -15, -8, -2, -1e-3, 0, 1e-3, 0.7, 5, 19.9, 20.1, 80, 1e4], device=DEVICE)
    one = torch.ones(1, len(raw), 1, device=DEVICE)
    zero = torch.zeros(1, 1, device=DEVICE)
    starts = torch.ones(1, len(raw), dtype=torch.bool, device=DEVICE)  # every position alone: y = dt
    y, _ = triton_kernel.selective_scan(one, raw.view(1, -1, 1), zero, one, one, dt_softplus=True, document_start=starts)
    wanted = torch.nn.functional.softplus(raw.double())
    assert ((y.flatten().double() - wanted).abs() <= 1e-5 * wanted).all()  # measured: at most 2.2e-6, the rounding of e^-60's exponent


@pytest.mark.parametrize("left_out", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias", "initial_state")])
def test_optional_arguments(left_out):
    inputs, cotangents = make(length=6)
    check({k: v for k, v in inputs.items() if k not in left_out}, cotangents)


def test_step_sizes_without_softplus():
    inputs, cotangents = make(length=6)
    inputs["dt"] = inputs["dt"].exp()
    check(inputs, cotangents, softplus=False)


@pytest.mark.parametrize(("batch", "first"), [(1, [0, 8]), (2, [1, 3, 4, 7])])
def test_document_starts(small_tiles, batch, first):
    """At index 0 (drops the initial state), inside and at the edges of groups and kept states, one after another; in one row only."""
    inputs, cotangents = make(batch=batch)
    start = torch.zeros(batch, 9, dtype=torch.bool, device=DEVICE)
    start[0, first] = True
    check(inputs, cotangents, start)


@pytest.mark.parametrize(("bad", "first"), [(float("inf"), 3), (float("nan"), 8)])
def test_infinity_and_nan_stay_in_their_document(small_tiles, bad, first):
    """Values and gradients of the document after, and the final state."""
    inputs, cotangents = make(length=10)
    inputs["u"][0, first - 1] = bad
    start = torch.zeros(1, 10, dtype=torch.bool, device=DEVICE)
    start[0, first] = True
    cotangents[0][0, :first] = 0
    expected = expected_of(inputs, cotangents, start)
    actual = gradients(bound(triton_kernel.selective_scan, start), inputs, cotangents)
    assert not actual["out0"][0, first - 1].isfinite().any()
    for name in ("out0", "d_u", "d_dt", "d_B", "d_C", "d_z"):
        assert expected[name][0, first:].isfinite().all(), name
        assert_close(actual[name][0, first:], expected[name][0, first:], 1e-5, name)
    assert_close(actual["out1"], expected["out1"], 1e-5, "state")


def test_a_dropped_state_may_hold_anything():
    inputs, cotangents = make(length=3)
    inputs["initial_state"].fill_(float("nan"))
    start = torch.tensor([[True, False, False]], device=DEVICE)
    check(inputs, cotangents, start)
    with torch.no_grad():
        one = {k: v[:, :1] if k in LOW else v for k, v in inputs.items()}
        step = triton_kernel.selective_scan(**one, dt_softplus=True, document_start=start[:, :1])
    assert step[0].isfinite().all() and step[1].isfinite().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_of_a_document_do_not_reach_the_one_before(small_tiles, bad):
    inputs, cotangents = make(length=9)
    start = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    start[:, 6] = True
    cotangents[0][:, 7] = bad
    expected = expected_of(inputs, cotangents, start)
    actual = gradients(bound(triton_kernel.selective_scan, start), inputs, cotangents)
    for name in ("d_u", "d_dt", "d_B", "d_C", "d_z"):
        assert expected[name][:, :6].isfinite().all(), name
        assert_close(actual[name][:, :6], expected[name][:, :6], 1e-5, name)
    assert_close(actual["d_initial_state"], expected["d_initial_state"], 1e-5, "d_initial_state")


def test_pieces_that_carry_the_state_equal_the_whole():
    inputs, cotangents = make(length=9)
    start = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    start[0, 6] = True

    def in_pieces(initial_state, **tensors):
        state, pieces = initial_state, []
        for first, end in ((0, 5), (5, 6), (6, 9)):
            part = {k: v[:, first:end] if k in LOW else v for k, v in tensors.items()}
            y, state = triton_kernel.selective_scan(**part, dt_softplus=True, initial_state=state, document_start=start[:, first:end])
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    compare(gradients(in_pieces, inputs, cotangents), expected_of(inputs, cotangents, start), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    inputs, cotangents = make(length=7)
    low = {k: v.to(dtype) if k in LOW else v for k, v in inputs.items()}
    cotangents[0] = cotangents[0].to(dtype).float()
    actual = gradients(bound(triton_kernel.selective_scan), low, cotangents)
    assert actual["out0"].dtype == dtype and actual["out1"].dtype == torch.float32
    assert actual["d_u"].dtype == actual["d_B"].dtype == dtype and actual["d_A"].dtype == torch.float32
    compare(actual, expected_of(low, cotangents), 5e-3)  # measured: 2.6e-3 bfloat16, 3e-4 float16; one rounding of the result


def test_halves_of_a_projection_and_an_expanded_cotangent():
    inputs, _ = make(batch=2, length=3)
    inputs["u"], inputs["z"] = torch.cat([inputs["u"], inputs["z"]], dim=2).chunk(2, dim=2)
    inputs["B"], inputs["C"] = torch.cat([inputs["B"], inputs["C"]], dim=2).chunk(2, dim=2)
    inputs["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["A"] = inputs["A"].t().contiguous().t()
    ones = torch.ones((), device=DEVICE)
    check(inputs, [ones.expand(2, 3, 3), ones.expand(2, 3, 2)])
    assert triton_kernel.selective_scan(**inputs, dt_softplus=True)[0].is_contiguous()


def test_two_runs_give_the_same_bits(small_tiles):
    inputs, cotangents = make(length=5, dim=5)
    once, again = (gradients(bound(triton_kernel.selective_scan), inputs, cotangents) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("length", [1, 6])
def test_without_gradients_nothing_is_kept_and_the_result_is_the_same(monkeypatch, length):
    inputs, _ = make(batch=2, length=length)
    inputs["A"].requires_grad_()
    expected = triton_kernel.selective_scan(**inputs, dt_softplus=True)
    kept = []
    forward = triton_kernel._forward
    monkeypatch.setattr(triton_kernel, "_forward", lambda *args, **kw: kept.append(forward(*args, **kw)) or kept[-1])
    with torch.no_grad():
        actual = triton_kernel.selective_scan(**inputs, dt_softplus=True)
    assert kept[0][2] is None and actual[0].grad_fn is None and expected[0].grad_fn is not None
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_only_some_inputs_need_gradients():
    inputs, cotangents = make(length=5)
    inputs["u"].requires_grad_()
    y, _ = triton_kernel.selective_scan(**inputs, dt_softplus=True)
    y.backward(cotangents[0])
    zero = [cotangents[0], torch.zeros_like(cotangents[1])]
    assert_close(inputs["u"].grad, expected_of(inputs, zero)["d_u"], 1e-5, "d_u")
    assert inputs["A"].grad is None


def test_the_public_function_dispatches_here():
    inputs, cotangents = make(length=5)
    with force("triton", op="selective_scan"):
        through = gradients(bound(selective_scan), inputs, cotangents)
    direct = gradients(bound(triton_kernel.selective_scan), inputs, cotangents)
    assert all(torch.equal(through[name], direct[name]) for name in direct)


def test_float64_runs_in_eager():
    inputs, _ = make(length=5)
    doubled = {k: v.double() for k, v in inputs.items()}
    for actual, expected in zip(triton_kernel.selective_scan(**doubled), eager.selective_scan(**doubled)):
        assert actual.dtype == torch.float64 and torch.equal(actual, expected)


def test_too_many_states():
    inputs, _ = make(length=2, states=257)
    with pytest.raises(ValueError, match="A has N = 257 states; the Triton kernels take at most 256"):
        triton_kernel.selective_scan(**inputs)


def launches() -> None:
    """What `compile_support` compiles: training in both precisions, with and without resets and options; decoding; odd and large N."""
    for dtype, states, dim, options in [
        (torch.bfloat16, 16, 32, ("D", "z", "dt_bias", "initial_state", "start")),
        (torch.bfloat16, 16, 32, ("D", "z", "dt_bias")),
        (torch.float32, 16, 32, ()),
        (torch.float16, 5, 7, ("D", "z", "start")),
        (torch.float32, 256, 3, ("initial_state",)),
    ]:
        inputs, _ = make(length=20, dim=dim, states=states)
        optional = {"D", "z", "dt_bias", "initial_state"} - set(options)
        inputs = {k: v.to(dtype) if k in LOW else v for k, v in inputs.items() if k not in optional}
        start = torch.zeros(1, 20, dtype=torch.bool) if "start" in options else None
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        y, state = triton_kernel.selective_scan(**leaves, dt_softplus=True, document_start=start)
        (y.float().sum() + state.sum()).backward()
        with torch.no_grad():
            one = {k: v[:, :1] if k in LOW else v for k, v in inputs.items()}
            triton_kernel.selective_scan(**one, dt_softplus=True, document_start=None if start is None else start[:, :1])


@pytest.mark.slow
def test_kernels_compile_for_gpus():
    """30 to 90 s of one core without a compiler cache. Spilling: see `_BACKWARD_REGISTERS`."""
    compiled = compiled_launches("tests.kernels.test_selective_scan_triton")
    assert {c.capability for c in compiled} == set(CAPABILITIES)
    assert {c.kernel for c in compiled} == {"forward_kernel", "backward_kernel"}
    for c in compiled:
        assert c.shared_bytes <= MAX_SHARED_BYTES[c.capability] // 16, c  # 16 programs of a warp at a time
        assert c.stack_bytes == 0 if c.kernel == "forward_kernel" else c.stack_bytes <= 512, c
