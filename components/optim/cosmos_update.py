"""The arithmetic of COSMOS (arXiv 2502.17410) on a stack of equal matrices, without any optimizer around it.

Symbols are the paper's: G gradient (m, n), M momentum, U basis (n, r) of the leading eigenspace of the running mean of G'G, S the mean's
r x r part in it, V second moment (m, r) of G U. Every tensor has a leading dimension: the matrices of one shape go together, and what a
matrix gets does not depend on its neighbours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.newton_schulz import newton_schulz
from kernels.orthonormal import orthonormal

# Left out of a compiled update: they choose by shape (higher than wide, long or square), which would compile anew for each, and spend their
# time in library calls that a compiler does not touch.
newton_schulz = torch.compiler.disable(newton_schulz)
orthonormal = torch.compiler.disable(orthonormal)


class State(NamedTuple):
    """Of b matrices (m, n), float32 or float64: momentum M (b, m, n), basis U (b, n, r), gram S (b, r, r), second V (b, m, r)."""

    momentum: Tensor
    basis: Tensor
    gram: Tensor
    second: Tensor


class Settings(NamedTuple):
    """What a step needs to know besides the state; see `components.optim.cosmos.Cosmos`."""

    beta1: float
    beta2: float
    gamma: float
    eps: float
    rel_floor: float
    residual_tol: float
    nesterov: bool
    ns_steps: int
    ns_coefficients: tuple[float, float, float]
    ns_dtype: torch.dtype | None
    qr: str


class WholeMatrices:
    """Where the rows of a matrix are: all of them here. See `components.optim.sharding.RowShards` for the other answer."""

    def rows(self, local: int) -> int:
        """Rows of the whole matrix, from those that are here."""
        return local

    def sum(self, partial: Tensor) -> Tensor:
        """A sum over all rows, from the sum over those that are here."""
        return partial

    def max(self, partial: Tensor) -> Tensor:
        """A maximum over all rows."""
        return partial

    def whole(self, part: Tensor) -> Tensor:
        """All rows (b, m, n), from those that are here."""
        return part

    def own(self, whole: Tensor) -> Tensor:
        """The rows of (b, m, n) that are here."""
        return whole

    def newton_schulz(self, x: Tensor, size: Tensor, settings: Settings) -> Tensor:
        """Orthogonalised matrices; x: (b, m, n), size: their Frobenius norms (b, 1, 1)."""
        return newton_schulz(x, settings.ns_steps, settings.ns_coefficients, eps=_tiny(x), dtype=settings.ns_dtype)


HERE = WholeMatrices()
_SPARE = 8  # directions of the first basis that are looked at besides the wanted


def cosmos_update(
    grad: Tensor, state: State, step: Tensor, tracked: bool, settings: Settings, where: WholeMatrices = HERE
) -> tuple[Tensor, State]:
    """One step of b matrices: the direction (b, m, n), of RMS 1, and the new state. Nothing is written in place.

    grad: (b, m, n). step: (b,), the steps done with this one, t.
    tracked: False at t = 1, whose basis is `first_basis` of the same gradient, so that no power step is due.
    Source: Algorithm 1 with epsilon outside the root, and two guards that the paper does not have. `rel_floor`: no denominator is below
    this share of the largest |G U| (a gradient of rank below r leaves columns of rounding noise, which Adam would blow up to 1).
    `residual_tol`: a residual below this share of the momentum is rounding noise, and left out rather than orthogonalised.
    """
    m, n, r = where.rows(grad.shape[-2]), grad.shape[-1], state.basis.shape[-1]
    beta1, beta2 = settings.beta1, settings.beta2
    step = step.double().view(-1, 1, 1)
    momentum = torch.lerp(state.momentum, grad, 1 - beta1)
    basis, gram, seen = _track(grad, state, beta2, settings.qr, where) if tracked else (state.basis, beta2 * state.gram, grad @ state.basis)
    gram = torch.baddbmm(gram, seen.mT, seen, alpha=1 - beta2) if where is HERE else gram + (1 - beta2) * where.sum(seen.mT @ seen)
    gram = (gram + gram.mT) / 2
    second = torch.lerp(state.second, seen.square(), 1 - beta2)

    # The weights of all gradients seen add up to `total`: A is divided by it, R has no size of its own.
    ahead = torch.lerp(grad, momentum, beta1) if settings.nesterov else momentum
    total = (1 - beta1 ** (step + 1 if settings.nesterov else step)).to(grad.dtype)
    inside = ahead @ basis  # (b, m, r)
    floor = settings.rel_floor * where.max(_largest(seen))
    scale = (second / (1 - beta2**step).to(grad.dtype)).sqrt_().add_(settings.eps).maximum(floor)
    coordinates = torch.where(scale > 0, inside / (total * scale), 0.0)  # A is coordinates @ U'
    if r == n or settings.gamma == 0:
        direction = coordinates @ basis.mT
    else:
        residual = torch.baddbmm(ahead, inside, basis.mT, alpha=-1)  # R
        size = _norm(residual, where)
        orthogonal = where.newton_schulz(residual, size, settings)
        share = settings.gamma * math.sqrt(m * n) / _norm(orthogonal, where).clamp(min=_tiny(size))
        whole = torch.hypot(size, _norm(inside, where))  # the residual and the rest of the momentum are orthogonal
        rest = orthogonal.mul_(torch.where(size > settings.residual_tol * whole, share, 0.0))  # gamma sqrt(m) B
        direction = torch.baddbmm(rest, coordinates, basis.mT)
    size = _norm(direction, where)
    return direction.mul_(math.sqrt(m * n) / size.clamp(min=_tiny(size))), State(momentum, basis, gram, second)


def _track(grad: Tensor, state: State, beta2: float, qr: str, where: WholeMatrices) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the basis by one power step of H = beta2 U S U' + (1 - beta2) G'G. Returns (new basis, beta2 S seen from it, G times it)."""
    seen = grad @ state.basis
    power = (
        torch.baddbmm(state.basis @ state.gram, grad.mT, seen, beta=beta2, alpha=1 - beta2)
        if where is HERE
        else (beta2 * (state.basis @ state.gram) + (1 - beta2) * where.sum(grad.mT @ seen))
    )
    basis = orthonormal(power, method=qr)
    turn = state.basis.mT @ basis  # T (b, r, r)
    return basis, beta2 * (turn.mT @ state.gram @ turn), grad @ basis


def first_basis(grad: Tensor, rank: int, where: WholeMatrices = HERE) -> Tensor:
    """The leading right singular vectors (b, n, rank) of each gradient (b, m, n): from the Gram matrix of the smaller side, then sharpened.

    Squaring halves the digits: in float32 a Gram matrix knows nothing of directions below 3e-4 of the largest. So more of its vectors than
    are wanted pass through the gradient and a QR, whose columns may differ in size, and the best within their span are found in float64:
    as accurate as a full SVD in the gradient's dtype. Where a gradient has fewer than `rank` singular values above rounding, the basis is
    completed by arbitrary orthonormal columns.
    """
    m, n = where.rows(grad.shape[-2]), grad.shape[-1]
    grad = grad / where.max(_largest(grad)).clamp(min=_tiny(grad))  # else squares of small gradients would vanish
    k = min(rank + _SPARE, n)
    if m <= n:
        grad, where = where.whole(grad), HERE  # no more numbers than the n x n Gram matrix has
        left = torch.linalg.eigh(grad @ grad.mT)[1][..., -k:].flip(-1)  # eigh ascends; fewer than k where m is
    else:
        right = torch.linalg.eigh(where.sum(grad.mT @ grad))[1][..., -k:].flip(-1)
        left = where.own(torch.linalg.qr(where.whole(grad @ right))[0])
    columns = where.sum(grad.mT @ left)
    right, sizes = torch.linalg.qr(torch.cat([columns, columns.new_zeros(*columns.shape[:-1], k - columns.shape[-1])], dim=-1))
    sizes = sizes.double()
    turn = torch.linalg.eigh(sizes @ sizes.mT)[1][..., -rank:].flip(-1)
    return (right.double() @ turn).to(grad.dtype).contiguous()


def _norm(x: Tensor, where: WholeMatrices) -> Tensor:
    """Frobenius norm of each matrix, (b, 1, 1). In float32 elements below 1e-19 count as 0, as they do in the second moment."""
    here = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return here if where is HERE else where.sum(here.square()).sqrt()


def _largest(x: Tensor) -> Tensor:
    """Largest absolute element of the rows of each matrix that are here, (b, 1, 1); 0 where none is."""
    if not x.numel():
        return x.new_zeros(x.shape[0], 1, 1)
    return torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True))  # no copy of absolute values


def _tiny(x: Tensor) -> float:
    """A least divisor whose reciprocal, times any size of a matrix, is still finite."""
    return torch.finfo(x.dtype).tiny / torch.finfo(x.dtype).eps
