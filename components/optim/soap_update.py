"""The arithmetic of SOAP (arXiv 2409.11321) on a stack of equal matrices, without any optimizer around it.

Symbols are the paper's: G gradient (m, n), L and R running means of GG' and G'G, Q_L and Q_R their eigenvectors, M and V moments of the
rotated gradient Q_L' G Q_R. Every tensor has a leading dimension: the matrices of one shape go together, and what a matrix gets does not
depend on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.orthonormal import orthonormal


class Side(NamedTuple):
    """Of one side of b matrices, k long: the running mean L or R (b, k, k), and its basis Q (b, k, k), a vector a column."""

    gram: Tensor
    basis: Tensor


class State(NamedTuple):
    """Of b matrices (m, n), float32 or float64. momentum, second: (b, m, n), rotated. left, right: None where a side is not rotated."""

    momentum: Tensor
    second: Tensor
    left: Side | None
    right: Side | None


class Settings(NamedTuple):
    """What a step needs to know besides the state; see `components.optim.soap.Soap`."""

    beta1: float
    beta2: float
    shampoo_beta: float
    eps: float


def first_sides(grad: Tensor, state: State, settings: Settings) -> State:
    """The state with L, R of the first gradient (b, m, n) and their eigenvectors, largest eigenvalue first; decomposed in float64, once."""

    def side(held: Side | None, gram: Tensor) -> Side | None:
        if held is None:
            return None
        gram = (1 - settings.shampoo_beta) * gram
        return Side(gram, torch.linalg.eigh(gram.double())[1].flip(-1).to(gram.dtype).contiguous())

    left = side(state.left, grad @ grad.mT) if state.left else None
    return state._replace(left=left, right=side(state.right, grad.mT @ grad) if state.right else None)


def soap_update(grad: Tensor, state: State, step: Tensor, settings: Settings, rel_floor: float = 0.0) -> tuple[Tensor, State]:
    """Adam in the rotated coordinates: what a step subtracts (b, m, n) per unit of learning rate, and the new moments.

    grad: (b, m, n). step: (b,), the updates made with this one. Nothing is written in place; bases and L, R stay as they are, so that the
    current gradient is not seen by its own projection. rel_floor: no denominator is below this share of the largest rotated gradient.
    Note: epsilon is added to the root of the bias-corrected V, as in Adam; the reference adds it before the correction.
    """
    step = step.double().view(-1, 1, 1)
    rotated = turn(grad, state.left and state.left.basis, state.right and state.right.basis)
    momentum = torch.lerp(state.momentum, rotated, 1 - settings.beta1)
    second = torch.lerp(state.second, rotated.square(), 1 - settings.beta2)
    scale = (second / (1 - settings.beta2**step).to(grad.dtype)).sqrt_().add_(settings.eps)
    if rel_floor:
        scale = scale.maximum(rel_floor * rotated.abs().amax(dim=(-2, -1), keepdim=True))
    ahead = momentum / (1 - settings.beta1**step).to(grad.dtype)
    ahead = torch.where(scale > 0, ahead / scale, 0.0)  # eps may be 0, and so may a gradient
    return turn(ahead, state.left and state.left.basis.mT, state.right and state.right.basis.mT), state._replace(
        momentum=momentum, second=second
    )


def update_sides(grad: Tensor, state: State, settings: Settings) -> State:
    """The state with the gradient (b, m, n) in L and R. Nothing is written in place."""
    beta = settings.shampoo_beta
    left, right = state.left, state.right
    if left is not None:
        left = left._replace(gram=torch.baddbmm(left.gram, grad, grad.mT, beta=beta, alpha=1 - beta))
    if right is not None:
        right = right._replace(gram=torch.baddbmm(right.gram, grad.mT, grad, beta=beta, alpha=1 - beta))
    return state._replace(left=left, right=right)


def refresh_bases(state: State) -> State:
    """The state with Q_L and Q_R after one power step and QR, and both moments in the new coordinates. Nothing is written in place.

    The old vectors are first sorted by their estimated eigenvalue, diag(Q' L Q), since QR favours those that come first. The second moment
    has no other way into the new coordinates than to follow that order; the momentum is turned exactly.
    """
    left, back_left, order_left = _refresh(state.left)
    right, back_right, order_right = _refresh(state.right)
    second = state.second
    if order_left is not None:
        second = second.gather(-2, order_left.unsqueeze(-1).expand_as(second))
    if order_right is not None:
        second = second.gather(-1, order_right.unsqueeze(-2).expand_as(second))
    return State(turn(state.momentum, back_left, back_right), second, left, right)


def turn(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """left' x right. x: (b, m, n); left: (b, m, m) or None for the identity; right: (b, n, n) or None."""
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def _refresh(side: Side | None) -> tuple[Side | None, Tensor | None, Tensor | None]:
    """The side with its new basis, the turn (b, k, k) from old to new coordinates, and the order (b, k) of the old vectors."""
    if side is None:
        return None, None, None
    power = side.gram @ side.basis
    order = (side.basis * power).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)  # (b, k)
    power = power.gather(-1, order.unsqueeze(-2).expand_as(power))
    basis = orthonormal(power, method="qr")  # whole bases are as ill-conditioned as L itself: Cholesky would break down on them
    return Side(side.gram, basis), side.basis.mT @ basis, order
