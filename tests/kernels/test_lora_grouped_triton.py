"""Many LoRAs in one batch in Triton, against the specification in float64; in the interpreter without a GPU, compiled by the slow test."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from triton import knobs

from kernels.dispatch import force
from kernels.lora_grouped import eager, lora_grouped, segments, triton_kernel
from tests.kernels.compile_support import MAX_SHARED_BYTES, compiled_launches
from tests.kernels.support import gradients
from tests.kernels.test_lora_grouped import IDS, call, check, inputs

pytestmark = pytest.mark.interpret
DEVICE = "cpu" if knobs.runtime.interpret else "cuda"


@pytest.fixture(autouse=True)
def backend():
    with force("triton"):
        yield


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_small(ids):
    ours = check(ids, inputs(len(ids)), 1e-5, DEVICE)  # fp32, measured over three seeds: below 3e-6
    for g in range(3):
        assert (ours[f"d_a{g}"] is None) == (ours[f"d_b{g}"] is None) == (g not in ids)


def test_several_tiles_of_every_kind():
    """More tokens of an adapter than a tile has rows, more columns than a tile on both sides, a rank above 16 beside one below."""
    ids = torch.randint(-1, 3, (230,), generator=torch.Generator().manual_seed(0)).tolist()
    check(ids, inputs(230, inside=70, out=100, ranks=(3, 20, 16)), 1e-5, DEVICE)
    check(sorted(g for g in ids if g >= 0), inputs(sum(g >= 0 for g in ids), inside=70, out=33, ranks=(3, 20, 16)), 1e-5, DEVICE)


def test_bfloat16():
    tensors = inputs(8, torch.bfloat16)
    for y in (tensors["y"].float(), tensors["y"]):
        ours = check(IDS["mixed"], {**tensors, "y": y}, 1.5e-2, DEVICE)  # the interpreter truncates; measured: below 1e-2
        assert ours["out0"].dtype == y.dtype and ours["d_x"].dtype == torch.bfloat16


def test_strides():
    tensors = inputs(8)
    tensors["x"], tensors["y"] = torch.randn(7, 16).T[::2], torch.randn(8, 22)[:, ::2]
    check(IDS["mixed"], tensors, 1e-5, DEVICE)
    check(IDS["sorted"], tensors, 1e-5, DEVICE)


def test_equal_calls_give_equal_bits_and_tokens_without_an_adapter_keep_theirs():
    tensors = {k: v.to(DEVICE) for k, v in inputs(8).items()}
    tensors["y"][1, 0] = -0.0
    tensors["x"][1] = torch.inf
    first, second = (gradients(call(IDS["mixed"]), tensors, [torch.ones(8, 11, device=DEVICE)]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(first["out0"][[1, 6]].view(torch.uint8), tensors["y"][[1, 6]].view(torch.uint8))
    assert first["out0"].isfinite().all() and torch.equal(first["d_x"][[1, 6]], torch.zeros(2, 7, device=DEVICE))


def test_which_kernel_runs():
    tensors = {k: v.to(DEVICE).requires_grad_() for k, v in inputs(8).items()}
    (out,) = call(IDS["mixed"])(**tensors)
    assert type(out.grad_fn).__name__ == "_GroupedBackward" and out.grad_fn.saved_tensors[1].shape == (3, 5, 7)  # stacked and padded
    wide = {k: v.detach().double() for k, v in tensors.items()}
    with force("eager"):
        expected = call(IDS["mixed"])(**wide)[0]
    assert torch.equal(call(IDS["mixed"])(**wide)[0], expected) and triton_kernel.eager is eager


def launches():
    """What an adapted model launches, for `compiled_launches`."""
    for dtype in (torch.bfloat16, torch.float32):
        rows = segments(torch.tensor([1, -1, 0] * 50), 2)
        x, y = torch.zeros(150, 3072, dtype=dtype, requires_grad=True), torch.zeros(150, 5120, dtype=dtype, requires_grad=True)
        a = [torch.zeros(16, 3072, dtype=dtype, requires_grad=True) for _ in range(2)]
        b = [torch.zeros(5120, 16, dtype=dtype, requires_grad=True) for _ in range(2)]
        triton_kernel.lora_grouped(y, x, a, b, (1.0, 2.0), rows).sum().backward()


@pytest.mark.slow
def test_compiles_without_spills():
    compiled = compiled_launches("tests.kernels.test_lora_grouped_triton")
    assert len(compiled) == 2 * 2 * 6 and lora_grouped
    for c in compiled:
        assert c.shared_bytes <= MAX_SHARED_BYTES[c.capability] and c.stack_bytes == 0, c
