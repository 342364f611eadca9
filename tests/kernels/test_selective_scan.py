"""Selective scan: eager against the float64 loop, every gradient, carried states, document resets, autocast, checkpoint and compile."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import force
from kernels.selective_scan import eager, reference, selective_scan
from tests.kernels.support import assert_close, compare, gradients


def make(batch=2, length=37, dim=6, states=4, dtype=torch.float64, dt_range=(1e-3, 0.1), a_max=16.0, seed=0):
    """Inputs as the model gives them: dt is the raw value before bias and softplus."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    low, high = dt_range
    dt = low * (high / low) ** torch.rand(batch, length, dim, generator=g, dtype=torch.float64)
    raw = dt + torch.log(-torch.expm1(-dt))  # inverse softplus
    bias = 0.1 * normal(dim)
    inputs = {
        "u": normal(batch, length, dim),
        "dt": raw - bias,
        "A": -a_max * torch.rand(dim, states, generator=g, dtype=torch.float64),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(dim),
        "z": normal(batch, length, dim),
        "dt_bias": bias,
        "initial_state": normal(batch, dim, states),
    }
    cotangents = [normal(batch, length, dim), normal(batch, dim, states)]
    return {k: v.to(dtype) for k, v in inputs.items()}, cotangents


def with_softplus(function, start=None):
    return lambda **inputs: function(**inputs, dt_softplus=True, document_start=start)


# Longest chunk is 32 steps: one chunk, exact multiples, one more and one less, odd ends.
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 101])
def test_float64_matches_the_loop(length):
    inputs, cotangents = make(length=length)
    expected = gradients(with_softplus(reference.selective_scan), inputs, cotangents)
    compare(gradients(with_softplus(eager.selective_scan), inputs, cotangents), expected, 1e-12)


@pytest.mark.parametrize("dt_range", [(1e-4, 1e-3), (1e-3, 0.1), (0.5, 5.0)])
def test_float32_matches_the_float64_loop(dt_range):
    inputs, cotangents = make(length=77, dim=10, dt_range=dt_range, a_max=64.0, dtype=torch.float32)
    doubled = {k: v.double() for k, v in inputs.items()}
    expected = gradients(with_softplus(reference.selective_scan), doubled, cotangents)
    compare(gradients(with_softplus(eager.selective_scan), inputs, cotangents), expected, 1e-5)  # measured: at most 1e-6


def test_small_chunks_change_nothing(monkeypatch):
    inputs, cotangents = make(length=23)
    whole = gradients(with_softplus(eager.selective_scan), inputs, cotangents)
    for steps in (1, 2, 5):
        monkeypatch.setattr(eager, "_chunk_steps", lambda length, state_bytes, steps=steps: min(length, steps))
        compare(gradients(with_softplus(eager.selective_scan), inputs, cotangents), whole, 1e-13)


@pytest.mark.parametrize("every", [2, 3, 7, 12, 100])
def test_states_kept_at_some_chunks_only_change_nothing(monkeypatch, every):
    """23 chunks of 1 step or 12 of 2: groups that divide them, that leave a rest, and one group of all."""
    inputs, cotangents = make(length=23)
    start = torch.rand(2, 23) < 0.2
    whole = gradients(with_softplus(eager.selective_scan, start), inputs, cotangents)
    monkeypatch.setattr(eager, "_kept_every", lambda chunks, state_bytes: every)
    for steps in (1, 2):
        monkeypatch.setattr(eager, "_chunk_steps", lambda length, state_bytes, steps=steps: min(length, steps))
        compare(gradients(with_softplus(eager.selective_scan, start), inputs, cotangents), whole, 1e-13)


def test_bytes_kept_for_the_backward_grow_with_the_root_of_the_length():
    mebibyte = 1 << 20
    assert eager._kept_every(13, mebibyte // 5) == 1  # a row of the small run: as fast as memory allows
    state = 4 * 8 * 16 * 3072  # B=8 N=16 D=3072: 1.5 MiB
    chunks = 4096 // eager._chunk_steps(4096, state)
    every = eager._kept_every(chunks, state)
    assert (chunks / every + every) * state < 100 * mebibyte < chunks * state / 15
    assert every * eager._chunk_steps(4096, state) >= 16


def test_kept_states_are_what_the_rule_says(monkeypatch):
    """Counted on the graph: of 32 chunks of 4 steps, 32 states below the limit, 6 above it."""
    inputs, _ = make(length=128, dtype=torch.float32)
    inputs["u"].requires_grad_()
    monkeypatch.setattr(eager, "_chunk_steps", lambda length, state_bytes: 4)
    for limit, expected in ((1 << 26, 32), (100, 6)):
        monkeypatch.setattr(eager, "_MAX_KEPT_BYTES", limit)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, shapes=shapes: shapes.append(tuple(t.shape)), lambda x: x):
            eager.selective_scan(**inputs, dt_softplus=True)
        assert (expected, 2, 4, 6) in shapes


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("first", [1, 4, 7, 8])
def test_infinity_and_nan_stay_in_their_document(monkeypatch, bad, first):
    """As in the specification, values and gradients; the second document starts inside and at the edges of chunks of 4 steps."""
    monkeypatch.setattr(eager, "_chunk_steps", lambda length, state_bytes: min(length, 4))
    inputs, cotangents = make(length=11)
    inputs["u"][0, first - 1] = bad
    start = torch.zeros(2, 11, dtype=torch.bool)
    start[0, first] = True
    cotangents[0][0, :first] = 0
    expected = gradients(with_softplus(reference.selective_scan, start), inputs, cotangents)
    actual = gradients(with_softplus(eager.selective_scan, start), inputs, cotangents)
    for name in ("out0", "d_u", "d_dt", "d_B", "d_C", "d_z"):
        assert expected[name][0, first:].isfinite().all(), name
        assert_close(actual[name][0, first:], expected[name][0, first:], 1e-12, name)
        assert_close(actual[name][1], expected[name][1], 1e-12, name)
    assert_close(actual["out1"], expected["out1"], 1e-12, "state")


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_of_a_document_do_not_reach_the_one_before(bad):
    inputs, cotangents = make(length=11)
    start = torch.zeros(2, 11, dtype=torch.bool)
    start[:, 6] = True
    cotangents[0][:, 8] = bad
    expected = gradients(with_softplus(reference.selective_scan, start), inputs, cotangents)
    actual = gradients(with_softplus(eager.selective_scan, start), inputs, cotangents)
    for name in ("d_u", "d_dt", "d_B", "d_C", "d_z"):
        assert expected[name][:, :6].isfinite().all(), name
        assert_close(actual[name][:, :6], expected[name][:, :6], 1e-12, name)
    assert_close(actual["d_initial_state"], expected["d_initial_state"], 1e-12, "d_initial_state")


def test_decode_step_drops_an_infinite_state():
    inputs, _ = make(length=1)
    inputs["initial_state"].fill_(float("inf"))
    start = torch.ones(2, 1, dtype=torch.bool)
    expected = reference.selective_scan(**inputs, dt_softplus=True, document_start=start)
    for actual, wanted in zip(selective_scan(**inputs, dt_softplus=True, document_start=start), expected):
        assert_close(actual, wanted, 1e-12, "step")


@pytest.mark.parametrize("left_out", [(), ("z",), ("z", "D")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_y_is_contiguous(left_out, dtype):
    inputs, _ = make(dtype=torch.float32)
    inputs = {k: v.to(dtype) if k in ("u", "dt", "B", "C", "z") else v for k, v in inputs.items() if k not in left_out}
    assert selective_scan(**inputs, dt_softplus=True)[0].is_contiguous()


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state"])
def test_optional_arguments(left_out):
    inputs, cotangents = make(length=19)
    del inputs[left_out]
    expected = gradients(with_softplus(reference.selective_scan), inputs, cotangents)
    compare(gradients(with_softplus(eager.selective_scan), inputs, cotangents), expected, 1e-12)


def test_only_some_inputs_need_gradients():
    inputs, cotangents = make(length=9)
    inputs["u"].requires_grad_()
    y, _ = eager.selective_scan(**inputs, dt_softplus=True)
    y.backward(cotangents[0])
    assert inputs["u"].grad is not None and inputs["A"].grad is None


def test_gradcheck():
    inputs, _ = make(batch=1, length=5, dim=3, states=4)
    names = list(inputs)
    start = torch.tensor([[False, False, True, False, False]])
    for mask in (None, start):
        function = lambda *tensors, mask=mask: eager.selective_scan(**dict(zip(names, tensors)), dt_softplus=True, document_start=mask)  # noqa: E731
        assert torch.autograd.gradcheck(function, [v.clone().requires_grad_() for v in inputs.values()])


def test_softplus_is_linear_above_20_and_optional():
    inputs, cotangents = make(length=5)
    inputs["dt"][:, 2] = 25.0
    inputs["A"] *= 1e-2
    expected = gradients(with_softplus(reference.selective_scan), inputs, cotangents)
    compare(gradients(with_softplus(eager.selective_scan), inputs, cotangents), expected, 1e-12)
    inputs["dt"] = inputs["dt"].abs() * 0.01
    compare(gradients(eager.selective_scan, inputs, cotangents), gradients(reference.selective_scan, inputs, cotangents), 1e-12)


def test_final_state_carries_gradients_alone():
    inputs, cotangents = make(length=40)
    zero = [torch.zeros_like(cotangents[0]), cotangents[1]]
    expected = gradients(with_softplus(reference.selective_scan), inputs, zero)
    assert expected["d_initial_state"].abs().max() > 0
    compare(gradients(with_softplus(eager.selective_scan), inputs, zero), expected, 1e-12)


@pytest.mark.parametrize("cut", [1, 16, 36])
def test_two_calls_that_carry_the_state_equal_one(cut):
    inputs, cotangents = make(length=37)

    def in_two(**whole):
        first = {k: v[:, :cut] if k in ("u", "dt", "B", "C", "z") else v for k, v in whole.items()}
        second = {k: v[:, cut:] if k in ("u", "dt", "B", "C", "z") else v for k, v in whole.items()}
        y1, second["initial_state"] = eager.selective_scan(**first, dt_softplus=True)
        y2, state = eager.selective_scan(**second, dt_softplus=True)
        return torch.cat([y1, y2], dim=1), state

    expected = gradients(with_softplus(eager.selective_scan), inputs, cotangents)
    compare(gradients(in_two, inputs, cotangents), expected, 1e-12)


def test_document_start_equals_separate_documents():
    inputs, cotangents = make(batch=2, length=50)
    starts = [[0, 7, 8, 33], [20]]  # a document of one token, a start at index 0 (drops the initial state), different rows
    mask = torch.zeros(2, 50, dtype=torch.bool)
    for row, places in enumerate(starts):
        mask[row, places] = True

    def separately(**whole):
        rows, states = [], []
        for row, places in enumerate(starts):
            bounds = sorted({0, *places, 50})
            state, pieces = whole["initial_state"][row : row + 1], []
            for first, end in pairwise(bounds):
                part = {k: v[row : row + 1, first:end] if k in ("u", "dt", "B", "C", "z") else v for k, v in whole.items()}
                part["initial_state"] = torch.zeros_like(state) if mask[row, first] else state
                y, state = reference.selective_scan(**part, dt_softplus=True)
                pieces.append(y)
            rows.append(torch.cat(pieces, dim=1))
            states.append(state)
        return torch.cat(rows), torch.cat(states)

    expected = gradients(separately, inputs, cotangents)
    compare(gradients(with_softplus(eager.selective_scan, mask), inputs, cotangents), expected, 1e-12)
    compare(gradients(with_softplus(reference.selective_scan, mask), inputs, cotangents), expected, 1e-12)


def test_reset_holds_for_a_state_that_does_not_decay():
    inputs, _ = make(length=3)
    inputs["A"] = torch.zeros_like(inputs["A"])
    inputs["initial_state"] *= 1e6
    start = torch.tensor([[True, False, False]] * 2)
    with_state, _ = eager.selective_scan(**inputs, dt_softplus=True, document_start=start)
    inputs["initial_state"].zero_()
    without, _ = eager.selective_scan(**inputs, dt_softplus=True)
    torch.testing.assert_close(with_state, without, rtol=0, atol=0)


@pytest.mark.parametrize("with_state", [True, False])
def test_decode_step_equals_the_sequence(with_state):
    inputs, _ = make(length=6, dtype=torch.float32)
    given = inputs.pop("initial_state")
    state = given if with_state else None
    start = torch.zeros(2, 6, dtype=torch.bool)
    start[1, 3] = True
    y, final = selective_scan(**inputs, dt_softplus=True, initial_state=state, document_start=start)
    outputs = []
    with torch.no_grad():
        for t in range(6):
            step = {k: v[:, t : t + 1] if k in ("u", "dt", "B", "C", "z") else v for k, v in inputs.items()}
            out, state = selective_scan(**step, dt_softplus=True, initial_state=state, document_start=start[:, t : t + 1])
            outputs.append(out)
    assert_close(torch.cat(outputs, dim=1), y, 1e-6, "y")
    assert_close(state, final, 1e-6, "state")


def test_non_contiguous_inputs():
    inputs, cotangents = make(length=21)
    strided = {k: v.transpose(-1, 0).contiguous().transpose(-1, 0) if v.dim() > 1 else v for k, v in inputs.items()}
    assert not strided["u"].is_contiguous()
    expected = gradients(with_softplus(eager.selective_scan), inputs, cotangents)
    actual = gradients(with_softplus(eager.selective_scan), strided, [c.transpose(0, 1).contiguous().transpose(0, 1) for c in cotangents])
    compare(actual, expected, 1e-13)


def test_bfloat16_inputs_keep_a_float32_state():
    inputs, cotangents = make(length=45, dtype=torch.float32)
    low = {k: v.bfloat16() if k in ("u", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    rounded = {k: v.float() for k, v in low.items()}
    expected = gradients(with_softplus(reference.selective_scan), rounded, [c.bfloat16().float() for c in cotangents])
    actual = gradients(with_softplus(eager.selective_scan), low, cotangents)
    assert actual["out0"].dtype == torch.bfloat16 and actual["out1"].dtype == torch.float32
    assert actual["d_u"].dtype == torch.bfloat16 and actual["d_A"].dtype == torch.float32
    compare(actual, expected, 5e-3)  # one bf16 rounding of the result is 2^-9 = 2e-3 a value


def test_autocast_does_not_touch_the_arithmetic():
    inputs, cotangents = make(length=20, dtype=torch.float32)
    expected = gradients(with_softplus(selective_scan), inputs, cotangents)

    def inside(**leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return selective_scan(**leaves, dt_softplus=True)

    compare(gradients(inside, inputs, cotangents), expected, 0.0)
    inputs["u"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward inside too
        y, _ = selective_scan(**inputs, dt_softplus=True)
        y.backward(cotangents[0].float())
    zero = [cotangents[0], torch.zeros_like(cotangents[1])]
    assert_close(inputs["u"].grad, gradients(with_softplus(selective_scan), inputs, zero)["d_u"], 0.0, "d_u")


def test_activation_checkpointing():
    inputs, cotangents = make(length=20)
    names = list(inputs)

    def recomputed(**leaves):
        run = lambda *tensors: selective_scan(**dict(zip(names, tensors)), dt_softplus=True)  # noqa: E731
        return checkpoint(run, *leaves.values(), use_reentrant=False)

    expected = gradients(with_softplus(selective_scan), inputs, cotangents)
    compare(gradients(recomputed, inputs, cotangents), expected, 0.0)


@pytest.mark.slow
def test_compile_keeps_the_scan_whole():
    inputs, cotangents = make(length=20, dtype=torch.float32)
    around = lambda **leaves: tuple(out * 2.0 for out in selective_scan(**leaves, dt_softplus=True))  # noqa: E731
    compiled = torch.compile(around, backend="aot_eager")
    compare(gradients(compiled, inputs, cotangents), gradients(around, inputs, cotangents), 1e-6)


def test_no_gradients_are_kept_without_need():
    inputs, _ = make(length=8)
    y, state = selective_scan(**inputs, dt_softplus=True)
    assert y.grad_fn is None and state.grad_fn is None


def test_forced_reference_runs_through_the_public_function():
    inputs, _ = make(length=8)
    with force("reference"):
        y, state = selective_scan(**inputs, dt_softplus=True)
    expected_y, expected_state = reference.selective_scan(**inputs, dt_softplus=True)
    assert torch.equal(y, expected_y) and torch.equal(state, expected_state)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("u", torch.zeros(2, 37), r"selective_scan: u is torch.float32 \(2, 37\); expected floating point \(B, L, D\)"),
        ("u", torch.zeros(2, 0, 6), "without empty dimensions"),
        ("dt", torch.zeros(2, 36, 6), r"selective_scan: dt has shape \(2, 36, 6\); expected \(B, L, D\) = \(2, 37, 6\)"),
        ("A", torch.zeros(5, 4), r"A has shape \(5, 4\); expected \(D, N\) = \(6, 4\)"),
        ("B", torch.zeros(2, 37, 3), "B has shape"),
        ("D", torch.zeros(7), "D has shape"),
        ("initial_state", torch.zeros(2, 4, 6), "initial_state has shape"),
        ("document_start", torch.zeros(2, 37), "document_start is torch.float32; expected torch.bool"),
        ("document_start", torch.zeros(2, 36, dtype=torch.bool), "document_start has shape"),
    ],
)
def test_bad_arguments(name, bad, message):
    inputs, _ = make()
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, name: bad})
