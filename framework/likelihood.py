"""How likely a model finds the labels of batches: what a task measures at its end and `task=measure` without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from components.contracts import IGNORE, Batch
from components.losses.lm import nll_sum

ROWS = 1024  # of logits at a time


@torch.no_grad()
def label_likelihood(model: Any, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """{loss: nats a label, accuracy: share of labels that the model finds most likely, labels}; {} where nothing is a label.

    Whoever calls sets precision and evaluation mode.
    """
    nll, right, tokens = 0.0, 0, 0
    for batch in batches:
        batch = batch.to(device)
        assert batch.labels is not None
        counted = batch.labels != IGNORE
        hidden, labels = model(batch).hidden[counted], batch.labels[counted]  # (M, D), (M,)
        nll += float(nll_sum(hidden[None], model.head_weight, labels[None])[0])
        for rows, wanted in zip(hidden.split(ROWS), labels.split(ROWS)):
            right += int((model.logits(rows).argmax(dim=1) == wanted).sum())
        tokens += len(labels)
    return {"loss": nll / tokens, "accuracy": right / tokens, "labels": tokens} if tokens else {}


def in_words(figures: Mapping[str, float]) -> str:
    """Figures as a line: accuracy is that of single tokens, each after the right ones before it.

    >>> in_words({"loss": 1.5, "accuracy": 0.25})
    'loss 1.5000, token accuracy 0.2500'
    """
    return ", ".join(f"{'token accuracy' if key == 'accuracy' else key.replace('_', ' ')} {value:.4f}" for key, value in figures.items())
