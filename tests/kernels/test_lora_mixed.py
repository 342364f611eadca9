"""Tasks that share A and the B: the dense path of all tasks together and its gradients against the loop over tasks, refusals, bits."""

from __future__ import annotations

import pytest
import torch

from kernels.dispatch import MODULES, available, force, pick
from kernels.lora_grouped import lora_mixed
from tests.kernels.support import compare, gradients

TASKS, RANK, UPS, INSIDE, SPLITS = 4, 3, 2, 7, (5, 2, 4)
KINDS = {"full": (RANK, RANK), "diag": (RANK,), "none": None}
IDS = {"mixed": [2, 0, 3, 0, 2], "one task": [1] * 5, "one row": [3], "sorted": [0, 0, 1, 2, 3]}


def inputs(rows, tokens, kind="full", blocks=3, dtype=torch.float32):
    shapes = {"y": (rows, tokens, 11), "x": (rows, tokens, INSIDE), "a": (RANK, INSIDE), "b": (UPS, 11, RANK), "shares": (TASKS, UPS)}
    if KINDS[kind] is not None:
        shapes["lambdas"] = (TASKS, blocks, *KINDS[kind])
    return {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}


def call(ids, splits=SPLITS):
    def run(y, x, a, b, shares, lambdas=None):
        return (lora_mixed(y, x, a, b, shares, lambdas, 1.5, torch.tensor(ids), splits),)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_over_tasks_is_the_equation(kind):
    """y + s B_t Lambda_t A x, once more, by one (out, in) matrix a row."""
    ids, tensors = IDS["mixed"], inputs(5, 3, kind, dtype=torch.float64)
    with force("reference"):
        (out,) = call(ids)(**tensors)
    for i, task in enumerate(ids):
        up = torch.einsum("n,nor->or", tensors["shares"][task], tensors["b"])
        if kind != "none":
            inner = tensors["lambdas"][task] if kind == "full" else tensors["lambdas"][task].diag_embed()
            up = torch.cat([rows @ matrix for rows, matrix in zip(up.split(SPLITS), inner)])
        expected = tensors["y"][i] + 1.5 * tensors["x"][i] @ (up @ tensors["a"]).T
        torch.testing.assert_close(out[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("splits", [SPLITS, (11,)], ids=["blocks", "one block"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_dense_is_the_loop(kind, splits, tokens, ids, dtype, bound):
    """Output and every gradient; the loop in float64. Parts of tasks that no row has get zeros from both."""
    tensors = inputs(len(ids), tokens, kind, len(splits), dtype)
    cotangent = [torch.randn_like(tensors["y"])]
    with force("eager"):
        ours = gradients(call(ids, splits), tensors, cotangent)
    with force("reference"):
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        expected = gradients(call(ids, splits), wide, [cotangent[0].double()])
    compare(ours, expected, bound)
    away = [task for task in range(TASKS) if task not in ids]
    assert not ours["d_shares"][away].any() and not (kind != "none" and ours["d_lambdas"][away].any())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    names, tensors = zip(*inputs(3, 2, kind, dtype=torch.float64).items())
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with force("eager"):
        torch.autograd.gradcheck(lambda *values: call([2, 0, 2])(**dict(zip(names, values))), leaves)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_task_more_changes_no_bit_of_the_others(tokens):
    tensors = inputs(5, tokens)
    more = {**tensors, **{key: torch.cat([tensors[key], torch.randn_like(tensors[key][:1])]) for key in ("shares", "lambdas")}}
    with force("eager"):
        assert torch.equal(call(IDS["mixed"])(**tensors)[0], call(IDS["mixed"])(**more)[0])


def test_a_wide_mixture_of_narrow_matrices():
    """A and B in bfloat16 with weights in float32, and y of its own dtype: products are rounded, the sum is taken in the wider dtype."""
    tensors = {name: tensor.bfloat16() if name in ("x", "a", "b", "lambdas") else tensor for name, tensor in inputs(5, 3).items()}
    with force("reference"):
        expected = call(IDS["mixed"])(**{name: tensor.double() for name, tensor in tensors.items()})[0]
    with force("eager"):
        for y in (tensors["y"], tensors["y"].bfloat16()):
            out = call(IDS["mixed"])(**{**tensors, "y": y})[0]
            assert out.dtype == y.dtype
            compare({"out": out}, {"out": expected}, 1e-2)  # 8 bits over three products, measured: below 5e-3


def test_equal_calls_give_equal_bits_and_strides_do_not_matter():
    tensors, cotangent = inputs(5, 3), [torch.randn(5, 3, 11)]
    with force("eager"):
        first, second = (gradients(call(IDS["mixed"]), tensors, cotangent) for _ in range(2))
        turned = {name: tensor.mT.contiguous().mT for name, tensor in tensors.items()}
        compare(gradients(call(IDS["mixed"]), turned, cotangent), first, 1e-5)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_compiles_into_one_graph():
    tensors = inputs(5, 3)
    expected = call(IDS["mixed"])(**tensors)[0]  # loads the backend, which a trace cannot
    compiled = torch.compile(call(IDS["mixed"]), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(**tensors)[0], expected, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 7)}, r"x has shape \(5, 7\), y \(5, 3, 11\)"),
        ({"x": torch.zeros(5, 2, 7)}, r"x has shape \(5, 2, 7\), y \(5, 3, 11\)"),
        ({"a": torch.zeros(3, 6)}, r"A has shape \(3, 6\); expected \(r, in\)"),
        ({"b": torch.zeros(2, 11, 4)}, r"B has shape \(2, 11, 4\); expected \(n, out, r\)"),
        ({"shares": torch.zeros(4, 3)}, r"shares has shape \(4, 3\); expected \(T, n\)"),
        ({"lambdas": torch.zeros(4, 2, 3, 3)}, r"lambdas has shape \(4, 2, 3, 3\); expected \(T, blocks, r, r\)"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        call(IDS["mixed"])(**{**inputs(5, 3), **change})
    with pytest.raises(ValueError, match="ids has shape"):
        call([0, 1])(**inputs(5, 3))
    with pytest.raises(ValueError, match="blocks of 10 rows; y has 11"):
        call(IDS["mixed"], (5, 5))(**inputs(5, 3, blocks=2))


def test_every_backend_has_it():
    for backend in available("lora_grouped"):
        if backend == "triton":
            pytest.importorskip("triton")
        assert callable(pick("lora_grouped", "cpu", backend).lora_mixed), MODULES[backend]
