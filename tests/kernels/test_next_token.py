"""The most likely token and log-probabilities: against the written-out forms, ties, what is blocked, and numbers that are not finite."""

from __future__ import annotations

import pytest
import torch

from kernels.next_token import cpu, eager, greedy, logprobs, reference

BACKENDS = pytest.mark.parametrize("backend", [cpu, eager], ids=["cpu", "eager"])


@BACKENDS
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 7), (20, 2048), (2, 100_003), (5, 33)])  # 16 a vector, 1024 a sum
def test_against_the_definition(backend, rows, size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    wide = 5 * torch.randn(rows, size + 3)
    logits = wide[:, :size]  # rows apart
    logits[:, size // 2] = logits.amax(dim=1)  # equals: the first wins
    for blocked in (None, torch.rand(size) < 0.3, torch.rand(rows, size) < 0.3, torch.ones(size, dtype=torch.bool)):
        (ids, found), (expected, exact) = backend.greedy(logits, blocked), reference.greedy(logits.double(), blocked)
        assert torch.equal(ids, expected)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-6)  # logits of up to 25; measured: below 2e-6 in all
        assert torch.equal(backend.logprobs(logits, ids[:, None])[:, 0], found)
    several = torch.randint(size, (rows, 4))
    torch.testing.assert_close(
        backend.logprobs(logits, several).double(), reference.logprobs(logits.double(), several), rtol=1e-6, atol=2e-6
    )


def test_a_row_has_the_same_bits_in_any_company():
    logits = torch.randn(9, 1000)
    ids, found = cpu.greedy(logits)
    for row in range(9):
        alone = cpu.greedy(logits[row : row + 1].clone())
        assert torch.equal(alone[0], ids[row : row + 1]) and torch.equal(alone[1], found[row : row + 1])


@BACKENDS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 20, 39])
def test_rows_that_are_not_finite_say_so(backend, value, at):
    logits = torch.randn(2, 40)
    logits[1, at] = value
    found = backend.greedy(logits)[1]
    assert found[0].isfinite() and not found[1].isfinite()
    logits[1] = -torch.inf
    assert not backend.greedy(logits)[1][1].isfinite()


def test_tokens_of_no_mass():
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf]])
    assert greedy(logits)[0].tolist() == [1] and greedy(logits)[1].tolist() == [0.0]
    assert logprobs(logits, torch.tensor([[0, 1]])).tolist() == [[-torch.inf, 0.0]]


def test_what_is_left_to_eager():
    for dtype in (torch.float64, torch.bfloat16):
        logits = torch.randn(3, 50).to(dtype)
        assert greedy(logits)[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logprobs(torch.randn(3, 50, requires_grad=True), torch.zeros(3, 1, dtype=torch.int64)).requires_grad


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"greedy: blocked has shape \(4,\)"):
        greedy(torch.zeros(2, 5), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"logprobs: ids has shape \(3,\); expected \(B, n\) with B = 2"):
        logprobs(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))
