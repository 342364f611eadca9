"""COSMOS (arXiv 2502.17410): Adam in the leading eigenspace of a matrix's gradients, Muon in the rest; AdamW for what is no matrix.

The update is `components.optim.cosmos_update`; groups, dtypes, checkpoints and the AdamW part are those of `components.optim.hybrid`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from components.contracts import NamedParameter, UserError
from components.optim.cosmos_update import Settings, State, cosmos_update, first_basis
from components.optim.groups import check_betas, check_positive
from components.optim.hybrid import HybridOptimizer, Shape, adamw_settings, descend, matrices
from components.optim.muon import NS_DTYPES
from components.optim.sharding import local, row_blocks

QR = ("auto", "qr", "cholesky")
WD_MODES = ("eta", "lr")


class Cosmos(HybridOptimizer):
    """W <- (1 - eta * weight_decay) W - eta D for matrices (m, n), with eta = lr * lr_ratio and D of RMS 1 for every shape and step.

    D is A + gamma * sqrt(m) * B, rescaled: A is Adam on the coordinates in an r-dimensional subspace of the n side, B the orthogonalised
    rest. A step has no size of its own besides eta, so a schedule that ends near 0 is needed, and clipping gradients changes averages only.

    lr: peak rate of the AdamW groups (eta_0 in the paper). lr_ratio: eta / lr; with 0.2 a matrix moves as with AdamW or Muon at that lr.
    betas: of momentum M and of second moments V and S, for both kinds.
    rank: r; a number below 1 is a share of n, rounded up. A matrix with n < r has r = n and no rest; a rank above every n is refused.
    gamma: weight of B; None takes lr_ratio. eps: outside the root, for both kinds.
    nesterov: ((1 - beta1) G + beta1 M) / (1 - beta1^(t+1)) in place of M / (1 - beta1^t).
    weight_decay: of both kinds. wd_mode: `eta` decays matrices by eta * weight_decay, `lr` by lr * weight_decay, as AdamW's.
    rel_floor, residual_tol: guards for gradients of low rank, see `cosmos_update`; 0 turns them off.
    ns_steps, ns_coefficients, ns_dtype: Newton-Schulz, as for Muon. qr: auto | qr | cholesky, see `kernels.orthonormal`.
    compile: the update through torch.compile, sizes as variables: once for lone matrices, once for stacks; not for row shards.
    no_decay_roles, overrides: see `build_groups`. matrix_roles, nonfinite, master_weights, shard, what is raised: see `HybridOptimizer`.
    """

    kind = "cosmos"
    fixed = ("rank",)

    def __init__(
        self, parameters: list[NamedParameter], lr: float, betas: Sequence[float], rank: float, gamma: float | None, lr_ratio: float,
        eps: float, weight_decay: float, wd_mode: str, nesterov: bool, rel_floor: float, residual_tol: float, ns_steps: int,
        ns_coefficients: Sequence[float], ns_dtype: str, qr: str, compile: bool, matrix_roles: Sequence[str],
        no_decay_roles: Sequence[str], overrides: Mapping[str, Mapping[str, Any]], nonfinite: str = "skip", master_weights: bool = False,
        shard: str = "auto",
    ) -> None:  # fmt: skip
        _check_choices(ns_dtype=(ns_dtype, tuple(NS_DTYPES)), qr=(qr, QR), wd_mode=(wd_mode, WD_MODES))
        gamma = lr_ratio if gamma is None else gamma
        check_positive(
            lr=lr, lr_ratio=lr_ratio, gamma=gamma, eps=eps, weight_decay=weight_decay, rel_floor=rel_floor, residual_tol=residual_tol
        )
        if ns_steps != int(ns_steps) or not 1 <= ns_steps <= 100 or len(ns_coefficients) != 3:
            raise UserError(f"optimizer.ns_steps: {ns_steps}; must be a whole number in 1..100, with three optimizer.ns_coefficients")
        if wd_mode == "lr" and not lr_ratio:
            raise UserError("optimizer.wd_mode: lr; with optimizer.lr_ratio=0 matrices have no rate to decay by; use another lr_ratio")
        own = {
            "lr": lr * lr_ratio,  # eta
            "decay_ratio": 1.0 if wd_mode == "eta" else 1.0 / lr_ratio,
            "betas": list(check_betas("betas", betas)),
            "rank": _check_rank(rank),
            "gamma": float(gamma),
            "eps": float(eps),
            "weight_decay": float(weight_decay),
            "nesterov": bool(nesterov),
            "rel_floor": float(rel_floor),
            "residual_tol": float(residual_tol),
            "ns_steps": int(ns_steps),
            "ns_coefficients": [float(c) for c in ns_coefficients],
            "ns_dtype": ns_dtype,
            "qr": qr,
        }
        rest = adamw_settings(lr, betas, eps, weight_decay)
        super().__init__(parameters, own, rest, matrix_roles, no_decay_roles, overrides, nonfinite, master_weights, shard)
        widths = [p.shape[-1] for group in self.param_groups if group["kind"] == self.kind for p in group["params"]]
        if widths and rank > max(widths):
            raise UserError(f"optimizer.rank: {rank}; the matrices have at most {max(widths)} columns, and a basis no more than those")
        self._update = torch.compile(cosmos_update, dynamic=True) if compile else cosmos_update

    def state_shapes(self, group: Mapping[str, Any], shape: Shape, blocks: int) -> dict[str, Shape]:
        """M (m, n), U (n, r), S (r, r), V (m, r) of each matrix: m n + n r + r r + m r numbers."""
        count = math.prod(shape[:-2]) * blocks
        n, r = shape[-1], rank_of(group["rank"], shape[-1])
        return {"momentum": shape, "basis": (count, n, r), "gram": (count, r, r), "second": (*shape[:-1], r)}

    def step_matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> None:
        settings, decay = self._settings(group), group["lr"] * group["decay_ratio"] * group["weight_decay"]
        for (_, _, _, _, fresh), members in self._buckets(group, params, grads, weights, splits).items():
            grad = torch.stack([member[0] for member in members])
            state = State(*(torch.stack(parts) for parts in zip(*(member[2] for member in members), strict=True)))
            if fresh:
                state = state._replace(basis=first_basis(grad, state.basis.shape[-1]))
            step = torch.stack([member[3] for member in members])
            update = cosmos_update if fresh else self._update  # a first step comes once: not worth compiling
            direction, state = update(grad, state, step, not fresh, settings)
            descend([member[1] for member in members], list(direction.unbind()), group["lr"], decay)
            for held, new in zip(zip(*(member[2] for member in members), strict=True), state, strict=True):
                torch._foreach_copy_(list(held), list(new.unbind()))

    def step_rows(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> None:
        """M and V are sharded as the rows are, U and S whole in every process; one block after the other, in the same order in all."""
        settings = self._settings(group)
        directions = [torch.empty_like(grad, memory_format=torch.contiguous_format) for grad in grads]
        for p, grad, direction, rows in zip(params, grads, directions, splits, strict=True):
            fresh = "momentum" not in self.state[p]
            if fresh:
                self._allocate(p, self.state_shapes(group, tuple(p.shape), max(1, len(rows))), grad.dtype)
            momentum, basis, gram, second = (local(self.state[p][key]) for key in State._fields)
            for i, (here, where) in enumerate(row_blocks(p, rows)):
                g, step = grad[here][None], self.state[p]["step"][None]
                held = State(momentum[here][None], basis[i : i + 1], gram[i : i + 1], second[here][None])
                state = held._replace(basis=first_basis(g, basis.shape[-1], where)) if fresh else held
                moved, state = cosmos_update(g, state, step, not fresh, settings, where)
                direction[here] = moved[0]
                torch._foreach_copy_(list(held), list(state))
        descend(weights, directions, group["lr"], group["lr"] * group["decay_ratio"] * group["weight_decay"])

    def _settings(self, group: Mapping[str, Any]) -> Settings:
        same = {key: group[key] for key in Settings._fields if key in group}
        special = {"ns_coefficients": tuple(group["ns_coefficients"]), "ns_dtype": NS_DTYPES[group["ns_dtype"]]}
        return Settings(*group["betas"], **{**same, **special})

    def _buckets(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> dict[tuple[Any, ...], list[tuple[Tensor, Tensor, State, Tensor]]]:
        """Matrices of one shape, dtype and device: (gradient, weight, state, step counter), all views."""
        buckets: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, State, Tensor]]] = defaultdict(list)
        for p, grad, weight, rows in zip(params, grads, weights, splits, strict=True):
            fresh = "momentum" not in self.state[p]
            if fresh:
                self._allocate(p, self.state_shapes(group, tuple(p.shape), max(1, len(rows))), grad.dtype)
            state = {key: local(value) for key, value in self.state[p].items()}
            parts = zip(
                matrices(grad, rows), matrices(weight, rows), matrices(state["momentum"], rows), state["basis"], state["gram"],
                matrices(state["second"], rows), strict=True,
            )  # fmt: skip
            for g, w, m, u, s, v in parts:
                buckets[*g.shape, g.dtype, g.device, fresh].append((g, w, State(m, u, s, v), state["step"]))
        return buckets


def rank_of(rank: float, n: int) -> int:
    """r of a matrix with n columns: the rank, or that share of n where it is below 1, and n at most."""
    return min(n, math.ceil(rank * n) if rank < 1 else int(rank))


def _check_rank(rank: float) -> float:
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not 0 < rank < math.inf or (rank > 1 and rank != int(rank)):
        raise UserError(f"optimizer.rank: {rank}; must be a whole number >= 1, or a share of a matrix's columns in (0, 1)")
    return rank if rank < 1 else int(rank)


def _check_choices(**values: tuple[str, tuple[str, ...]]) -> None:
    for key, (value, allowed) in values.items():
        if value not in allowed:
            raise UserError(f"optimizer.{key}: {value}; allowed: {', '.join(allowed)}")
