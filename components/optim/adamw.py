"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's own, fused where it can be, with groups by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from components.contracts import NamedParameter, UserError
from components.optim.groups import build_groups, check_betas, check_positive

STATE_BYTES = 8  # two float32 moments an element


def adamw(
    parameters: list[NamedParameter],
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    no_decay_roles: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]],
    fused: bool | None,
) -> torch.optim.AdamW:
    """Build torch.optim.AdamW over groups by role.

    lr: peak learning rate. betas: decay rates of the two moments. weight_decay: decoupled, applied as 1 - lr * weight_decay.
    no_decay_roles: roles without weight decay. overrides: see `build_groups`.
    fused: one kernel for all tensors; None takes it wherever torch has it (floating parameters on CPU or CUDA).
    Raises UserError for values out of range and for overrides that match nothing.
    """
    check_positive(lr=lr, eps=eps, weight_decay=weight_decay)
    betas = check_betas("betas", betas)
    can_fuse = all(p.parameter.is_floating_point() and p.parameter.device.type in ("cpu", "cuda") for p in parameters)
    if fused and not can_fuse:
        raise UserError("optimizer.fused: true; every parameter must be floating point and on a CPU or a CUDA device; set it to null")
    settings = {"lr": float(lr), "weight_decay": float(weight_decay), "bytes_per_element": STATE_BYTES}
    groups = build_groups(parameters, {"adamw": settings}, lambda _: "adamw", no_decay_roles, overrides)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=can_fuse if fused is None else fused)
