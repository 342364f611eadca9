"""From an objective of models to one of RoPE factors, and from found factors to what other programs load."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from components.contracts import RopeSpec
from components.search.needle import Needle, Objective
from components.search.space import Vector

MakeSpec = Callable[[list[float]], RopeSpec]  # factors (rotary_dim/2) -> how the model is to turn with them


@contextlib.contextmanager
def turned_by(model: Any, spec: RopeSpec) -> Iterator[None]:
    """Let the model turn by `spec` inside; afterwards, also after an error, it turns as before."""
    before = model.rope_spec
    try:
        model.set_rope(spec)
        yield
    finally:
        model.set_rope(before)


def of_factors(objective: Objective, model: Any, make_spec: MakeSpec) -> Callable[[Vector, int], float]:
    """`objective` as a function of factors (rotary_dim/2,) and r, which they imply; between its calls the model turns as before."""

    def score(factors: Vector, r: int) -> float:
        with turned_by(model, make_spec(factors.tolist())):
            return objective(model)

    return score


def factor_block(spec: RopeSpec, partial_rotary_factor: float) -> dict[str, Any]:
    """`rope_parameters` of a config.json, as transformers and vLLM read them; they have one attention factor for rows of all lengths.

    spec: of two tables, the first for rows of up to original_len tokens. partial_rotary_factor: share of a head that turns.

    >>> from components.contracts import RopeRegime
    >>> spec = RopeSpec(4, 1e4, (RopeRegime(upto=64), RopeRegime((1.5, 2.0), 1.1)), original_len=64, target_len=128)
    >>> block = factor_block(spec, 1.0)
    >>> block["short_factor"], block["long_factor"], block["factor"], block["attention_factor"]
    ([1.0, 1.0], [1.5, 2.0], 2.0, 1.1)
    """
    assert spec.original_len is not None and spec.target_len is not None
    return {
        "rope_type": "longrope",
        "short_factor": list(spec.regimes[0].factors or (1.0,) * (spec.rotary_dim // 2)),
        "long_factor": list(spec.factors or (1.0,) * (spec.rotary_dim // 2)),
        "factor": spec.target_len / spec.original_len,
        "original_max_position_embeddings": spec.original_len,
        "attention_factor": spec.attention_factor,
        "rope_theta": spec.base,
        "partial_rotary_factor": partial_rotary_factor,
    }


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of SHA-256 over names, shapes, dtypes and values of everything in the state dict."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def documents_digest(documents: Sequence[Needle]) -> str:
    """16 hex digits of SHA-256 over tokens and answers."""
    found = hashlib.sha256()
    for document in documents:
        found.update(f"{len(document.ids)} {document.answer_tokens}\n".encode())
        found.update(np.asarray(document.ids, dtype=np.int64).tobytes())
    return found.hexdigest()[:16]
