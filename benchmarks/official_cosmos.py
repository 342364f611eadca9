"""What a step costs in the COSMOS that its authors release, rebuilt from a description of that code: none of it is used here.

The peer of `benchmarks.optimizer_step`. Its equations are right (tests compare them with float64 numpy and with ours); how it gets there is
that release's: matrices one by one, a QR of each, a singular value decomposition of the n x n Gram matrix at the first step, whose whole
storage stays behind the basis, G U multiplied three times, and Newton-Schulz as (A X, then A A X) with 6 s^2 l multiplications a round
where 4 s^2 l + 2 s^3 do. It runs eagerly; the release also decorates the update with torch.compile, which is not rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

NS_STEPS, NS_COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


class OfficialCosmos(torch.optim.Optimizer):
    """COSMOS (arXiv 2502.17410) with Nesterov momentum for matrices (m, n), n > rank; no guards for gradients of low rank, no fused blocks.

    lr: of the matrices, eta. betas: of momentum, and of second moments and subspace. gamma: weight of the orthogonalised rest.
    ns_dtype: arithmetic of Newton-Schulz. Every matrix goes this way: the release sends those of more than 10,000 rows to AdamW.
    `.grad` is only read, where the release overwrites it. Raises ValueError for a parameter that is no such matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        rank: int,
        gamma: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.rank, self.gamma, self.eps, self.ns_dtype = rank, gamma, eps, ns_dtype
        for p in self.param_groups[0]["params"]:
            if p.ndim != 2 or p.shape[1] <= rank:
                raise ValueError(f"a parameter of shape {tuple(p.shape)}; needs matrices (m, n) with n > rank = {rank}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    direction = self._direction(p, p.grad, *group["betas"])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction, alpha=-group["lr"] * math.sqrt(p.shape[0]))

    def _direction(self, p: Tensor, grad: Tensor, beta1: float, beta2: float) -> Tensor:
        """(m, n) of Frobenius norm sqrt(n)."""
        state = self.state[p]
        if not state:
            self._begin(state, grad)
        state["step"] += 1
        t, momentum, basis, gram, second = (state[key] for key in ("step", "momentum", "basis", "gram", "second"))
        momentum.mul_(beta1).add_(grad)  # a sum, not a mean
        if t > 1:
            power = beta2 * (basis @ gram) + (1 - beta2) * (grad.mT @ (grad @ basis))  # (n, r)
            turned = torch.linalg.qr(power)[0]
            turn = basis.mT @ turned  # (r, r)
            gram.copy_(beta2 * (turn.mT @ gram @ turn))
            basis.copy_(turned)
        gram.add_((grad @ basis).mT @ (grad @ basis), alpha=1 - beta2)
        second.mul_(beta2).add_((grad @ basis).square(), alpha=1 - beta2)
        ahead = (grad + beta1 * momentum) / (1 + beta1 * (1 - beta1**t) / (1 - beta1))  # the weights of all gradients add up to 1
        inside = ahead @ basis  # (m, r)
        adam = (inside / ((second / (1 - beta2**t)).sqrt() + self.eps)) @ basis.mT
        rest = newton_schulz_as_released(ahead - inside @ basis.mT, self.ns_dtype)
        return normed(adam + self.gamma * math.sqrt(grad.shape[0]) * normed(rest))

    def _begin(self, state: dict[str, Tensor | int], grad: Tensor) -> None:
        m, r = grad.shape[0], self.rank
        state["step"] = 0
        state["momentum"] = torch.zeros_like(grad)
        state["basis"] = torch.linalg.svd(grad.mT @ grad)[0][:, :r]  # a view: the other n - r columns stay in memory
        state["gram"] = grad.new_zeros(r, r)
        state["second"] = grad.new_zeros(m, r)


def newton_schulz_as_released(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values of x (m, n) to about 1, by products with the long side twice a round. Returns the dtype of x."""
    a, b, c = NS_COEFFICIENTS
    wide = x.mT if x.shape[0] > x.shape[1] else x
    y = (wide / wide.norm().clamp(min=1e-7)).to(dtype)
    for _ in range(NS_STEPS):
        square = y @ y.mT
        once = square @ y
        y = a * y + b * once + c * (square @ once)
    return (y.mT if x.shape[0] > x.shape[1] else y).to(x.dtype)


def normed(x: Tensor) -> Tensor:
    """x (m, n) with Frobenius norm sqrt(n)."""
    return x * (math.sqrt(x.shape[1]) / x.norm())
