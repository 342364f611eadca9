"""Every case that the benchmarks time or compare: each backend against the float64 reference, and that a case notices what it is for."""

from __future__ import annotations

import argparse
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import cases, decode, gpu
from kernels.dispatch import pick

CPU = torch.device("cpu")
MADE = {
    "scan": partial(cases.scan_case, 2, 9, 5, 2),
    "scan, carried": partial(cases.scan_case, 2, 7, 3, 2, carried=True),
    "conv": partial(cases.conv_case, 2, 9, 5),
    "conv, carried": partial(cases.conv_case, 2, 9, 5, carried=True),
    "norm": partial(cases.norm_case, 3, 12),
    "add norm": partial(cases.add_norm_case, 3, 12),
    "swiglu": partial(cases.swiglu_case, 3, 12),
    "rope": partial(cases.rope_case, 1, 2, 5, 8),
    "attention": partial(cases.attention_case, 2, 2, 1, 19, 8, 6),
    "attention, documents": partial(cases.attention_case, 2, 2, 1, 19, 8, 6, documents=True),
    "attention, documents, no window": partial(cases.attention_case, 2, 2, 1, 19, 8, None, documents=True),
    "cached attention": partial(cases.cached_attention_case, 2, 4, 2, 21, 8, 6),
    "cached attention, no window": partial(cases.cached_attention_case, 2, 4, 2, 21, 8, None),
    "cross-entropy": partial(cases.cross_entropy_case, 6, 8, 11),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> cases.Case:
    torch.manual_seed(0)
    return MADE[name](dtype=dtype, device=CPU)


def test_no_case_is_left_out():
    functions = {name for name in vars(cases) if name.endswith("_case")}
    assert functions == {function.func.__name__ for function in MADE.values()}


@pytest.mark.parametrize("name", MADE)
def test_eager_agrees_with_the_reference(name):
    check(name, "eager")


# By default what the kernels' own tests do not call in this way; the others take longer.
QUICK = ("scan, carried", "conv, carried", "attention, documents", "cached attention")


@pytest.mark.interpret
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MADE])
def test_triton_agrees_with_the_reference(name):
    pytest.importorskip("triton")
    check(name, "triton")


def check(name: str, backend: str) -> None:
    """fp32 errors measured over all of them: at most 3e-7."""
    case = made(name)
    errors = cases.errors(case, backend)
    assert set(errors) >= {"y0", *(f"d{learned}" for learned in case.learned)}
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("name", MADE)
def test_what_is_timed_runs(name):
    case = made(name)
    outputs = cases.forward(case, "eager")()
    assert all(torch.equal(y, cases.results(case, "eager")[f"y{i}"]) for i, y in enumerate(outputs))
    if case.learned:
        grads = cases.forward_backward(case, "eager")()
        assert [grad.shape for grad in grads] == [case.inputs[learned].shape for learned in case.learned]


@pytest.mark.parametrize(
    ("name", "function", "ignored"),
    [
        ("scan, carried", "selective_scan", 9),
        ("scan, carried", "selective_scan", 10),
        ("conv, carried", "causal_conv1d", 4),
        ("conv, carried", "causal_conv1d", 5),
        ("attention, documents", "attention", 4),
        ("attention, documents, no window", "attention", 4),
        ("cached attention", "cached_attention", 5),
    ],
)
def test_a_backend_that_ignores_an_argument_is_found_out(name, function, ignored, monkeypatch):
    case = made(name)
    module = pick(case.op, CPU, "eager")
    real = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: real(*(None if i == ignored else a for i, a in enumerate(args))))
    if "initial_state" in case.learned and ignored in (4, 9):  # its gradient would not exist at all
        with pytest.raises(RuntimeError, match="not have been used"):
            cases.errors(case, "eager")
    else:
        assert cases.errors(case, "eager")["y0"] > 10 * gpu.TOLERANCE


@pytest.mark.parametrize(("name", "op"), [("scan, carried", "selective_scan"), ("conv, carried", "causal_conv1d")])
def test_the_last_state_is_compared_and_has_a_gradient(name, op, monkeypatch):
    case = made(name)
    module = pick(op, CPU, "eager")
    real = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: (lambda y, state: (y, state.detach() + 0 * y.sum()))(*real(*args)))
    errors = cases.errors(case, "eager")
    assert errors["y1"] < 1e-5 and max(errors.values()) > 10 * gpu.TOLERANCE  # the value is right, what flows back is lost


def test_documents_begin_inside_the_row_and_near_its_end():
    start = cases.document_starts(2, 9, CPU)
    assert start.nonzero().tolist() == [[0, 3], [0, 7], [1, 2], [1, 6]]
    assert not cases.document_starts(2, 2, CPU)[:, 0].any()  # the state given is that of the first document


def test_a_cache_has_empty_slots_and_rows_of_different_age():
    inputs = made("cached attention").inputs
    held, newest = inputs["key_positions"], inputs["query_positions"]
    assert torch.equal(held.amax(dim=1, keepdim=True), newest) and newest.unique().numel() == 2
    assert all(torch.equal(row[row >= 0].sort().values, torch.arange(int(last) + 1)) for row, last in zip(held, newest))


# Decoding steps: static buffers against plain steps. On a GPU gpu.py does the same with CUDA graphs.


def model_named(name: str) -> nn.Module:
    return decode.model_of(decode.PATTERNS[name], "test", CPU)


@pytest.mark.parametrize("name", decode.PATTERNS)
def test_static_steps_equal_plain_steps(name):
    torch.manual_seed(0)
    model = model_named(name)
    assert decode.step_difference(model, 3, 21, torch.float32) < 1e-6  # measured over 5 seeds: at most 4e-7
    # Measured: 0 where the CPU multiplies bfloat16, 5e-3 where it does not; bfloat16 itself is 8e-3 away from float32.
    assert decode.step_difference(model, 3, 21, torch.bfloat16) < 8e-3


def test_a_step_that_lost_its_state_is_found_out(monkeypatch):
    real = decode.static_step
    monkeypatch.setattr(decode, "static_step", lambda model, state, dtype: real(model, decode.state_at(model, 5, 3, 90, dtype), dtype))
    assert decode.step_difference(model_named("samba"), 3, 21, torch.bfloat16) > 10 * gpu.TOLERANCE


def test_a_static_cache_is_what_the_growing_one_would_become():
    """Full attention from position 21 on, ten tokens: the same logits, buffers that stay where they are, room for all of them."""
    torch.manual_seed(0)
    model = model_named("full attention")
    growing = decode.state_at(model, 21, 2, 10, torch.float32)
    static = decode.make_static(growing.fork(1), 31)
    assert static.constant_size and not growing.constant_size
    places = [tensor.data_ptr() for layer in static.layers for tensor in layer.tensors]
    for _ in range(10):
        ids = torch.randint(model.vocab_size, (2, 1))
        with decode.inference(CPU, torch.float32):
            a, b = (decode.plain_step(model, state, torch.float32)(ids) for state in (growing, static))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [tensor.data_ptr() for layer in static.layers for tensor in layer.tensors] == places
    assert growing.layers[0].keys.shape == static.layers[0].keys.shape == (2, 2, 31, 16)


def test_the_decoding_benchmark_runs():
    options = argparse.Namespace(size="test", positions=[8, 40], batch=2, rounds=2, device="cpu", dtype="float32", clock="cpu", graphs=True)
    found = decode.measure(options)
    assert list(found) == [(name, position) for name in decode.PATTERNS for position in (8, 40)]
    hybrid, full = ([found[(name, position)]["state_bytes"] for position in (8, 40)] for name in decode.PATTERNS)
    assert hybrid[0] == hybrid[1] and 5 * full[0] == full[1]  # bytes at the position, without the room for more
    assert all(row["ms_per_token"]["runs"] == 2 for row in found.values())
