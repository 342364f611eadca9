"""Causal convolution, Triton kernels under the interpreter: gradients against the float64 loops, state, resets, same bits; and compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.causal_conv1d import causal_conv1d, eager, reference, triton_kernel
from kernels.dispatch import force
from tests.kernels.compile_support import CAPABILITIES, MAX_SHARED_BYTES, compiled_launches
from tests.kernels.support import assert_close, compare, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU the interpreter runs the kernels, see tests/conftest.py

pytestmark = pytest.mark.interpret


def make(batch=1, length=9, dim=3, width=4):
    g = torch.Generator().manual_seed(length + 100 * dim)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE)  # noqa: E731
    inputs = {
        "x": normal(batch, length, dim),
        "weight": normal(dim, width),
        "bias": normal(dim),
        "initial_state": normal(batch, width - 1, dim),
    }
    return inputs, [normal(batch, length, dim), normal(batch, width - 1, dim)]


def bound(function, activation="silu", start=None, outputs=2):
    return lambda **inputs: function(**inputs, activation=activation, document_start=start)[:outputs]


def expected_of(inputs, cotangents, activation="silu", start=None, outputs=2):
    return gradients(bound(reference.causal_conv1d, activation, start, outputs), {k: v.double() for k, v in inputs.items()}, cotangents)


def check(inputs, cotangents, activation="silu", start=None, outputs=2, tolerance=1e-5):
    """fp32 errors measured over all tests of this file: at most 3e-7."""
    actual = gradients(bound(triton_kernel.causal_conv1d, activation, start, outputs), inputs, cotangents)
    compare(actual, expected_of(inputs, cotangents, activation, start, outputs), tolerance)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 positions and 4 channels, two tiles a program of the backward, so that small shapes reach every edge."""
    for name, size in (("_FORWARD_TIME", 4), ("_BACKWARD_TIME", 4), ("_CHANNELS", 4), ("_ROUNDS", 2)):
        monkeypatch.setattr(triton_kernel, name, size)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 13])
def test_lengths(small_tiles, length):
    check(*make(length=length))


def test_several_rows_and_channels_that_no_tile_divides(small_tiles):
    check(*make(batch=2, length=6, dim=5))


def test_tiles_as_on_a_gpu():
    check(*make(length=40, dim=12))


def test_without_activation():
    check(*make(), activation=None)


@pytest.mark.parametrize(("width", "resets"), [(1, True), (2, True), (3, False), (5, True)])
def test_other_widths(width, resets):
    inputs, cotangents = make(width=width, length=7)
    start = torch.zeros(1, 7, dtype=torch.bool, device=DEVICE)
    start[0, [2, 3, 6]] = True
    if width == 1:
        inputs.pop("initial_state")
    check(inputs, cotangents, start=start if resets else None, outputs=1 if width == 1 else 2)


def test_width_one_has_an_empty_state():
    inputs, _ = make(width=1)
    assert triton_kernel.causal_conv1d(**inputs)[1].shape == (1, 0, 3)


@pytest.mark.parametrize("left_out", [("bias",), ("initial_state",), ("bias", "initial_state")])
def test_optional_arguments(left_out):
    inputs, cotangents = make(length=6)
    check({k: v for k, v in inputs.items() if k not in left_out}, cotangents)


@pytest.mark.parametrize("first", [[0, 1, 8], [3, 4, 7]])
def test_document_starts(small_tiles, first):
    """At index 0 (drops the state), at the edges of tiles, one after another, inside the last three positions; and in one row only."""
    inputs, cotangents = make(batch=2)
    start = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    start[0, first] = True
    check(inputs, cotangents, start=start)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinity_and_nan_stay_in_their_document(small_tiles, bad):
    """Values, state and gradients, both ways."""
    inputs, cotangents = make(batch=2, length=7)
    inputs["x"][0, 3], cotangents[0][0, :4], cotangents[0][1, 4] = bad, 0, bad
    start = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)
    start[:, 4] = True
    expected = expected_of(inputs, cotangents, start=start)
    actual = gradients(bound(triton_kernel.causal_conv1d, start=start), inputs, cotangents)
    assert not actual["out0"][0, 3].isfinite().all()
    for name, row, part in (("out0", 0, slice(4, 7)), ("d_x", 0, slice(4, 7)), ("out1", 0, slice(0, 3)), ("d_x", 1, slice(0, 4))):
        assert expected[name][row, part].isfinite().all(), name
        assert_close(actual[name][row, part], expected[name][row, part], 1e-5, name)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_dropped_state_may_hold_anything(bad):
    inputs, cotangents = make(length=5)
    inputs["initial_state"].fill_(bad)
    start = torch.zeros(1, 5, dtype=torch.bool, device=DEVICE)
    start[:, 0] = True
    check(inputs, cotangents, start=start)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4)])
def test_pieces_that_carry_the_state_equal_the_whole(sizes):
    length = sum(sizes)
    inputs, cotangents = make(length=length)
    start = torch.zeros(1, length, dtype=torch.bool, device=DEVICE)
    start[0, length - 2] = True

    def in_pieces(x, initial_state, weight, bias):
        state, pieces = initial_state, []
        for part, mask in zip(x.split(sizes, dim=1), start.split(sizes, dim=1)):
            y, state = triton_kernel.causal_conv1d(part, weight, bias, "silu", state, mask)
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    compare(gradients(in_pieces, inputs, cotangents), expected_of(inputs, cotangents, start=start), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    inputs, cotangents = make()
    low = {k: v.to(dtype) if k in ("x", "initial_state") else v for k, v in inputs.items()}
    cotangents = [c.to(dtype).float() for c in cotangents]
    actual = gradients(bound(triton_kernel.causal_conv1d), low, cotangents)
    assert actual["out0"].dtype == actual["out1"].dtype == actual["d_x"].dtype == dtype and actual["d_weight"].dtype == torch.float32
    compare(actual, expected_of(low, cotangents), 5e-3)  # one rounding of the result: measured 2.5e-3 bfloat16, 3e-4 float16


def test_half_of_a_projection_and_an_expanded_cotangent():
    inputs, _ = make(length=6)
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], dim=2)[..., :3]
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    one = torch.ones((), device=DEVICE)
    check(inputs, [one.expand(1, 6, 3), one.expand(1, 3, 3)])
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs, [one.expand(1, 6, 3), one.expand(1, 3, 3)])


def test_two_runs_give_the_same_bits(small_tiles):
    inputs, cotangents = make()
    once, again = (gradients(bound(triton_kernel.causal_conv1d), inputs, cotangents) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("length", [1, 6])
def test_without_gradients(length):
    inputs, _ = make(length=length)
    inputs["weight"].requires_grad_()
    expected = triton_kernel.causal_conv1d(**inputs, activation="silu")
    with torch.no_grad():
        actual = triton_kernel.causal_conv1d(**inputs, activation="silu")
    assert actual[0].grad_fn is None and expected[0].grad_fn is not None
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_the_public_function_dispatches_here():
    inputs, cotangents = make(length=5)
    with force("triton", op="causal_conv1d"):
        through = gradients(bound(causal_conv1d), inputs, cotangents)
    direct = gradients(bound(triton_kernel.causal_conv1d), inputs, cotangents)
    assert all(torch.equal(through[name], direct[name]) for name in direct)


def test_float64_runs_in_eager():
    inputs, _ = make(length=5)
    doubled = {k: v.double() for k, v in inputs.items()}
    for actual, expected in zip(triton_kernel.causal_conv1d(**doubled), eager.causal_conv1d(**doubled)):
        assert actual.dtype == torch.float64 and torch.equal(actual, expected)


def launches() -> None:
    """What `compile_support` compiles: both precisions, with and without state, bias, activation and resets; one position; odd sizes."""
    for dtype, length, dim, width, left_out, activation, resets in [
        (torch.bfloat16, 200, 64, 4, (), "silu", True),
        (torch.bfloat16, 200, 64, 4, ("initial_state",), "silu", False),
        (torch.float32, 200, 64, 4, ("bias", "initial_state"), None, False),
        (torch.float16, 1, 7, 3, (), "silu", True),
        (torch.float32, 5, 7, 1, ("initial_state",), "silu", True),
    ]:
        inputs, _ = make(length=length, dim=dim, width=width)
        leaves = {k: v.to(dtype).requires_grad_() for k, v in inputs.items() if k not in left_out}
        start = torch.zeros(1, length, dtype=torch.bool) if resets else None
        y, state = triton_kernel.causal_conv1d(**leaves, activation=activation, document_start=start)
        (y.float().sum() + state.float().sum()).backward()


@pytest.mark.slow
def test_kernels_compile_for_gpus():
    """20 to 60 s of one core without a compiler cache."""
    compiled = compiled_launches("tests.kernels.test_causal_conv1d_triton")
    assert {c.capability for c in compiled} == set(CAPABILITIES)
    assert {c.kernel for c in compiled} == {"_forward_kernel", "_backward_kernel"}
    for c in compiled:
        assert c.shared_bytes <= MAX_SHARED_BYTES[c.capability] // 8, c  # 8 programs at a time
        assert c.registers <= 200 and c.stack_bytes <= 16, c  # measured: up to 172 and 8
