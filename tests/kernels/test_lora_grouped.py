"""Many LoRAs in one batch: sorting, the fast torch path and its gradients against the specification token by token, refusals."""

from __future__ import annotations

import pytest
import torch

from kernels.dispatch import available, force
from kernels.lora_grouped import Segments, lora_grouped, segments
from tests.kernels.support import compare, gradients

IDS = {
    "mixed": [1, -1, 0, 2, 1, 1, -1, 0],
    "sorted": [0, 0, 1, 1, 1, 2, 2, 2],
    "one adapter": [1] * 8,
    "one lacks tokens": [2, 0, 0, -1, 2, 2, 0, 0],
    "none": [-1] * 8,
    "one token": [2],
}
RANKS = (2, 5, 1)


def inputs(tokens, dtype=torch.float32, inside=7, out=11, ranks=RANKS):
    tensors = {"y": torch.randn(tokens, out), "x": torch.randn(tokens, inside)}
    for g, rank in enumerate(ranks):
        tensors |= {f"a{g}": torch.randn(rank, inside), f"b{g}": torch.randn(out, rank)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def call(ids, scales=(2.0, 0.5, -1.0)):
    def run(y, x, **matrices):
        a, b = ([matrices[f"{side}{g}"] for g in range(len(scales))] for side in "ab")
        return (lora_grouped(y, x, a, b, scales, segments(torch.tensor(ids, device=x.device), len(scales))),)

    return run


def with_zeros(results, like):
    return {name: torch.zeros_like(like[name.removeprefix("d_")]) if value is None else value for name, value in results.items()}


def check(ids, tensors, tolerance, device="cpu"):
    """Output and every gradient against the specification in float64; returns ours. An adapter without tokens has no gradient."""
    cotangent = [torch.randn_like(tensors["y"])]
    ours = gradients(call(ids), {k: v.to(device) for k, v in tensors.items()}, [c.to(device) for c in cotangent])
    wide = {k: v.double() for k, v in tensors.items()}
    with force("reference"):
        expected = gradients(call(ids), wide, [c.double() for c in cotangent])
    assert {name for name, value in ours.items() if value is None} <= {f"d_{s}{g}" for s in "ab" for g in range(3) if g not in ids} | {
        "d_x"
    }
    compare(with_zeros({k: v if v is None else v.cpu() for k, v in ours.items()}, tensors), with_zeros(expected, wide), tolerance)
    return ours


def test_segments():
    assert segments(torch.tensor(IDS["sorted"]), 3) == Segments(None, (2, 3, 3))
    order, sizes = segments(torch.tensor(IDS["mixed"]), 4)
    assert order.tolist() == [2, 7, 0, 4, 5, 3] and sizes == (2, 3, 1, 0)  # in their own order inside
    assert segments(torch.tensor([], dtype=torch.int64), 2).sizes == (0, 0)


@pytest.mark.parametrize("ids", [[0, 3], [-2, 0], [0.0, 1.0], [[0], [1]]])
def test_segments_refuse(ids):
    with pytest.raises(ValueError, match=r"segments: ids are .* expected whole numbers \(N,\) from -1 to 2"):
        segments(torch.tensor(ids), 3)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_specification_is_the_equation(ids):
    """y_i + s_g B_g A_g x_i, once more, by one matrix a token."""
    tensors = inputs(len(ids), torch.float64)
    with force("reference"):
        (out,) = call(ids)(**tensors)
    for i, g in enumerate(ids):
        matrix = torch.zeros(11, 7).double() if g < 0 else (2.0, 0.5, -1.0)[g] * tensors[f"b{g}"] @ tensors[f"a{g}"]
        torch.testing.assert_close(out[i], tensors["y"][i] + matrix @ tensors["x"][i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_eager(ids):
    with force("eager"):
        ours = check(ids, inputs(len(ids), torch.float64), 1e-14)
        check(ids, inputs(len(ids)), 1e-5)  # fp32, measured over three seeds: below 7e-7
    for g in range(3):
        assert (ours[f"d_a{g}"] is None) == (ours[f"d_b{g}"] is None) == (g not in ids)


def test_gradients_by_finite_differences():
    names, tensors = zip(*inputs(8, torch.float64).items())
    leaves = [t.requires_grad_() for t in tensors]
    with force("eager"):
        torch.autograd.gradcheck(lambda *values: call(IDS["mixed"])(**dict(zip(names, values))), leaves)


def test_narrow_products_and_a_wide_sum():
    """y float32 and x, A, B bfloat16: the products are rounded, the sum is not; y bfloat16: rounded once at the end."""
    tensors = inputs(8, torch.bfloat16)
    with force("eager"):
        for y in (tensors["y"].float(), tensors["y"]):
            (out,) = call(IDS["mixed"])(**{**tensors, "y": y})
            assert out.dtype == y.dtype
            check(IDS["mixed"], {**tensors, "y": y}, 1e-2)  # 8 bits over three products, measured: below 7e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_without_an_adapter_keep_every_bit(dtype):
    tensors = inputs(8, dtype)
    tensors["y"][1, 0] = -0.0
    tensors["x"][1] = torch.inf  # of a token that no adapter reads
    with force("eager"):
        (out,) = call(IDS["mixed"])(**tensors)
    assert torch.equal(out[[1, 6]].view(torch.uint8), tensors["y"][[1, 6]].view(torch.uint8)) and out.isfinite().all()


def test_frozen_matrices_and_inputs_get_no_gradient():
    tensors = inputs(8)
    tensors["b1"].requires_grad_()
    with force("eager"):
        call(IDS["mixed"])(**tensors)[0].sum().backward()
    assert tensors["b1"].grad is not None and all(t.grad is None for name, t in tensors.items() if name != "b1")


def test_equal_calls_give_equal_bits():
    tensors, cotangent = inputs(8), [torch.randn(8, 11)]
    with force("eager"):
        first, second = (gradients(call(IDS["mixed"]), tensors, cotangent) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides():
    tensors = inputs(8)
    tensors["x"] = torch.randn(7, 16).T[::2]
    tensors["y"] = torch.randn(8, 22)[:, ::2]
    tensors["a1"], tensors["b1"] = tensors["a1"].T.contiguous().T, tensors["b1"].T.contiguous().T
    with force("eager"):
        check(IDS["mixed"], tensors, 1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 7)}, r"x has shape \(3, 7\), y \(8, 11\)"),
        ({"a1": torch.zeros(5, 6)}, r"A has shape \(5, 6\); expected \(R, in\)"),
        ({"b1": torch.zeros(11, 4)}, r"B has shape \(11, 4\); expected \(out, R\)"),
        ({"b1": torch.zeros(11, 5).double()}, r"A is torch\.float32, B torch\.float64"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        call(IDS["mixed"])(**{**inputs(8), **change})
    tensors = inputs(8)
    rows = segments(torch.tensor(IDS["mixed"]), 3)
    a, b = ([tensors[f"{side}{g}"] for g in range(3)] for side in "ab")
    with pytest.raises(ValueError, match="3 A, 3 B, 2 scales, 3 segments"):
        lora_grouped(tensors["y"], tensors["x"], a, b, (1.0, 1.0), rows)
    with pytest.raises(ValueError, match="segments of 2 tokens for 8 rows"):
        lora_grouped(tensors["y"], tensors["x"], a, b, (1.0,) * 3, Segments(None, (1, 1, 0)))


def test_backends():
    assert available("lora_grouped") == ["triton", "eager", "reference"]
