"""What the matrix optimizers share: one object with groups of the method's own kind for matrices and of kind `adamw` for the rest.

One object, so that one schedule, one checkpoint and one Lightning loop serve both. A method is a subclass with `kind`, `step_matrices` and
`state_shapes`; everything else (roles, fused blocks, AdamW, dtypes, checkpoints, gradients that are not finite, accounting) is here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam

from components.contracts import NamedParameter, UserError
from components.optim import sharding
from components.optim.groups import build_groups, check_betas, check_positive, check_roles
from components.optim.sharding import is_shard, local

NONFINITE = ("skip", "raise")
Shape = tuple[int, ...]


class HybridOptimizer(torch.optim.Optimizer):
    """Groups of kind `self.kind` for matrices and `adamw` for every other parameter.

    parameters: what `components.optim.groups.named_parameters` lists.
    matrices: settings of the method's groups, with `lr` and `weight_decay`. adamw: lr, betas, eps and weight_decay of the rest.
    matrix_roles: roles whose parameters of two or more dimensions are matrices; leading dimensions beyond two are a stack of them, and
        `splits` of a parameter are its fused blocks, each a matrix of its own.
    nonfinite: a gradient with NaN or Inf is left out of the step with a warning (skip), or ends it with FloatingPointError (raise); either
        way before any state is touched, since one poisoned average never recovers.
    master_weights: keep float32 copies of narrower parameters in the state, so that steps below their resolution add up.
    shard: with several processes that train one model, `auto` lets each keep the state of some matrices and step those, then all tell each
        other the weights; `none` has every process step all. Row shards (FSDP2) are seen by themselves. See `components.optim.sharding`.

    State is float32 whatever the parameter's dtype (float64 for float64). `.grad` is only read; a parameter without one is left alone.
    Raises UserError for values out of range, overrides that match nothing, a parameter that is complex, or a vector sent to the method.
    """

    kind: ClassVar[str]
    fixed: ClassVar[tuple[str, ...]] = ()  # settings that shape the state: a checkpoint made with others is refused
    _ranks: int = 0  # processes that matrices are shared out to, once it is known

    def __init__(
        self, parameters: list[NamedParameter], matrices: Mapping[str, Any], adamw: Mapping[str, Any], matrix_roles: Sequence[str],
        no_decay_roles: Sequence[str], overrides: Mapping[str, Mapping[str, Any]], nonfinite: str = "skip", master_weights: bool = False,
        shard: str = "auto",
    ) -> None:  # fmt: skip
        if shard not in sharding.SHARD:
            raise UserError(f"optimizer.shard: {shard}; allowed: {', '.join(sharding.SHARD)}")
        if nonfinite not in NONFINITE:
            raise UserError(f"optimizer.nonfinite: {nonfinite}; allowed: {', '.join(NONFINITE)}")
        _refuse_complex(parameters)
        roles = check_roles("matrix_roles", matrix_roles)
        fused = all(p.parameter.device.type in ("cpu", "cuda") for p in parameters)
        kinds = {
            self.kind: {**matrices, "master_weights": bool(master_weights)},
            "adamw": {**adamw, "fused": fused, "master_weights": bool(master_weights)},
        }
        groups = build_groups(
            parameters, kinds, lambda p: self.kind if p.role in roles and p.parameter.ndim >= 2 else "adamw", no_decay_roles, overrides
        )
        self._add_splits(groups, parameters)
        self.nonfinite, self.shard = nonfinite, shard
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `build_groups` makes it. Raises UserError for one without `kind`, or without what its kind needs."""
        if param_group.get("kind") not in (self.kind, "adamw"):
            raise UserError(f"optimizer: a param group of kind {param_group.get('kind')!r}; it needs kind: {self.kind} or adamw")
        alike = next((group for group in self.param_groups if group["kind"] == param_group["kind"]), param_group)
        if missing := [key for key in alike if key not in (*param_group, "initial_lr", "master_weights", "fused")]:
            raise UserError(f"optimizer: a param group of kind {param_group['kind']} without {', '.join(missing)}")
        if "parameter_names" not in param_group:
            raise UserError(f"optimizer: a param group of kind {param_group['kind']} without parameter_names")
        super().add_param_group(param_group)
        for key in ("master_weights", "fused"):
            param_group.setdefault(key, False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step. closure: recomputes the loss with gradients on; its value is returned.

        Raises UserError for a sparse gradient, FloatingPointError for one with NaN or Inf under nonfinite="raise"; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = self._ready()
        owners = self._owners()
        for group, members in zip(self.param_groups, ready, strict=True):
            if members and group["kind"] == self.kind:
                rows = [i for i in members if is_shard(group["params"][i]) and group["params"][i].ndim == 2]
                mine = [i for i in members if i not in rows and owners.get(group["params"][i], self._rank) == self._rank]
                self._step_some(group, mine, self.step_matrices)  # also without any: what a group counts stays alike in all processes
                if rows:
                    self._step_some(group, rows, self.step_rows)
            elif members:
                self._step_some(group, members, self._step_adamw)
        if owners:
            moved = [group["params"][i] for group, members in zip(self.param_groups, ready, strict=True) for i in members]
            moved = [p for p in moved if p in owners]
            sharding.broadcast_weights(moved, [owners[p] for p in moved])
        return loss

    def _step_some(self, group: dict[str, Any], members: list[int], move: Callable[..., None]) -> None:
        params: list[Tensor] = [group["params"][i] for i in members]
        grads = [wide(local(p.grad)) for p in params if p.grad is not None]
        weights = self._weights(group, params)
        if group["kind"] == self.kind:
            self._count(params)
            move(group, params, grads, weights, [group["splits"][i] for i in members])
        else:
            move(group, params, grads, weights)
        for p, value in zip(params, weights, strict=True):
            if value is not local(p):
                local(p).copy_(value)

    def step_matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> None:
        """Move `weights` in place. params: keys of `self.state`; grads: float32 or float64; splits: rows of the fused blocks, or empty.

        The lists are empty in a process that keeps none of the group's matrices. Of a sharded stack (E, m, n), grads and weights are the
        matrices that are here, and `local` gives the same of its state.
        """
        raise NotImplementedError

    def step_rows(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor], splits: list[list[int]]
    ) -> None:
        """As `step_matrices`, where grads and weights are those rows of each matrix that are here. A method without it refuses shards."""
        raise NotImplementedError

    def state_shapes(self, group: Mapping[str, Any], shape: Shape, blocks: int) -> dict[str, Shape]:
        """Shapes of what the state of a matrix parameter holds besides the step counter. blocks: fused ones, 1 if none."""
        raise NotImplementedError

    def state_bytes(self, group: Mapping[str, Any]) -> int:
        """Bytes that the state of a group takes once the first step has made it, by the formula; equal to what is held then."""
        total = 0
        for i, p in enumerate(group["params"]):
            element = 8 if p.dtype == torch.float64 else 4
            if group["kind"] == "adamw":
                shapes: Iterable[Shape] = (tuple(p.shape), tuple(p.shape))
            else:
                shapes = self.state_shapes(group, tuple(p.shape), max(1, len(group["splits"][i]))).values()
            total += element * sum(prod(shape) for shape in shapes) + 4  # 4: the step counter
            total += 4 * p.numel() if group["master_weights"] and element == 4 and p.dtype != torch.float32 else 0
        return total

    def report(self) -> str:
        """The state of every parameter as a table: shape, kind and bytes, by the formula."""
        from components.optim.accounting import report  # which knows the methods, and they know this class

        return report(self)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Where processes share out the matrices, the state of all of them, in every process: to be called in all.

        Row shards (FSDP2) stay DTensors, for torch.distributed.checkpoint.state_dict to gather.
        """
        owners = self._owners()
        saved = super().state_dict()
        if owners:
            flat = [p for group in self.param_groups for p in group["params"]]
            own = {i: saved["state"][i] for i, p in enumerate(flat) if owners.get(p) == self._rank and i in saved["state"]}
            saved["state"] = dict(sorted((saved["state"] | sharding.gather_states(own, flat[0].device)).items()))
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`, whole: a process keeps what is its own, whatever number of processes wrote it.

        Unlike torch's, keeps float32 state float32 under narrower parameters.

        Raises UserError when the saved groups do not hold the same parameters, or were made with another value of a `fixed` setting.
        """
        saved = state_dict["param_groups"]
        self._check_saved(saved)
        self._ranks = 0  # what was kept goes
        owners = self._owners()
        indices = [i for group in saved for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        mine = {i: p for i, p in zip(indices, params, strict=True) if owners.get(p, self._rank) == self._rank}
        state = {i: entries for i, entries in state_dict["state"].items() if i in mine}
        splits = [group.get("splits") for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": state})
        for group, rows in zip(self.param_groups, splits, strict=True):
            if rows is not None:
                group["splits"] = rows  # the model's; torch.distributed.checkpoint loses empty lists
        matrices = {p for group in self.param_groups if group["kind"] == self.kind for p in group["params"]}
        for index, p in mine.items():
            for key, value in state.get(index, {}).items():
                if key != "step":
                    held = self.state[p][key] if value.dtype == p.dtype else value.to(p.device, copy=True)
                    self.state[p][key] = sharding.state_like(p, held)
                elif p in matrices:
                    self.state[p][key] = value.to(p.device, copy=True)  # torch leaves it where it is, see `_count`

    def _check_saved(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError for saved groups of other parameters, blocks or `fixed` settings."""
        if [group["parameter_names"] for group in self.param_groups] != [group.get("parameter_names") for group in saved]:
            raise UserError("optimizer: its groups in the checkpoint hold other parameters; keep optimizer, roles and overrides as trained")
        for mine, theirs in zip(self.param_groups, saved, strict=True):
            was, now = (
                [rows for rows in group.get("splits", []) if rows] for group in (theirs, mine)
            )  # empty ones may be lost, see `load_state_dict`
            if was != now:
                raise UserError("optimizer: the checkpoint's fused matrices have other blocks; keep the model as trained")
            for key in self.fixed:
                if key in mine and mine[key] != theirs.get(key):
                    raise UserError(
                        f"optimizer.{key}: {mine[key]}; the checkpoint's state was made with {theirs.get(key)}; keep it as trained"
                    )

    def _owners(self) -> dict[Tensor, int]:
        """The process of each matrix parameter that one alone steps; empty where none is shared out.

        Raises RuntimeError when the number of processes has changed and the state that others kept is gone.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        ranks = sharding.sharing_processes(params, self.shard)
        if ranks != self._ranks:
            if self._ranks > 1:
                raise RuntimeError(f"optimizer: {self._ranks} processes shared its state, now there are {ranks}; load a whole state_dict")
            self._ranks, self._rank = ranks, torch.distributed.get_rank() if ranks > 1 else 0
            shared = {
                p: sharding.matrix_cost(tuple(p.shape), rows)
                for group in self.param_groups if group["kind"] == self.kind
                for p, rows in zip(group["params"], group["splits"], strict=True)
            } if ranks > 1 else {}  # fmt: skip
            self._owner = dict(zip(shared, sharding.share_out(list(shared.values()), ranks), strict=True))
            for p in [p for p, owner in self._owner.items() if owner != self._rank]:
                self.state.pop(p, None)
        return self._owner

    def _ready(self) -> list[list[int]]:
        """Indices of the parameters to step, one list a group. Reads one number a gradient: the only wait for a GPU in a step.

        All processes that step together get the same answer, or the same error.
        """
        params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        names = [name for group in self.param_groups for name in group["parameter_names"]]
        agreed = sharding.agree(self._states([p.grad for p in params]), sharding.process_groups(params, self.shard)).tolist()
        if sparse := [name for name, state in zip(names, agreed, strict=True) if state == sharding.SPARSE]:
            raise UserError(f"optimizer: the gradient of {', '.join(sparse)} is sparse; use sparse=False in its embedding")
        states = iter(agreed)
        kept: list[list[int]] = []
        for group in self.param_groups:
            found = [next(states) for _ in group["params"]]
            bad = [name for name, state in zip(group["parameter_names"], found, strict=True) if state == sharding.BAD]
            if bad and self.nonfinite == "raise":
                raise FloatingPointError(f"optimizer: NaN or Inf in the gradient of {', '.join(bad)}; nothing was changed")
            if bad:
                warnings.warn(f"optimizer: NaN or Inf in the gradient of {', '.join(bad)}; not stepped", RuntimeWarning, stacklevel=4)
            kept.append([i for i, state in enumerate(found) if state == sharding.FINITE])
        return kept

    def _states(self, grads: list[Tensor | None]) -> Tensor:
        """(gradients,) int32 of ABSENT, SPARSE, FINITE, or BAD for one with NaN or Inf here; so counts a norm whose square overflows."""
        sparse = [i for i, grad in enumerate(grads) if grad is not None and grad.layout != torch.strided]
        here = {i: local(grad) for i, grad in enumerate(grads) if grad is not None and i not in sparse}
        some = {i: grad for i, grad in here.items() if grad.numel()}  # an empty shard has no norm
        device = next(iter(here.values())).device if here else self.param_groups[0]["params"][0].device
        states = torch.tensor([sharding.ABSENT if grad is None else sharding.FINITE for grad in grads], dtype=torch.int32, device=device)
        if some:
            precision = torch.float64 if any(grad.dtype == torch.float64 for grad in some.values()) else torch.float32
            norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(list(some.values()), ord=2, dtype=precision)])
            states[list(some)] = torch.where(norms.isfinite(), sharding.FINITE, sharding.BAD).to(torch.int32)
        states[sparse] = sharding.SPARSE
        return states

    def _weights(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """What a step moves: the parameters, or float32 copies where they are narrower (kept in the state with `master_weights`)."""
        if not group["master_weights"]:
            return [wide(local(p)) for p in params]
        for p in params:
            if wide(p) is not p and "master" not in self.state[p]:
                self.state[p]["master"] = p.detach().float()
        return [local(self.state[p].get("master", p)) for p in params]

    def _allocate(self, p: Tensor, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        """Zeros of these shapes in the state of a parameter, laid out as it is where it is sharded."""
        for key, shape in shapes.items():
            self.state[p][key] = sharding.state_zeros(p, shape, dtype)

    def _count(self, params: list[Tensor]) -> None:
        for p in params:
            if "step" not in self.state[p]:  # on the parameter's device: read by arithmetic there, never by Python
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if params:
            torch._foreach_add_([self.state[p]["step"] for p in params], 1)

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], weights: list[Tensor]) -> None:
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                like = p.detach() if is_shard(p) else grad
                state["exp_avg"] = torch.zeros_like(like, dtype=grad.dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(like, dtype=grad.dtype, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        adam(
            weights, grads, [local(self.state[p]["exp_avg"]) for p in params], [local(self.state[p]["exp_avg_sq"]) for p in params], [],
            [self.state[p]["step"] for p in params], fused=group["fused"], decoupled_weight_decay=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _add_splits(self, groups: list[dict[str, Any]], parameters: Sequence[NamedParameter]) -> None:
        """Give each group of matrices `splits`, one list a parameter, and refuse what is no matrix."""
        by_name = {p.name: p for p in parameters}
        for group in groups:
            if group["kind"] != self.kind:
                continue
            group["splits"] = []
            for name in group["parameter_names"]:
                item = by_name[name]
                if item.role == "conv":
                    raise UserError(
                        f"optimizer.overrides: kind {self.kind} for {name}, a convolution; it needs a matrix, or a stack of them"
                    )
                if item.parameter.ndim < 2:
                    shape = tuple(item.parameter.shape)
                    raise UserError(f"optimizer.overrides: kind {self.kind} for {name} of shape {shape}; it needs a matrix")
                splits = list(item.splits)
                sharding.check_layout(self.kind, name, item.parameter, type(self).step_rows is not HybridOptimizer.step_rows)
                if splits and (item.parameter.ndim != 2 or sum(splits) != item.parameter.shape[0]):
                    raise ValueError(f"{name}: fused splits {splits} do not add up to the rows of shape {tuple(item.parameter.shape)}")
                group["splits"].append(splits)


def adamw_settings(lr: float, betas: Sequence[float], eps: float, weight_decay: float, prefix: str = "") -> dict[str, Any]:
    """Settings of the AdamW groups, checked. prefix: of the option's keys, for messages. Raises UserError for values out of range."""
    check_positive(**{f"{prefix}lr": lr, f"{prefix}eps": eps, "weight_decay": weight_decay})
    checked = list(check_betas(f"{prefix}betas", betas))
    return {"lr": lr, "betas": checked, "eps": float(eps), "weight_decay": float(weight_decay)}


def matrices(tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Views of the matrices inside a tensor: its fused blocks, or the members of a stack, or itself."""
    if tensor.ndim > 2:
        return [matrix for part in tensor.unbind(0) for matrix in matrices(part, ())]  # views, whatever the strides
    return list(tensor.split(list(rows))) if rows else [tensor]


def wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy when it is narrower."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def descend(weights: list[Tensor], steps: list[Tensor], lr: float | Tensor, decay: float | Tensor) -> None:
    """W <- (1 - decay) W - lr * step for each, in place; `steps` may be overwritten. lr may be a 0-d tensor."""
    if not weights:
        return
    if isinstance(decay, Tensor) or decay:
        torch._foreach_mul_(weights, 1 - decay)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(steps, lr)
        torch._foreach_sub_(weights, steps)
    else:
        torch._foreach_add_(weights, steps, alpha=-lr)


def _refuse_complex(parameters: Sequence[NamedParameter]) -> None:
    for item in parameters:
        if not item.parameter.is_floating_point():
            raise UserError(f"optimizer: {item.name} is {item.parameter.dtype}; it must be real and floating point")
        flat = ("_is_flat_param", "_fsdp_flattened")  # the second is a parameter that FSDP1 shows as if it had left it (use_orig_params)
        if type(item.parameter).__name__ == "FlatParameter" or any(getattr(item.parameter, mark, False) for mark in flat):
            raise UserError(f"optimizer: {item.name} is a flat shard of FSDP1, a piece of a vector; use trainer=ddp, or optimizer=adamw")
