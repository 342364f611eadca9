"""Causal convolution: eager against the loops and torch's conv1d, every gradient, state and document resets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.causal_conv1d import causal_conv1d, eager, reference
from tests.kernels.support import assert_close, compare, gradients


def make(batch=2, length=11, dim=5, width=4, dtype=torch.float64):
    inputs = {
        "x": torch.randn(batch, length, dim, dtype=dtype),
        "weight": torch.randn(dim, width, dtype=dtype),
        "bias": torch.randn(dim, dtype=dtype),
        "initial_state": torch.randn(batch, width - 1, dim, dtype=dtype),
    }
    return inputs, [torch.randn(batch, length, dim, dtype=dtype), torch.randn(batch, width - 1, dim, dtype=dtype)]


def bound(function, activation="silu", start=None):
    return lambda **inputs: function(**inputs, activation=activation, document_start=start)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("activation", ["silu", None])
def test_float64_matches_the_loops(length, activation):
    inputs, cotangents = make(length=length)
    expected = gradients(bound(reference.causal_conv1d, activation), inputs, cotangents)
    compare(gradients(bound(eager.causal_conv1d, activation), inputs, cotangents), expected, 1e-12)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_other_widths(width):
    inputs, cotangents = make(width=width)
    start = torch.rand(2, 11) < 0.3
    if width == 1:
        inputs.pop("initial_state")
        run = lambda f: lambda **kw: f(**kw, activation="silu", document_start=start)[:1]  # noqa: E731
    else:
        run = lambda f: bound(f, start=start)  # noqa: E731
    expected = gradients(run(reference.causal_conv1d), inputs, cotangents)
    compare(gradients(run(eager.causal_conv1d), inputs, cotangents), expected, 1e-12)


def test_float32():
    inputs, cotangents = make(length=40, dtype=torch.float32)
    expected = gradients(bound(reference.causal_conv1d), {k: v.double() for k, v in inputs.items()}, cotangents)
    compare(gradients(bound(causal_conv1d), inputs, cotangents), expected, 1e-5)  # measured: below 2e-7


def test_equals_torch_conv1d():
    inputs, _ = make()
    padded = torch.cat([inputs["initial_state"], inputs["x"]], dim=1).mT
    expected = F.conv1d(padded, inputs["weight"].unsqueeze(1), inputs["bias"], groups=5).mT
    assert_close(causal_conv1d(**inputs)[0], expected, 1e-12, "y")


def test_optional_arguments():
    inputs, cotangents = make()
    for names in (["bias"], ["initial_state"], ["bias", "initial_state"]):
        some = {k: v for k, v in inputs.items() if k not in names}
        expected = gradients(bound(reference.causal_conv1d), some, cotangents)
        compare(gradients(bound(eager.causal_conv1d), some, cotangents), expected, 1e-12)


def test_document_start_equals_separate_documents():
    inputs, cotangents = make(batch=1, length=14)
    bounds = [0, 5, 6, 12, 14]  # documents of 5 (goes on from the state), 1, 6 and 2 positions: the state must reach over none of them
    start = torch.zeros(1, 14, dtype=torch.bool)
    start[0, bounds[1:-1]] = True

    def separately(x, initial_state, **parameters):
        state, pieces = initial_state, []
        for first, end in zip(bounds, bounds[1:]):  # noqa: RUF007
            history = state if first == 0 else torch.zeros_like(initial_state)
            y, state = reference.causal_conv1d(x[:, first:end], initial_state=history, activation="silu", **parameters)
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    expected = gradients(separately, inputs, cotangents)
    assert expected["out1"][0, 0].abs().max() == 0  # the last document has only two positions
    compare(gradients(bound(eager.causal_conv1d, start=start), inputs, cotangents), expected, 1e-12)
    compare(gradients(bound(reference.causal_conv1d, start=start), inputs, cotangents), expected, 1e-12)


def test_start_at_index_zero_drops_the_state():
    inputs, _ = make()
    start = torch.zeros(2, 11, dtype=torch.bool)
    start[:, 0] = True
    with_state, _ = causal_conv1d(**inputs, document_start=start)
    inputs.pop("initial_state")
    assert_close(with_state, causal_conv1d(**inputs)[0], 0.0, "y")


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinity_and_nan_stay_in_their_document(bad):
    """As in the specification, values, state and gradients, both ways."""
    inputs, cotangents = make()
    inputs["x"][0, 8], cotangents[0][0, :9], cotangents[0][1, 9] = bad, 0, bad
    start = torch.zeros(2, 11, dtype=torch.bool)
    start[:, 9] = True
    expected = gradients(bound(reference.causal_conv1d, start=start), inputs, cotangents)
    actual = gradients(bound(eager.causal_conv1d, start=start), inputs, cotangents)
    for name, row, part in (("out0", 0, slice(9, 11)), ("d_x", 0, slice(9, 11)), ("out1", 0, slice(0, 3)), ("d_x", 1, slice(0, 9))):
        assert expected[name][row, part].isfinite().all(), name
        assert_close(actual[name][row, part], expected[name][row, part], 1e-12, name)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_dropped_state_may_hold_anything(bad):
    inputs, cotangents = make()
    inputs["initial_state"].fill_(bad)
    start = torch.zeros(2, 11, dtype=torch.bool)
    start[:, 0] = True
    expected = gradients(bound(reference.causal_conv1d, start=start), inputs, cotangents)
    compare(gradients(bound(eager.causal_conv1d, start=start), inputs, cotangents), expected, 1e-12)


@pytest.mark.parametrize("sizes", [(1,) * 11, (2, 1, 8), (10, 1)])
def test_pieces_that_carry_the_state_equal_the_whole(sizes):
    inputs, cotangents = make()
    start = torch.zeros(2, 11, dtype=torch.bool)
    start[0, 4] = start[1, 9] = start[1, 10] = True

    def in_pieces(x, initial_state, weight, bias):
        state, pieces = initial_state, []
        for part, mask in zip(x.split(sizes, dim=1), start.split(sizes, dim=1)):
            y, state = causal_conv1d(part, weight, bias, "silu", state, mask)
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    expected = gradients(bound(reference.causal_conv1d, start=start), inputs, cotangents)
    compare(gradients(in_pieces, inputs, cotangents), expected, 1e-12)


def test_gradcheck():
    inputs, _ = make(batch=1, length=5, dim=3)
    start = torch.tensor([[False, False, True, False, False]])
    function = lambda x, w, b, h: eager.causal_conv1d(x, w, b, "silu", h, start)  # noqa: E731
    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


def test_bfloat16_and_non_contiguous():
    inputs, cotangents = make(length=30, dtype=torch.float32)
    rounded = {**inputs, "x": inputs["x"].bfloat16().float()}
    expected = gradients(bound(reference.causal_conv1d), rounded, [c.bfloat16().float() for c in cotangents])
    low = {**inputs, "x": inputs["x"].bfloat16().transpose(1, 2).contiguous().transpose(1, 2)}
    actual = gradients(bound(causal_conv1d), low, cotangents)
    assert actual["out0"].dtype == torch.bfloat16 and actual["d_weight"].dtype == torch.float32
    compare(actual, expected, 5e-3)  # one bf16 rounding is 2e-3 a value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 11)}, "x is"),
        ({"weight": torch.zeros(4, 4)}, r"weight has shape \(4, 4\); expected \(D, W\) = \(5, 4\)"),
        ({"initial_state": torch.zeros(2, 4, 5)}, "initial_state has shape"),
        ({"activation": "relu"}, "activation is 'relu'; allowed are 'silu' and None"),
        ({"document_start": torch.zeros(2, 11)}, "expected torch.bool"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**make()[0], **change})
