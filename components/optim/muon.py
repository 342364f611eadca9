"""Muon (K. Jordan 2024; at scale: Moonlight, arXiv 2502.16982): momentum, orthogonalised, for the hidden matrices; AdamW for the rest.

One optimizer object holds both, as groups of kind `muon` and `adamw`, so that one schedule, one checkpoint and one Lightning loop serve it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from components.contracts import NamedParameter, UserError
from components.optim.groups import build_groups, check_betas, check_positive, check_roles
from kernels.newton_schulz import newton_schulz

NS_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SCALES = ("match_rms_adamw", "original")


class Muon(torch.optim.Optimizer):
    """W -= lr * scale(m, n) * NS(momentum) for matrices (m, n) after W *= 1 - lr * weight_decay; AdamW for every other parameter.

    Momentum is an average, B <- momentum * B + (1 - momentum) * G, as in torch.optim.Muon; with Nesterov the step uses
    (1 - momentum) * G + momentum * B. A parameter with `splits` is orthogonalised and scaled block by block.

    parameters: what `components.optim.groups.named_parameters` lists.
    lr: peak rate of the matrices. momentum: in [0, 1). nesterov: look one step ahead. weight_decay: of both kinds.
    ns_steps, ns_coefficients (a, b, c): the Newton-Schulz iteration. ns_dtype: auto | bfloat16 | float32 | float64.
    scale: `match_rms_adamw` is 0.2 * sqrt(max(m, n)), an update of RMS 0.2 * lr for every shape (arXiv 2502.16982, eq. 4);
        `original` is sqrt(max(1, m / n)).
    matrix_roles: roles whose parameters of two or more dimensions go to Muon; leading dimensions beyond two are a stack of matrices.
    adamw_lr, adamw_betas, adamw_eps: for the rest. no_decay_roles, overrides: see `build_groups`.

    State is float32 whatever the parameter's dtype (float64 for float64). `.grad` is only read; a parameter without one is left alone.
    Raises UserError for values out of range, overrides that match nothing, or a vector sent to Muon.
    """

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
    ) -> None:
        check_positive(lr=lr, weight_decay=weight_decay, adamw_lr=adamw_lr, adamw_eps=adamw_eps)
        _check_muon(momentum, ns_steps, ns_coefficients, ns_dtype, scale)
        roles = check_roles("matrix_roles", matrix_roles)
        shared = {"weight_decay": float(weight_decay)}
        matrices = {
            "lr": float(lr),
            "momentum": float(momentum),
            "nesterov": bool(nesterov),
            "ns_steps": int(ns_steps),
            "ns_coefficients": [float(c) for c in ns_coefficients],
            "ns_dtype": ns_dtype,
            "scale": scale,
            "state_bytes": 4,  # one float32 momentum
        }
        rest = {
            "lr": float(adamw_lr),
            "betas": list(check_betas("adamw_betas", adamw_betas)),
            "eps": float(adamw_eps),
            "fused": all(p.parameter.is_floating_point() and p.parameter.device.type in ("cpu", "cuda") for p in parameters),
            "state_bytes": 8,  # two float32 moments
        }
        kinds = {"muon": {**matrices, **shared}, "adamw": {**rest, **shared}}
        groups = build_groups(
            parameters, kinds, lambda p: "muon" if p.role in roles and p.parameter.ndim >= 2 else "adamw", no_decay_roles, overrides
        )
        _add_splits(groups, parameters)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step. closure: recomputes the loss with gradients on; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            if not ready:
                continue
            if group["kind"] == "muon":
                self._step_matrices(group, ready)
            else:
                self._step_adamw(group, ready)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`. Unlike torch's, keeps float32 state float32 under narrower parameters.

        Raises UserError when the saved groups do not hold the same parameters.
        """
        mine = [group["parameter_names"] for group in self.param_groups]
        if mine != [group.get("parameter_names") for group in state_dict["param_groups"]]:
            raise UserError("optimizer: its groups in the checkpoint hold other parameters; keep optimizer, roles and overrides as trained")
        super().load_state_dict(state_dict)
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(indices, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step" and value.dtype != p.dtype:
                    self.state[p][key] = value.to(p.device, copy=True)

    def _step_matrices(self, group: dict[str, Any], ready: list[int]) -> None:
        params: list[Tensor] = [group["params"][i] for i in ready]
        grads = [_wide(p.grad) for p in params if p.grad is not None]
        for p, grad in zip(params, grads, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        steps = orthogonal_steps(
            updates,
            [group["splits"][i] for i in ready],
            scale=group["scale"],
            steps=group["ns_steps"],
            coefficients=tuple(group["ns_coefficients"]),
            dtype=NS_DTYPES[group["ns_dtype"]],
        )
        wide = [_wide(p) for p in params]  # the parameters themselves unless they are narrower than float32
        torch._foreach_mul_(wide, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(wide, list(steps), alpha=-group["lr"])
        _write_back(params, wide)

    def _step_adamw(self, group: dict[str, Any], ready: list[int]) -> None:
        params: list[Tensor] = [group["params"][i] for i in ready]
        grads, wide = [_wide(p.grad) for p in params if p.grad is not None], [_wide(p) for p in params]
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                state["exp_avg"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        adam(
            wide,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=group["fused"],
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _write_back(params, wide)


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
        for source, sink in zip(_matrices(update, rows), _matrices(target, rows), strict=True):
            key = (min(source.shape), max(source.shape), source.dtype, source.device)
            stacks[key].append((source, sink))
    for blocks in stacks.values():
        stack = torch.stack([source.mT if source.shape[0] > source.shape[1] else source for source, _ in blocks])  # (blocks, s, l)
        for done, (source, sink) in zip(newton_schulz(stack, steps, coefficients, dtype=dtype), blocks, strict=True):
            m, n = source.shape
            factor = 0.2 * math.sqrt(max(m, n)) if scale == "match_rms_adamw" else math.sqrt(max(1.0, m / n))
            torch.mul(done.mT if m > n else done, factor, out=sink)
    return out


def _matrices(tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Views of the matrices inside a tensor: its fused blocks, or the members of a stack, or itself."""
    if tensor.ndim > 2:
        return list(tensor.flatten(0, -3).unbind(0))
    return list(tensor.split(list(rows))) if rows else [tensor]


def _wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy when it is narrower."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _write_back(params: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    for p, value in zip(params, wide, strict=True):
        if value is not p:
            p.copy_(value)


def _add_splits(groups: list[dict[str, Any]], parameters: Sequence[NamedParameter]) -> None:
    """Give each group of matrices `splits`, one list a parameter, and refuse what is no matrix."""
    by_name = {p.name: p for p in parameters}
    for group in groups:
        if group["kind"] != "muon":
            continue
        group["splits"] = []
        for name in group["parameter_names"]:
            item = by_name[name]
            if item.parameter.ndim < 2:
                raise UserError(f"optimizer.overrides: kind muon for {name} of shape {tuple(item.parameter.shape)}; Muon needs a matrix")
            splits = list(item.splits)
            if splits and (item.parameter.ndim != 2 or sum(splits) != item.parameter.shape[0]):
                raise ValueError(f"{name}: fused splits {splits} do not add up to the rows of shape {tuple(item.parameter.shape)}")
            group["splits"].append(splits)


def _check_muon(momentum: float, ns_steps: int, ns_coefficients: Sequence[float], ns_dtype: str, scale: str) -> None:
    if not 0 <= momentum < 1:
        raise UserError(f"optimizer.momentum: {momentum}; must be in [0, 1)")
    if not 1 <= ns_steps <= 100:
        raise UserError(f"optimizer.ns_steps: {ns_steps}; must be in 1..100 (5 is usual)")
    if len(ns_coefficients) != 3:
        raise UserError(f"optimizer.ns_coefficients: {list(ns_coefficients)}; must be three numbers, such as [3.4445, -4.775, 2.0315]")
    if ns_dtype not in NS_DTYPES:
        raise UserError(f"optimizer.ns_dtype: {ns_dtype}; allowed: {', '.join(NS_DTYPES)}")
    if scale not in SCALES:
        raise UserError(f"optimizer.scale: {scale}; allowed: {', '.join(SCALES)}")
