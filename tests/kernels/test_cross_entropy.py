"""Linear cross-entropy: eager against F.cross_entropy in float64, ignored rows, chunks, dtypes, no logits in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import eager, linear_cross_entropy, reference
from tests.kernels.support import assert_close, compare, gradients


def make(rows=23, dim=6, vocabulary=17, dtype=torch.float64, ignored=5):
    labels = torch.randint(vocabulary, (rows,))
    labels[torch.randperm(rows)[:ignored]] = -100
    inputs = {"hidden": torch.randn(rows, dim, dtype=dtype), "weight": torch.randn(vocabulary, dim, dtype=dtype), "labels": labels}
    return inputs, [torch.tensor(0.37, dtype=dtype)]


def torch_loss(hidden, weight, labels):
    return (F.cross_entropy(hidden @ weight.T, labels, reduction="sum"),)


@pytest.mark.parametrize("chunk", [1, 4, 23, 100, None])
@pytest.mark.parametrize("ignored", [0, 5])
def test_float64_matches_torch(chunk, ignored):
    inputs, cotangents = make(ignored=ignored)
    expected = gradients(torch_loss, inputs, cotangents)
    compare(gradients(lambda **kw: (linear_cross_entropy(**kw, chunk_tokens=chunk),), inputs, cotangents), expected, 1e-12)
    compare(gradients(lambda **kw: (reference.linear_cross_entropy(**kw),), inputs, cotangents), expected, 1e-12)


def test_float32():
    inputs, cotangents = make(rows=300, dim=32, vocabulary=500, dtype=torch.float32)
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = gradients(torch_loss, doubled, cotangents)
    actual = gradients(lambda **kw: (linear_cross_entropy(**kw, chunk_tokens=64),), inputs, cotangents)
    compare(actual, expected, 1e-5)  # measured: below 4e-7


def test_large_logits_stay_finite():
    inputs, cotangents = make()
    inputs["hidden"] *= 1e3
    expected = gradients(torch_loss, inputs, cotangents)
    compare(gradients(lambda **kw: (linear_cross_entropy(**kw),), inputs, cotangents), expected, 1e-12)


def test_no_valid_label_gives_zero():
    inputs, cotangents = make(ignored=23)
    result = gradients(lambda **kw: (linear_cross_entropy(**kw),), inputs, cotangents)
    assert result["out0"] == 0 and result["d_hidden"].abs().max() == 0 and result["d_weight"].abs().max() == 0
    with torch.no_grad():
        assert linear_cross_entropy(**inputs, reduction="none").tolist() == [0.0] * 23


def test_no_rows_at_all():
    weight = torch.randn(4, 3, requires_grad=True)
    loss = linear_cross_entropy(torch.zeros(0, 3), weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and weight.grad.abs().max() == 0


def test_values_of_single_tokens():
    inputs, _ = make()
    expected = F.cross_entropy(inputs["hidden"] @ inputs["weight"].T, inputs["labels"], reduction="none")
    for chunk in (None, 4):
        assert_close(linear_cross_entropy(**inputs, reduction="none", chunk_tokens=chunk), expected, 1e-12, "nll")
    assert_close(reference.linear_cross_entropy(**inputs, reduction="none"), expected, 1e-12, "nll")


def test_another_ignore_index():
    inputs, _ = make(ignored=0)
    expected = F.cross_entropy(inputs["hidden"] @ inputs["weight"].T, inputs["labels"], reduction="sum", ignore_index=3)
    assert_close(linear_cross_entropy(**inputs, ignore_index=3), expected, 1e-12, "loss")


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_no_gradient(frozen):
    inputs, cotangents = make()
    leaves = {k: v.clone().requires_grad_(v.is_floating_point() and k != frozen) for k, v in inputs.items()}
    loss = linear_cross_entropy(**leaves)
    assert sum(t is not None for t in loss.grad_fn.saved_tensors) == 1
    loss.backward(cotangents[0])
    trained = "weight" if frozen == "hidden" else "hidden"
    assert leaves[frozen].grad is None
    assert_close(leaves[trained].grad, gradients(torch_loss, inputs, cotangents)[f"d_{trained}"], 1e-12, trained)


def test_gradients_can_be_taken_twice():
    inputs, _ = make()
    leaf = inputs["hidden"].requires_grad_()
    loss = linear_cross_entropy(**inputs)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert_close(first, 2 * second, 1e-15, "gradient")


def test_autocast_multiplies_in_bfloat16_and_returns_float32():
    inputs, cotangents = make(rows=300, dim=32, vocabulary=100, dtype=torch.float32)

    def inside(**kw):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (linear_cross_entropy(**kw),)

    rounded = {k: v.bfloat16().double() if v.is_floating_point() else v for k, v in inputs.items()}
    actual = gradients(inside, inputs, cotangents)
    assert actual["out0"].dtype == torch.float32 and actual["d_hidden"].dtype == torch.float32
    exact = gradients(torch_loss, rounded, cotangents)
    assert_close(actual["out0"], exact["out0"], 1e-3, "loss")
    assert (actual["d_hidden"] - exact["d_hidden"]).abs().max() > 1e-5  # bf16 was used at all
    compare(actual, exact, 2e-2)  # logits of size about 6 carry 2^-9 relative rounding


def test_gradcheck():
    inputs, _ = make(rows=5, dim=3, vocabulary=4, ignored=1)
    labels = inputs.pop("labels")
    function = lambda h, w: eager.linear_cross_entropy(h, w, labels, chunk_tokens=2)  # noqa: E731
    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


def test_the_logits_are_never_all_in_memory(monkeypatch):
    inputs, _ = make(rows=64, vocabulary=50)
    sizes = []
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: sizes.append(size) or original(self, *size, **kw))
    eager.linear_cross_entropy(**inputs, chunk_tokens=8)
    assert sizes and all(size[0] <= 8 for size in sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(23, 5)}, r"hidden has shape \(23, 5\); expected \(M, D\) = \(M, 6\)"),
        ({"labels": torch.zeros(22, dtype=torch.int64)}, "labels has shape"),
        ({"labels": torch.zeros(23, dtype=torch.int32)}, "labels is torch.int32; expected torch.int64"),
        ({"reduction": "mean"}, "reduction is 'mean'; allowed are 'sum' and 'none'"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"hidden": torch.zeros(23, 6, dtype=torch.float64, requires_grad=True), "reduction": "none"}, "has no gradient"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**make()[0], **change})
