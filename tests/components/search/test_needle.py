"""Needle documents and their perplexity: only the answer counts, by a model that knows nothing, one that copies, and a real one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from components.contracts import Batch, ModelOutput, UserError
from components.data.tokenizers import bytes_tokenizer
from components.search.needle import answer_losses, guess_perplexity, needle_perplexity, needles, token_perplexity
from tests.components.models.conftest import build

TOKENIZER = bytes_tokenizer()
TEXT = list(b"It was the best of times, it was the worst of times. " * 200)


def documents(length: int = 300, count: int = 4, depths=(0.0,), seed: int = 0):
    return needles(TEXT, TOKENIZER, length, count, depths, seed)


class Table(nn.Module):
    """Logits that depend on the position alone: table (T, V)."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.head_weight = table, table

    def forward(self, batch: Batch, state=None) -> ModelOutput:
        return ModelOutput(self.table[None, : batch.input_ids.shape[1]].expand(len(batch.input_ids), -1, -1))

    def logits(self, hidden):
        return hidden


def test_a_document_is_its_length_and_holds_needle_question_and_answer():
    for document, depth in zip(documents(depths=(0.0, 0.5, 1.0), count=3), (0.0, 0.5, 1.0), strict=True):
        text = TOKENIZER.decode(document.ids[1:])
        value = text[-7:]
        assert len(document.ids) == 300 and document.ids[0] == TOKENIZER.eot_id and document.depth == depth
        assert value.isdigit() and value[0] != "0" and document.answer_tokens == 8 and text.count(value) == 2
        fact = text.index("One of the special magic numbers for")
        assert text.index("Remember it.") < fact < text.index("What is the special magic number for")
        before, after = text[:fact].count("times"), text[fact:].count("times")
        assert (before == 0) == (depth == 0) and (after == 0) == (depth == 1)


def test_documents_follow_the_seed_and_share_no_text():
    assert documents() == documents() and documents() != documents(seed=1)
    first, second = (document.ids for document in documents(count=2))
    assert first != second


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary():
    even = Table(torch.zeros(300, 320))
    for objective in (needle_perplexity(documents(), rows=3), token_perplexity(documents(), rows=3, at_once=50)):
        assert objective(even) == pytest.approx(320, rel=1e-6)


def test_a_model_that_copies_has_perplexity_one():
    document = documents(count=1)
    table = 100.0 * nn.functional.one_hot(torch.tensor(document[0].ids[1:]), 320).float()
    assert needle_perplexity(document)(Table(table)) == pytest.approx(1, abs=1e-6)
    assert token_perplexity(document)(Table(table)) == pytest.approx(1, abs=1e-6)


def test_guessing_the_number_is_the_even_choice_among_seven_digits():
    """A model that gives each digit that may stand there the same chance: nine for the first, ten for the others; the space is sure."""
    some = documents(count=1)
    table = torch.full((300, 320), -50.0)
    for place in range(7):
        table[300 - 1 - 7 + place, [ord(digit) for digit in ("123456789" if place == 0 else "0123456789")]] = 0.0
    table[300 - 1 - 8, ord(" ")] = 0.0
    assert some[0].answer_tokens == 8
    assert needle_perplexity(some)(Table(table)) == pytest.approx(guess_perplexity(some), rel=1e-6) == pytest.approx(9e6 ** (1 / 8))


def test_only_the_answer_counts():
    some = documents()
    table = torch.randn(300, 320, generator=torch.Generator().manual_seed(0))
    before = needle_perplexity(some)(Table(table))
    changed = table.clone()
    changed[: 300 - 1 - some[0].answer_tokens] += torch.randn(300 - 1 - 8, 320)
    assert needle_perplexity(some)(Table(changed)) == before
    assert token_perplexity(some)(Table(changed)) != token_perplexity(some)(Table(table))
    table[-2] += torch.arange(320.0)  # which predicts the last digit
    assert needle_perplexity(some)(Table(table)) != before


def test_a_real_model_by_all_its_logits():
    model, some = build("phi4mini"), documents(length=280, count=3)
    with torch.no_grad():
        losses = []
        for document in some:
            ids = torch.tensor([document.ids])
            logprobs = model.logits(model(Batch(ids)).hidden).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            losses.append(-logprobs[-document.answer_tokens :])
    for found, expected in zip(answer_losses(model, some, rows=2), losses, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert needle_perplexity(some)(model) == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)


def test_too_short_and_too_little():
    with pytest.raises(UserError, match=r"task.length: 100; a needle, its question and its answer alone take \d+ tokens"):
        documents(length=100)
    with pytest.raises(UserError, match=r"data: 10,600 tokens of text; 200 documents of 300 tokens need up to 60,000"):
        documents(count=200)
