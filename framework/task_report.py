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

    Also returns the (T, T) table; ({}, []) for fewer than two tasks, and where the gradients would take more than MOST_BYTES.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if len(sets) < 2 or 4 * trainable * len(sets) > MOST_BYTES:
        return {}, []
    with torch.enable_grad():
        table = cosines([gradients(model, batches, device) for batches in sets.values()])
    pairs = [table[i][k] for i, k in combinations(range(len(table)), 2)]
    return {
        "tasks/gradient_cosine": sum(pairs) / len(pairs),
        "tasks/gradient_conflicts": sum(value < 0 for value in pairs) / len(pairs),
    }, table


def draw(run_dir: Path, tasks: list[str], table: list[list[float]], shared: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Heat maps: interference.png, cosines of gradients; sharing.png, of updates; mixture.png, how each task mixes the common parts.

    shared: of an adapter that says so (`components.adapters.base.sharing`), by module; the pictures show means over the modules.
    """
    made = []
    if table:
        made.append(run_dir / "interference.png")
        heat_map({"gradient_cosine": table}, tasks, tasks, ("", ""), made[-1], "cosine of the tasks' gradients of held-out loss")
    if shared:
        alike = torch.tensor([about["cosine"] for about in shared.values()]).mean(0).tolist()
        made.append(run_dir / "sharing.png")
        heat_map({"update_cosine": alike}, tasks, tasks, ("", ""), made[-1], "cosine of the tasks' weight updates, mean over modules")
        mixture = torch.tensor([about["shares"] for about in shared.values()]).mean(0).tolist()
        made.append(run_dir / "mixture.png")
        parts = [str(i + 1) for i in range(len(mixture[0]))]
        heat_map({"mixture_weight": mixture}, tasks, parts, ("", "common part"), made[-1], "weight of each part, mean over modules")
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
