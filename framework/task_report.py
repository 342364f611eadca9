"""What a run on several tasks says of them at its end: their mean, whether they pull the shared parameters apart, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.contracts import IGNORE, Batch
from components.losses.lm import next_token_loss
from framework.evaluation_plots import heat_map

BATCHES = 8  # held-out batches of each task that the gradients are of
ABOUT = ("shares", "cosine", "effective_rank")  # what an adapter says of a module
MOST_BYTES = 2**31  # of all tasks' gradients together; with more, they are not compared


def means(measured: Mapping[str, float], tasks: Iterable[str]) -> dict[str, float]:
    """tasks/loss and tasks/accuracy: means over the tasks of eval/NAME/..., each task counting alike.

    >>> means({"eval/a/loss": 1.0, "eval/b/loss": 3.0}, ["a", "b"])
    {'tasks/loss': 2.0}
    """
    found = {key: [measured[f"eval/{name}/{key}"] for name in tasks if f"eval/{name}/{key}" in measured] for key in ("loss", "accuracy")}
    return {f"tasks/{key}": sum(values) / len(values) for key, values in found.items() if values}


def gradients(model: Any, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Gradient of a task's mean held-out loss, over its first batches, by all trainable parameters: (parameters,) float32 on the CPU."""
    some = [batch.to(device) for batch, _ in zip(batches, range(BATCHES))]
    counted = sum(int((batch.labels != IGNORE).sum()) for batch in some if batch.labels is not None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros(p.numel()) for p in parameters]
    for batch in some:
        assert batch.labels is not None
        loss = next_token_loss(model(batch).hidden, model.head_weight, batch.labels, counted)
        for kept, grad in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                kept += grad.detach().float().flatten().cpu()
    return torch.cat(total)


def cosines(found: list[Tensor]) -> list[list[float]]:
    """Cosine of each two gradients over the entries that neither has at zero: those of the parameters that both tasks use. (T, T).

    >>> cosines([torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 5.0, -1.0])])
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    table = [[1.0] * len(found) for _ in found]
    for i, k in combinations(range(len(found)), 2):
        both = (found[i] != 0) & (found[k] != 0)
        a, b = found[i][both].double(), found[k][both].double()
        table[i][k] = table[k][i] = float(a @ b / (a.norm() * b.norm())) if len(a) else 0.0
    return table


def interference(model: Any, sets: Mapping[str, Iterable[Batch]], device: torch.device) -> tuple[dict[str, float], list[list[float]]]:
    """Do the tasks' gradients agree? tasks/gradient_cosine: mean over all pairs; tasks/gradient_conflicts: share of pairs below 0.

    Also returns the (T, T) table; ({}, []) for fewer than two tasks, where no two of them use a trained parameter in common, and where
    the gradients would take more than MOST_BYTES.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if len(sets) < 2 or 4 * trainable * len(sets) > MOST_BYTES:
        return {}, []
    with torch.enable_grad():
        found = [gradients(model, batches, device) for batches in sets.values()]
    if not any(bool(((one != 0) & (other != 0)).any()) for one, other in combinations(found, 2)):
        return {}, []
    table = cosines(found)
    pairs = [table[i][k] for i, k in combinations(range(len(table)), 2)]
    return {
        "tasks/gradient_cosine": sum(pairs) / len(pairs),
        "tasks/gradient_conflicts": sum(value < 0 for value in pairs) / len(pairs),
    }, table


def by_layer(shared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Means over the modules of each layer: `shares` (T, n), `cosine`, of a task's update with those of the others, and
    `effective_rank`, (T,) each, float64. A layer is the first number in a module's name; one without a number stands under its own name.

    >>> about = {"shares": [[1.0]], "cosine": [[1.0]], "effective_rank": [2.0]}
    >>> {layer: found["effective_rank"].tolist() for layer, found in by_layer({"layers.7.up": about, "layers.7.down": about}).items()}
    {'7': [2.0]}
    """
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for name, about in shared.items():
        layers.setdefault(next((part for part in name.split(".") if part.isdecimal()), name), []).append(about)
    found = {}
    for layer, modules in layers.items():
        shares, cosine, rank = (torch.tensor([m[key] for m in modules], dtype=torch.float64).mean(0) for key in ABOUT)
        others = (cosine.sum(-1) - cosine.diagonal()) / max(len(cosine) - 1, 1)
        found[layer] = {"shares": shares, "cosine": others, "effective_rank": rank}
    return found


def draw(run_dir: Path, tasks: list[str], table: list[list[float]], shared: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Heat maps. interference.png: cosines of gradients. Of an adapter that says what its tasks share
    (`components.adapters.base.sharing`, by module): sharing.png, cosines of updates, mean over the modules; mixture.png, how each task
    mixes the common parts, and sharing_layers.png, cosines and effective ranks of updates, both layer by layer.
    """
    made = []
    if table:
        made.append(run_dir / "interference.png")
        heat_map({"gradient_cosine": table}, tasks, tasks, ("", ""), made[-1], "cosine of the tasks' gradients of held-out loss")
    if shared:
        alike = torch.tensor([about["cosine"] for about in shared.values()]).mean(0).tolist()
        made.append(run_dir / "sharing.png")
        heat_map({"update_cosine": alike}, tasks, tasks, ("", ""), made[-1], "cosine of the tasks' weight updates, mean over modules")
        layers = by_layer(shared)
        shares = torch.stack([found["shares"] for found in layers.values()])  # (layers, T, n)
        parts = {f"part_{i + 1}_weight": part.tolist() for i, part in enumerate(shares.unbind(-1))}
        made.append(run_dir / "mixture.png")
        heat_map(parts, list(layers), tasks, ("layer", ""), made[-1], "weight of each common part in each layer")
        figures = {
            "update_cosine": [found["cosine"].tolist() for found in layers.values()],
            "effective_rank": [found["effective_rank"].tolist() for found in layers.values()],
        }
        made.append(run_dir / "sharing_layers.png")
        heat_map(figures, list(layers), tasks, ("layer", ""), made[-1], "a task's update: mean cosine with the others', effective rank")
    return made


def sharing_figures(shared: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """tasks/update_cosine, mean over pairs of tasks and modules, and tasks/effective_rank, mean over tasks and modules; {} for nothing."""
    if not shared:
        return {}
    alike = torch.tensor([about["cosine"] for about in shared.values()], dtype=torch.float64)
    ranks = torch.tensor([about["effective_rank"] for about in shared.values()], dtype=torch.float64)
    count = alike.shape[-1]
    off = alike.sum() - alike.diagonal(dim1=1, dim2=2).sum()
    pairs = len(alike) * count * (count - 1)
    return {**({"tasks/update_cosine": float(off / pairs)} if pairs else {}), "tasks/effective_rank": float(ranks.mean())}
