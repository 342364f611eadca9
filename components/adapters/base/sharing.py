"""What the tasks of an adapter share: how each mixes what is common, and how alike their updates of the weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from components.adapters.base.wrapping import AdapterLayer, adapter_layers


@torch.no_grad()
def cosines(layer: AdapterLayer) -> Tensor:
    """Cosine between the updates that a layer with `factors(task)` makes for its tasks, as vectors: (T, T) float64; 0 for one of zero."""
    ups, down = _factors(layer)
    inner = torch.einsum("tor,uor->tu", ups @ (down @ down.T), ups)  # <up_t down, up_u down>
    length = inner.diagonal().clamp_min(0).sqrt()
    lengths = length[:, None] * length
    return torch.where(lengths > 0, inner / lengths, 0.0)


def _factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """(T, out, r) and (r, in), float64: their products are the tasks' updates."""
    factors = [layer.factors(task) for task in range(len(layer.task_ids))]  # type: ignore[operator]
    return torch.stack([up for up, _ in factors]).double(), factors[0][1].double()


@torch.no_grad()
def sharing(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name of each wrapped module whose layer has `shares()` and `factors(task)`, plain lists:

    shares: T x n, weights with which each task mixes the n common parts. cosine: T x T, between the tasks' updates of the weight as
    vectors; 0 for an update of zero. effective_rank: T numbers from 1 to r, exp of the entropy of the update's normalised singular values
    (Roy & Vetterli, EUSIPCO 2007); 0 for an update of zero. No (out, in) matrix is made.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, layer in adapter_layers(model):
        if not hasattr(layer, "factors"):
            continue
        ups, down = _factors(layer)
        # Singular values of up @ down are those of the two triangular factors' product.
        values = torch.linalg.svdvals(torch.linalg.qr(ups).R @ torch.linalg.qr(down.T).R.T)  # (T, r)
        share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        rank = torch.where(values.sum(-1) > 0, torch.special.entr(share).sum(-1).exp(), 0.0)
        found[name] = {
            "shares": layer.shares().tolist(),  # type: ignore[operator]
            "cosine": cosines(layer).tolist(),
            "effective_rank": rank.tolist(),
        }
    return found
