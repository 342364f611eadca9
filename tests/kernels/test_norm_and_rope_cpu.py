"""The compiled norm and rotation of decoding steps against the written-out forms, and the cases that they leave to eager."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import add_rms_norm, cpu, rms_norm
from kernels.rms_norm import eager as rms_norm_eager
from kernels.rms_norm import reference as rms_norm_reference
from kernels.rope import apply_rope
from kernels.rope import cpu as rope_cpu
from kernels.rope import eager as rope_eager
from kernels.rope import reference as rope_reference
from tests.kernels.support import assert_close

TOLERANCE = 1e-6  # relative RMS of float32 sums; measured: below 2e-7


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (2, 5, 16), (32, 1, 250), (300, 2, 256)])  # the last is shared among threads
@torch.no_grad()
def test_norms(shape, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, residual, weight = 3 * torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    x = torch.stack([x, x], dim=-2)[..., 0, :]  # rows apart
    out = rms_norm(x, weight, 1e-3)
    assert_close(out, rms_norm_reference.rms_norm(x.double(), weight.double(), 1e-3), TOLERANCE, "out")
    normed, total = add_rms_norm(x, residual, weight, 1e-3)
    assert torch.equal(total, residual + x) and torch.equal(normed, rms_norm(total, weight, 1e-3))
    assert torch.equal(rms_norm(x[:1], weight, 1e-3), out[:1])  # a row's bits do not depend on the others


@pytest.mark.parametrize(
    ("shape", "half", "rows"), [((2, 3, 1, 32), 12, 2), ((2, 3, 5, 8), 4, 1), ((1, 2, 3, 7), 1, 1), ((9, 10, 40, 32), 12, 9)]
)
@torch.no_grad()
def test_rotation(shape, half, rows, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    batch, heads, length, size = shape
    x = torch.randn(batch, length, heads + 2, size).transpose(1, 2)[:, :heads]  # as a slice of a fused product
    angles = torch.randn(rows, length, half)
    cos, sin = angles.cos(), angles.sin()
    out = apply_rope(x, cos, sin)
    assert_close(out, rope_reference.apply_rope(x.double(), cos.double(), sin.double()), TOLERANCE, "out")
    assert torch.equal(apply_rope(x[:1], cos[:1], sin[:1]), out[:1])


def test_what_is_left_to_eager(monkeypatch):
    """Gradients and other dtypes."""
    used = []
    for module, names in ((rms_norm_eager, ("rms_norm", "add_rms_norm")), (rope_eager, ("apply_rope",))):
        for name in names:
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, name=name, real=real: used.append(name) or real(*args))
    x, weight, table = torch.randn(2, 3, 4, 8), torch.randn(8), torch.randn(1, 4, 2)
    for dtype in (torch.float64, torch.bfloat16):
        with torch.no_grad():
            cpu.rms_norm(x.to(dtype), weight)
            cpu.add_rms_norm(x.to(dtype), x, weight)
            rope_cpu.apply_rope(x.to(dtype), table, table)
    assert used == ["rms_norm", "add_rms_norm", "rms_norm", "apply_rope"] * 2  # eager's sum calls its norm
    used.clear()
    cpu.rms_norm(x, weight)
    rope_cpu.apply_rope(x, table, table)
    assert used == ["rms_norm", "apply_rope"]
