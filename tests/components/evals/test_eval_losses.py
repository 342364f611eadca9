"""Loss by position and retention, through the real engine: against the model's own logits under the regime of each row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exams import TEXT, TOKENIZER, exam

from components.contracts import Batch, UserError
from components.evals.base import Row
from components.evals.losses import PositionLoss, Retention
from components.evals.ruler import RulerLite
from components.rope.longrope import LongRope2
from framework.engines.native import NativeEngine
from tests.components.models.conftest import MODELS, build, lively

RULE = {"factor": 4.0, "factors": None, "short_factors": None, "rcd": "auto", "attention_factor": {"policy": "both", "value": 1.3}}


def engine(model) -> NativeEngine:
    return NativeEngine(model.eval(), TOKENIZER, prefill_chunk=32)  # so that long rows go through the cache


def direct(model, ids: list[int]) -> torch.Tensor:
    """Losses of ids[1:] by one forward."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model.logits(model(Batch(tokens[:, :-1])).hidden).float()
    return -logits.log_softmax(-1)[0].gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_loss_by_position_is_that_of_every_model(name):
    model = lively(build(name))
    rows = list(PositionLoss(length=50, rows=3, buckets=4).rows(exam(engine(model))))
    assert [(row.length, row.record["row"]) for row in rows] == [(end, i) for i in range(3) for end in (12, 25, 38, 50)]
    for i in range(3):
        losses = direct(model, TEXT[50 * i : 50 * i + 51])
        for row, (start, end) in zip(rows[4 * i : 4 * i + 4], ((0, 12), (12, 25), (25, 38), (38, 50)), strict=True):
            assert row.values["loss"] == pytest.approx(losses[start:end].mean().item(), abs=1e-4)


@pytest.mark.parametrize(("length", "regime"), [(64, 0), (65, 1)])
def test_rows_are_measured_under_the_regime_of_their_length(length, regime):
    model = lively(build("phi4mini", rope=LongRope2(**RULE, switch="recompute")))
    assert model.rope_spec.bounds == (64,)
    (row,) = PositionLoss(length=length, rows=1, buckets=1).rows(exam(engine(model)))
    spec = model.rope_spec
    expected = {}
    for word in ("always_short", "always_long"):
        model.set_rope(spec.switched(word))
        expected[word] = direct(model, TEXT[: length + 1]).mean().item()
    assert row.values["loss"] == pytest.approx(expected[("always_short", "always_long")[regime]], abs=1e-5)
    assert abs(expected["always_short"] - expected["always_long"]) > 1e-3


def test_a_model_that_knows_nothing_loses_the_logarithm_of_the_vocabulary():
    model = build("phi4mini")
    torch.nn.init.zeros_(model.head_weight)
    for row in PositionLoss(length=None, rows=2, buckets=8).rows(exam(engine(model), trained_length=20)):
        assert row.values["loss"] == pytest.approx(math.log(model.vocab_size), abs=1e-6) and row.length <= 80


@pytest.mark.parametrize("blank", [False, True])
def test_the_loss_of_an_answer_is_that_of_its_tokens_under_the_regime_of_its_text(blank):
    """Of a model that knows nothing: the logarithm of its vocabulary."""
    model = lively(build("phi4mini", max_length=400, rope=LongRope2(**RULE, switch="recompute")))
    if blank:
        torch.nn.init.zeros_(model.head_weight)
    asked = RulerLite(["niah_single"], [400, 460], [0.5], 2, "text", 1, {"niah_single": 8}, True)
    given = exam(engine(model))
    items = {(item.length, item.expected): item for item in asked.items(given)}
    rows = list(asked.rows(given))
    assert len(rows) == len(items) == 4 and model.rope_spec.bounds == (400,)
    for row in rows:
        item = items[row.length, tuple(row.record["expected"])]
        losses = direct(model, [*item.prompt, *item.answer])[-len(item.answer) :]
        expected = math.log(model.vocab_size) if blank else losses.mean().item()
        assert row.values["answer_loss"] == pytest.approx(expected, abs=1e-6 if blank else 1e-4)
        assert len(item.prompt) + len(item.answer) == item.length  # 8 bytes: the whole text is as long as its cell says


def test_retention_is_the_ratio_of_losses_on_the_same_rows():
    model, other = lively(build("phi4mini")), lively(build("phi4mini", seed=1))
    asked = []

    def another(path):
        asked.append(path)
        return exam(engine(other), trained_length=40)

    evaluation = Retention(base="runs/base", length=None, rows=5)
    rows = list(evaluation.rows(exam(engine(model), trained_length=160, another=another)))
    assert asked == ["runs/base"] and {row.length for row in rows} == {40} and len(rows) == 5
    parts = [TEXT[40 * i : 40 * i + 41] for i in range(5)]
    own, base = (np.array([direct(one, ids).double().mean() for ids in parts]) for one in (model, other))
    np.testing.assert_allclose([row.values["loss"] for row in rows], own, atol=1e-4)
    np.testing.assert_allclose([row.values["base_loss"] for row in rows], base, atol=1e-4)
    figures, line = evaluation.summary(rows)
    assert figures["loss_ratio"] == pytest.approx(own.sum() / base.sum(), abs=1e-4)
    assert f"{100 * figures['loss_ratio']:.1f} %" in line


def test_the_error_of_the_ratio_by_hand():
    """Losses 1, 2, 3 over 1, 2, 6: ratio 2/3, residuals 1/3, 2/3, -1 with deviation sqrt(7/9), over sqrt(3) and the mean 3."""
    rows = [Row("retention", 8, None, {"loss": a, "base_loss": b}) for a, b in ((1.0, 1.0), (2.0, 2.0), (3.0, 6.0))]
    figures, _ = Retention(None, None, 3).summary(rows)
    assert figures == pytest.approx({"loss_ratio": 2 / 3, "loss_ratio_error": math.sqrt(7 / 9) / 3 / math.sqrt(3)})


def test_bad_values_are_refused():
    with pytest.raises(UserError, match=r"eval.buckets: 0; must be a whole number of at least 1"):
        PositionLoss(length=None, rows=2, buckets=0)
    with pytest.raises(UserError, match=r"eval.length: 4; must be a whole number of at least 8"):
        PositionLoss(length=4, rows=2, buckets=8)
    with pytest.raises(UserError, match=r"eval.buckets: 16 stretches of 8 tokens; at most 8"):
        list(PositionLoss(length=None, rows=2, buckets=16).rows(exam(trained_length=2)))
    with pytest.raises(UserError, match=r"eval.rows: 1; must be a whole number of at least 2"):
        Retention(None, None, 1)
    with pytest.raises(UserError, match=r"eval.length: 100 tokens; this engine takes at most 99"):
        list(PositionLoss(length=100, rows=1, buckets=2).rows(exam(limit=99)))
