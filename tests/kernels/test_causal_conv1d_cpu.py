"""The compiled causal convolution of decoding steps against the loops, and the cases that it leaves to eager."""

from __future__ import annotations

import pytest
import torch

from kernels.causal_conv1d import cpu, eager, reference
from tests.kernels.support import assert_close
from tests.kernels.test_causal_conv1d import make

TOLERANCE = 1e-6  # relative RMS of float32 sums; measured: below 2e-7


@pytest.mark.parametrize(("batch", "length", "dim", "width"), [(1, 1, 1, 1), (2, 7, 33, 4), (20, 1, 512, 4), (3, 2, 48, 5), (2, 90, 64, 2)])
@pytest.mark.parametrize("left_out", [None, "bias", "initial_state"])
@pytest.mark.parametrize("activation", ["silu", None])
@torch.no_grad()
def test_against_the_loops(batch, length, dim, width, left_out, activation, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    inputs, _ = make(batch, length, dim, width, dtype=torch.float32)
    inputs.pop(left_out, None)
    inputs["x"] = torch.cat([inputs["x"], inputs["x"]], dim=2)[:, :, :dim]  # half of a fused product
    y, state = cpu.causal_conv1d(**inputs, activation=activation)
    expected, after = reference.causal_conv1d(**{k: v.double() for k, v in inputs.items()}, activation=activation)
    assert_close(y, expected, TOLERANCE, "y")
    assert torch.equal(state, after.float())
    one = {k: v[:1] if k in ("x", "initial_state") else v for k, v in inputs.items()}
    assert torch.equal(cpu.causal_conv1d(**one, activation=activation)[0], y[:1])  # a row's bits do not depend on the others


def test_what_is_left_to_eager(monkeypatch):
    """Gradients, documents, other dtypes, many taps."""
    used, real = [], eager.causal_conv1d
    monkeypatch.setattr(eager, "causal_conv1d", lambda *args: used.append(1) or real(*args))
    inputs, _ = make(dtype=torch.float32)
    cpu.causal_conv1d(**inputs)
    with torch.no_grad():
        cpu.causal_conv1d(**inputs, document_start=torch.zeros(2, 11, dtype=torch.bool))
        cpu.causal_conv1d(**{k: v.bfloat16() for k, v in inputs.items()})
        cpu.causal_conv1d(**make(width=17, dtype=torch.float32)[0])
        assert len(used) == 4
        cpu.causal_conv1d(**inputs)
    assert len(used) == 4
