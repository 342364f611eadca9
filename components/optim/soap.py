"""SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner for matrices; AdamW for what is no matrix.

The update is `components.optim.soap_update`; groups, dtypes, checkpoints and the AdamW part are those of `components.optim.hybrid`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from components.contracts import NamedParameter, UserError
from components.optim.groups import check_betas, check_positive
from components.optim.hybrid import HybridOptimizer, Shape, adamw_settings, descend, matrices
from components.optim.soap_update import Settings, Side, State, first_sides, refresh_bases, soap_update, update_sides

SIDES = ("both", "input")
FIRST_STEPS = ("initialise", "update")
# Numbers in Q_L and Q_R of the matrices that are stacked into one call. The squares are most of the state, so a stack of everything would
# hold them twice; 2^24 numbers are 64 MiB, eight matrices of 1024 x 1024. On a CPU stacks gain nothing (64 to 256 wide, one thread, within
# 15 % of one matrix at a time); they are for a GPU's launches, where this was not timed.
STACK_ELEMENTS = 2**24
# Least denominator, as a share of the largest coordinate, where a matrix's first gradient is seen in bases made of it: there it is the
# diagonal of its singular values, and all else is rounding noise that Adam would blow up to 1. Distance of a first step from U V', in
# float32, for 64 x 64 and 512 x 512: without a floor 7.8 and 22, with 1e-5 0.41 and 0.93, with 1e-4 0.06 and 0.17.
FIRST_FLOOR = 1e-4


class Soap(HybridOptimizer):
    """W <- (1 - lr * weight_decay) W - lr * Q_L (M / (sqrt(V) + eps)) Q_R' for matrices (m, n), M and V bias-corrected Adam moments of
    Q_L' G Q_R; Q_L and Q_R are eigenvectors of the running means L of G G' and R of G'G.

    lr: peak rate of both kinds. betas: of the moments, for both kinds. shampoo_beta: of L and R; None takes the second of betas.
    eps: outside the root, for both kinds. weight_decay: of both kinds.
    precondition_frequency: steps between two refreshes of the bases, each one power step and QR (the first bases are exact).
    max_precond_dim: a longer side is not rotated. sides: `both`, or `input` for the n side alone (the paper's one-sided variant).
    first_step: `initialise` makes the bases of the first gradient and leaves the matrices where they are, so that no gradient is seen
        by a projection made of it; `update` takes Adam's first step in them at once, which is U V' of the gradient's U S V'.
    no_decay_roles, overrides: see `build_groups`. matrix_roles, nonfinite, master_weights, shard, what is raised: see `HybridOptimizer`.
        Row shards (FSDP2) are refused: both sides of a matrix are needed whole.

    State of a matrix: M (m, n) and V (m, n), both in the rotated coordinates (M is turned at a refresh, which costs less than projecting
    it anew in every step), and for each rotated side of k rows or columns two squares of k^2, kept flat, block after block.
    Note: decay comes before the step, as in torch.optim.AdamW (the reference decays afterwards). `steps_done` of a group counts its
    steps: all its matrices are refreshed together, whatever step a matrix came in at.
    """

    kind = "soap"
    fixed = ("sides", "max_precond_dim")

    def __init__(
        self, parameters: list[NamedParameter], lr: float, betas: Sequence[float], shampoo_beta: float | None, eps: float,
        weight_decay: float, precondition_frequency: int, max_precond_dim: int, sides: str, first_step: str, matrix_roles: Sequence[str],
        no_decay_roles: Sequence[str], overrides: Mapping[str, Mapping[str, Any]], nonfinite: str = "skip", master_weights: bool = False,
        shard: str = "auto",
    ) -> None:  # fmt: skip
        check_positive(lr=lr, eps=eps, weight_decay=weight_decay)
        moments = check_betas("betas", betas)
        _check_soap(moments[1] if shampoo_beta is None else shampoo_beta, precondition_frequency, max_precond_dim, sides, first_step)
        own = {
            "lr": lr,
            "betas": list(moments),
            "shampoo_beta": float(moments[1] if shampoo_beta is None else shampoo_beta),
            "eps": float(eps),
            "weight_decay": float(weight_decay),
            "precondition_frequency": int(precondition_frequency),
            "max_precond_dim": int(max_precond_dim),
            "sides": sides,
            "first_step": first_step,
            "steps_done": 0,  # a Python number: when to refresh must be known without waiting for a device
        }
        rest = adamw_settings(lr, betas, eps, weight_decay)
        super().__init__(parameters, own, rest, matrix_roles, no_decay_roles, overrides, nonfinite, master_weights, shard)

    def state_shapes(self, group: Mapping[str, Any], shape: Shape, blocks: int) -> dict[str, Shape]:
        """The moments only; the squares depend on the rows of each block, see `side_shapes`."""
        return {"momentum": shape, "second": shape}

    def side_shapes(self, group: Mapping[str, Any], shape: Shape, rows: Sequence[int]) -> dict[str, Shape]:
        """Shapes of the squares in the state of a parameter, for the sides that are rotated. rows: of its fused blocks, or empty."""
        lengths = zip(("left", "right"), _lengths(group, shape, rows), strict=True)
        numbers = {side: sum(k * k for k in ks) for side, ks in lengths}
        return {f"{side}{part}": (count,) for side, count in numbers.items() if count for part in ("", "_basis")}

    def state_bytes(self, group: Mapping[str, Any]) -> int:
        total = super().state_bytes(group)
        if group["kind"] == self.kind:
            for p, rows in zip(group["params"], group["splits"], strict=True):
                element = 8 if p.dtype == torch.float64 else 4
                total += element * sum(prod(shape) for shape in self.side_shapes(group, tuple(p.shape), rows).values())
        return total

    def step_matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> None:
        group["steps_done"] = group.get("steps_done", 0) + 1
        waiting = int(group["first_step"] == "initialise")  # steps without an update at a matrix's start
        updates = group["steps_done"] - waiting
        refresh = updates > 0 and updates % group["precondition_frequency"] == 0
        beta1, beta2 = group["betas"]
        settings = Settings(beta1, beta2, group["shampoo_beta"], group["eps"])
        directions = [torch.empty_like(grad, memory_format=torch.contiguous_format) for grad in grads]
        moving = [i for i, p in enumerate(params) if "momentum" in self.state[p] or not waiting]
        for fresh, members in self._stacks(group, params, grads, directions, splits):
            held = [member[2] for member in members]
            grad, state = torch.stack([member[0] for member in members]), _stacked(held)
            state = first_sides(grad, state, settings) if fresh else state
            if not (fresh and waiting):
                step = torch.stack([member[3] for member in members]) - waiting
                direction, state = soap_update(grad, state, step, settings, FIRST_FLOOR if fresh else 0.0)
                torch._foreach_copy_([member[1] for member in members], list(direction.unbind()))
            state = state if fresh else update_sides(grad, state, settings)
            state = refresh_bases(state) if refresh and not fresh else state
            for kept, new in zip(zip(*map(_tensors, held), strict=True), _tensors(state), strict=True):
                torch._foreach_copy_(list(kept), list(new.unbind()))
        moved, steps = ([tensors[i] for i in moving] for tensors in (weights, directions))
        descend(moved, steps, group["lr"], group["lr"] * group["weight_decay"])

    def _stacks(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], directions: list[Tensor], splits: list[list[int]]
    ) -> Iterator[tuple[bool, list[tuple[Tensor, Tensor, State, Tensor]]]]:
        """Matrices of one shape, dtype and device, in stacks of bounded size, and whether they have just come in.

        A matrix is (gradient, where its direction goes, views of its state, its step counter).
        """
        buckets: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, State, Tensor]]] = defaultdict(list)
        for p, grad, direction, rows in zip(params, grads, directions, splits, strict=True):
            fresh = "momentum" not in self.state[p]
            if fresh:
                shapes = {**self.state_shapes(group, tuple(grad.shape), 1), **self.side_shapes(group, tuple(grad.shape), rows)}
                self._allocate(p, shapes, grad.dtype)
            states = self._views(group, p, tuple(grad.shape), rows)
            for g, d, state in zip(matrices(grad, rows), matrices(direction, rows), states, strict=True):
                buckets[*g.shape, g.dtype, g.device, fresh].append((g, d, state, self.state[p]["step"]))
        for (m, n, _, _, fresh), members in buckets.items():
            size = max(1, STACK_ELEMENTS // max(1, m * m + n * n))
            yield from ((fresh, members[i : i + size]) for i in range(0, len(members), size))

    def _views(self, group: Mapping[str, Any], p: Tensor, shape: Shape, rows: Sequence[int]) -> list[State]:
        """The state of each matrix inside a parameter, without copies."""
        held = self.state[p]
        left, right = (
            _squares(held.get(side), held.get(f"{side}_basis"), ks)
            for side, ks in zip(("left", "right"), _lengths(group, shape, rows), strict=True)
        )
        return [State(*parts) for parts in zip(matrices(held["momentum"], rows), matrices(held["second"], rows), left, right, strict=True)]


def _lengths(group: Mapping[str, Any], shape: Shape, rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows, and columns, of each matrix inside a parameter; 0 where the side is not rotated."""
    heights = list(rows) or [shape[-2]] * prod(shape[:-2])
    limit = group["max_precond_dim"]
    left = [m if m <= limit and group["sides"] == "both" else 0 for m in heights]
    return left, [shape[-1] if shape[-1] <= limit else 0] * len(heights)


def _squares(gram: Tensor | None, basis: Tensor | None, lengths: Sequence[int]) -> list[Side | None]:
    """Views (k, k) of two flat tensors that hold one square after another; None for a length of 0."""
    if gram is None or basis is None:
        return [None] * len(lengths)
    areas = [k * k for k in lengths]
    pairs = zip(lengths, gram.split(areas), basis.split(areas), strict=True)
    return [Side(g.view(k, k), q.view(k, k)) if k else None for k, g, q in pairs]


def _tensors(state: State) -> list[Tensor]:
    """The tensors of a state in a fixed order."""
    return [state.momentum, state.second, *(state.left or ()), *(state.right or ())]


def _stacked(states: Sequence[State]) -> State:
    """States of equal matrices as one with a leading dimension."""
    first = states[0]
    parts = iter([torch.stack(same) for same in zip(*map(_tensors, states), strict=True)])
    momentum, second = next(parts), next(parts)
    left, right = (Side(next(parts), next(parts)) if side is not None else None for side in (first.left, first.right))
    return State(momentum, second, left, right)


def _check_soap(shampoo_beta: float, precondition_frequency: int, max_precond_dim: int, sides: str, first_step: str) -> None:
    if not 0 <= shampoo_beta < 1:
        raise UserError(f"optimizer.shampoo_beta: {shampoo_beta}; must be in [0, 1), or null for the second of optimizer.betas")
    for key, value in (("precondition_frequency", precondition_frequency), ("max_precond_dim", max_precond_dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"optimizer.{key}: {value}; must be a whole number >= 1")
    for key, choice, allowed in (("sides", sides, SIDES), ("first_step", first_step, FIRST_STEPS)):
        if choice not in allowed:
            raise UserError(f"optimizer.{key}: {choice}; allowed: {', '.join(allowed)}")
