"""Muon (K. Jordan 2024; at scale: Moonlight, arXiv 2502.16982): momentum, orthogonalised, for the hidden matrices; AdamW for the rest.

Groups, dtypes, checkpoints and the AdamW part are those of `components.optim.hybrid`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from components.contracts import NamedParameter, UserError
from components.optim.groups import check_positive
from components.optim.hybrid import HybridOptimizer, Shape, adamw_settings, descend, matrices
from components.optim.sharding import local, row_blocks
from kernels.newton_schulz import newton_schulz

NS_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SCALES = ("match_rms_adamw", "original")


class Muon(HybridOptimizer):
    """W -= lr * scale(m, n) * NS(momentum) for matrices (m, n) after W *= 1 - lr * weight_decay; AdamW for every other parameter.

    Momentum is an average, B <- momentum * B + (1 - momentum) * G, as in torch.optim.Muon; with Nesterov the step uses
    (1 - momentum) * G + momentum * B. A parameter with `splits` is orthogonalised and scaled block by block.

    parameters: what `components.optim.groups.named_parameters` lists.
    lr: peak rate of the matrices. momentum: in [0, 1). nesterov: look one step ahead. weight_decay: of both kinds.
    ns_steps, ns_coefficients (a, b, c): the Newton-Schulz iteration. ns_dtype: auto | bfloat16 | float32 | float64.
    scale: `match_rms_adamw` is 0.2 * sqrt(max(m, n)), an update of RMS 0.2 * lr for every shape (arXiv 2502.16982, eq. 4);
        `original` is sqrt(max(1, m / n)).
    adamw_lr, adamw_betas, adamw_eps: for what is no matrix. no_decay_roles, overrides: see `build_groups`.
    matrix_roles, nonfinite, master_weights, shard, and what is raised: see `HybridOptimizer`.
    """

    kind = "muon"

    def __init__(
        self,
        parameters: list[NamedParameter],
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        ns_steps: int,
        ns_coefficients: Sequence[float],
        ns_dtype: str,
        scale: str,
        matrix_roles: Sequence[str],
        adamw_lr: float,
        adamw_betas: Sequence[float],
        adamw_eps: float,
        no_decay_roles: Sequence[str],
        overrides: Mapping[str, Mapping[str, Any]],
        nonfinite: str = "skip",
        master_weights: bool = False,
        shard: str = "auto",
    ) -> None:
        check_positive(lr=lr, weight_decay=weight_decay)
        _check_muon(momentum, ns_steps, ns_coefficients, ns_dtype, scale)
        own = {
            "lr": lr,
            "weight_decay": float(weight_decay),
            "momentum": float(momentum),
            "nesterov": bool(nesterov),
            "ns_steps": int(ns_steps),
            "ns_coefficients": [float(c) for c in ns_coefficients],
            "ns_dtype": ns_dtype,
            "scale": scale,
        }
        rest = adamw_settings(adamw_lr, adamw_betas, adamw_eps, weight_decay, prefix="adamw_")
        super().__init__(parameters, own, rest, matrix_roles, no_decay_roles, overrides, nonfinite, master_weights, shard)

    def state_shapes(self, group: Mapping[str, Any], shape: Shape, blocks: int) -> dict[str, Shape]:
        return {"momentum_buffer": shape}

    def step_matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> None:
        if params:
            steps = self._steps(group, self._averaged(group, params, grads), splits)
            descend(weights, steps, group["lr"], group["lr"] * group["weight_decay"])

    def step_rows(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> None:
        """Every process gathers each matrix, orthogonalises it and keeps its own rows: one matrix is whole at a time."""
        updates = self._averaged(group, params, grads)
        for p, update, weight, rows in zip(params, updates, weights, splits, strict=True):
            [(_, where)] = row_blocks(p, ())
            (step,) = self._steps(group, [where.whole(update[None])[0]], [rows])
            descend([weight], [where.own(step[None])[0]], group["lr"], group["lr"] * group["weight_decay"])

    def _averaged(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor]:
        """Momentum, one step further; with Nesterov looking one ahead."""
        for p, grad in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self._allocate(p, self.state_shapes(group, tuple(p.shape), 1), grad.dtype)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers

    def _steps(self, group: Mapping[str, Any], updates: Sequence[Tensor], splits: Sequence[Sequence[int]]) -> list[Tensor]:
        return orthogonal_steps(
            updates,
            splits,
            scale=group["scale"],
            steps=group["ns_steps"],
            coefficients=tuple(group["ns_coefficients"]),
            dtype=NS_DTYPES[group["ns_dtype"]],
        )


def orthogonal_steps(
    updates: Sequence[Tensor],
    splits: Sequence[Sequence[int]],
    scale: str,
    steps: int,
    coefficients: tuple[float, float, float],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Orthogonalise and scale each update: what one step subtracts, per unit of learning rate.

    updates: tensors (..., m, n), not written to. splits: for each, rows of its fused blocks, or empty.
    All blocks of one shape, either way up, run as one stack: a matrix's result is the same alone and in company.
    """
    out = [torch.empty_like(update, memory_format=torch.contiguous_format) for update in updates]
    stacks: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for update, target, rows in zip(updates, out, splits, strict=True):
        for source, sink in zip(matrices(update, rows), matrices(target, rows), strict=True):
            key = (min(source.shape), max(source.shape), source.dtype, source.device)
            stacks[key].append((source, sink))
    for blocks in stacks.values():
        stack = torch.stack([source.mT if source.shape[0] > source.shape[1] else source for source, _ in blocks])  # (blocks, s, l)
        for done, (source, sink) in zip(newton_schulz(stack, steps, coefficients, dtype=dtype), blocks, strict=True):
            m, n = source.shape
            factor = 0.2 * math.sqrt(max(m, n)) if scale == "match_rms_adamw" else math.sqrt(max(1.0, m / n))
            torch.mul(done.mT if m > n else done, factor, out=sink)
    return out


def _check_muon(momentum: float, ns_steps: int, ns_coefficients: Sequence[float], ns_dtype: str, scale: str) -> None:
    if not 0 <= momentum < 1:
        raise UserError(f"optimizer.momentum: {momentum}; must be in [0, 1)")
    if ns_steps != int(ns_steps) or not 1 <= ns_steps <= 100:
        raise UserError(f"optimizer.ns_steps: {ns_steps}; must be a whole number in 1..100 (5 is usual)")
    if len(ns_coefficients) != 3:
        raise UserError(f"optimizer.ns_coefficients: {list(ns_coefficients)}; must be three numbers, such as [3.4445, -4.775, 2.0315]")
    if ns_dtype not in NS_DTYPES:
        raise UserError(f"optimizer.ns_dtype: {ns_dtype}; allowed: {', '.join(NS_DTYPES)}")
    if scale not in SCALES:
        raise UserError(f"optimizer.scale: {scale}; allowed: {', '.join(SCALES)}")
