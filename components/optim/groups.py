"""Parameter groups by role: who is optimised how, decided in one place for every optimizer and printed as a table.

Each group is a plain dictionary (strings, numbers, lists besides the parameters), so that a checkpoint loads with `weights_only=True`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from components.adapters.base import parameter_roles
from components.contracts import ROLES, NamedParameter, UserError

OVERRIDE_KEYS = ("lr", "weight_decay", "kind")


def named_parameters(model: nn.Module) -> list[NamedParameter]:
    """List what the optimizer may change: every parameter with requires_grad, tied ones once, with its role.

    A model may offer `fused_splits() -> {parameter name: sizes}`, the rows of each block; they become `NamedParameter.splits`.
    Raises UserError when nothing is trainable, ValueError when a trainable parameter has no role.
    """
    roles = parameter_roles(model)
    splits: Mapping[str, Sequence[int]] = model.fused_splits() if hasattr(model, "fused_splits") else {}  # type: ignore[operator]
    listed: list[NamedParameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in roles:
            raise ValueError(f"{type(model).__name__}.roles() does not name the trainable parameter {name!r}")
        listed.append(NamedParameter(name, parameter, roles[name], tuple(splits.get(name, ()))))
    if not listed:
        raise UserError("adapter: nothing is trainable; choose an adapter that adds parameters, or adapter=none to train the whole model")
    return listed


def check_roles(key: str, roles: Iterable[str]) -> frozenset[str]:
    """Return the roles as a set. Raises UserError, naming the option `key`, for a word that is no role."""
    for role in roles:
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"optimizer.{key}: {role!r} is not a role; allowed: {', '.join(ROLES)}{hint}")
    return frozenset(roles)


def build_groups(
    parameters: Sequence[NamedParameter],
    kinds: Mapping[str, Mapping[str, Any]],
    kind_of: Callable[[NamedParameter], str],
    no_decay_roles: Iterable[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Sort parameters into groups of equal treatment.

    kinds: settings of a group by kind; each needs `lr` and `weight_decay`.
    kind_of: the kind that a parameter gets when the user says nothing.
    overrides: {regex: {lr, weight_decay, kind}}; the regex must match the whole parameter name; a later pattern wins over an earlier one.
    Returns torch param groups with the keys name, kind, roles, parameter_names, lr, weight_decay and the kind's own.
    Raises UserError for a pattern that is no regex or matches nothing, an unknown override key or kind, or a negative number.
    """
    names = [p.name for p in parameters]
    if len(set(names)) != len(names) or len({id(p.parameter) for p in parameters}) != len(names):
        raise ValueError("a parameter is listed twice; list tied parameters once")
    matched = _match_overrides(names, overrides or {}, tuple(kinds))
    no_decay = check_roles("no_decay_roles", no_decay_roles)
    grouped: dict[str, dict[str, Any]] = {}
    for item, patterns in zip(parameters, matched, strict=True):
        own = {key: value for pattern in patterns for key, value in (overrides or {})[pattern].items()}
        kind = own.get("kind", kind_of(item))
        decays = item.role not in no_decay
        name = f"{kind}/{' & '.join(patterns)}" if patterns else kind
        name += "" if decays or "weight_decay" in own else "/no_decay"
        if name not in grouped:
            settings = dict(kinds[kind], **{key: float(value) for key, value in own.items() if key != "kind"})
            if not decays and "weight_decay" not in own:
                settings["weight_decay"] = 0.0
            grouped[name] = {"params": [], "name": name, "kind": kind, "roles": [], "parameter_names": [], **settings}
        group = grouped[name]
        group["params"].append(item.parameter)
        group["parameter_names"].append(item.name)
        if item.role not in group["roles"]:
            group["roles"].append(item.role)
    order = list(kinds)
    return sorted(grouped.values(), key=lambda group: (order.index(group["kind"]), group["name"] != group["kind"]))


def describe(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """One row a group for the table printed before step 0.

    Keys: name, kind, roles (comma separated), tensors, parameters, lr (the peak, before any schedule), weight_decay, state_bytes (what the
    state takes once the first step has made it; "?" where the optimizer does not say).
    """
    of_group: Callable[[Mapping[str, Any]], Any] = getattr(optimizer, "state_bytes", lambda group: _elementwise_bytes(group))
    return [
        {
            "name": group["name"],
            "kind": group["kind"],
            "roles": ",".join(group.get("roles", ())),
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "lr": float(group.get("initial_lr", group["lr"])),
            "weight_decay": float(group.get("weight_decay", 0.0)),
            "state_bytes": of_group(group),
        }
        for group in optimizer.param_groups
    ]


def _elementwise_bytes(group: Mapping[str, Any]) -> int | str:
    """Bytes of a group whose settings say `bytes_per_element`, a step counter of 4 for each tensor included."""
    if "bytes_per_element" not in group:
        return "?"
    return sum(group["bytes_per_element"] * p.numel() + 4 for p in group["params"])


def check_positive(**values: float) -> None:
    """Raise UserError for the first value below zero, NaN or infinite; names are the option's keys."""
    for key, value in values.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"optimizer.{key}: {value}; must be a finite number >= 0")


def check_betas(key: str, betas: Sequence[float]) -> tuple[float, float]:
    """Return two decay rates in [0, 1) as a tuple, or raise UserError."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.{key}: {list(betas)}; must be two numbers in [0, 1), such as [0.9, 0.95]")
    return float(betas[0]), float(betas[1])


def _match_overrides(names: Sequence[str], overrides: Mapping[str, Mapping[str, Any]], kinds: tuple[str, ...]) -> list[list[str]]:
    """Patterns that match each name, in the order given."""
    matched: list[list[str]] = [[] for _ in names]
    for pattern, changes in overrides.items():
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(f"optimizer.overrides: {pattern!r} is not a regular expression ({error})") from None
        hits = [i for i, name in enumerate(names) if regex.fullmatch(name)]
        if not hits:
            near = difflib.get_close_matches(pattern, names, 3, cutoff=0.0)
            raise UserError(
                f"optimizer.overrides: {pattern!r} matches no trainable parameter (the whole name must match); nearest: {', '.join(near)}"
            )
        _check_changes(pattern, changes, kinds)
        for i in hits:
            matched[i].append(pattern)
    return matched


def _check_changes(pattern: str, changes: Mapping[str, Any], kinds: tuple[str, ...]) -> None:
    where = f"optimizer.overrides.{pattern}"
    if not isinstance(changes, Mapping) or not changes:
        raise UserError(f"{where}: {changes!r}; must be a mapping with {', '.join(OVERRIDE_KEYS)}")
    for key, value in changes.items():
        if key not in OVERRIDE_KEYS:
            near = difflib.get_close_matches(str(key), OVERRIDE_KEYS, 1)
            raise UserError(
                f"{where}: unknown key {key!r}; allowed: {', '.join(OVERRIDE_KEYS)}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if key == "kind" and value not in kinds:
            raise UserError(f"{where}.kind: {value!r}; this optimizer has {', '.join(kinds)}")
        if key != "kind" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf")):
            raise UserError(f"{where}.{key}: {value!r}; must be a finite number >= 0")
