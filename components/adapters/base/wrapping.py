"""What all adapters share: choosing modules, wrapping them, freezing the rest, roles, merging, and state by name prefix.

An adapter replaces each chosen leaf by an `AdapterLayer` that holds the original module, untouched, as `base_layer`. Every function below
takes the wrapped model and finds the layers in it, so nothing has to keep a handle, and a deep copy of the model works like the original.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from components.adapters.base.targets import select_modules
from components.contracts import Role, UserError


class TaskIds:
    """Which task each row belongs to: one object shared by all wrappers of a model.

    Set before each forward and never cleared before the backward is done, since activation checkpointing reads it again there. A plain
    attribute, because a ContextVar breaks torch.compile(fullgraph=True).
    """

    ids: Tensor | None  # (B,) or (B, T) int64

    def __init__(self) -> None:
        self.ids = None


class AdapterLayer(nn.Module):
    """Base of all wrappers: y = base_layer(x) plus what a subclass adds. Parameters of the adapter start with `adapter_prefix`."""

    adapter_prefix: str = "adapter_"

    def __init__(self, base_layer: nn.Linear, task_ids: TaskIds) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.task_ids = task_ids
        self.enabled = True
        self.original: Tensor | None = None  # the weight before merging; a plain attribute, so that no checkpoint holds it

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def merged(self) -> bool:
        return self.original is not None

    @property
    def adds(self) -> bool:
        """Whether forward must add the adapter's part. Raises UserError for training merged weights."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise UserError("adapter.merge: true; merged weights cannot be trained further, train the adapter unmerged")
        return self.enabled and not self.merged

    def delta_weight(self) -> Tensor:
        """What merging adds to the weight: (out_features, in_features), float32 or wider."""
        raise NotImplementedError

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's own parameters by name inside the layer."""
        return [(name, p) for name, p in self.named_parameters() if name.startswith(self.adapter_prefix)]


def inject(
    model: nn.Module, targets: str | Sequence[str], exclude: str | None, wrap: Callable[[nn.Linear, TaskIds], AdapterLayer]
) -> dict[str, Any]:
    """Wrap each chosen module in place and freeze every other parameter of the model.

    targets, exclude: see `components.adapters.base.targets.select_modules`. wrap: builds the layer from a module and the shared TaskIds.
    Returns {'trainable', 'total', 'percent', 'modules': {name: adapter parameters}}.
    Raises UserError as `select_modules` does, and when a chosen module has an adapter already or shares its weight with another module;
    the model is then unchanged.
    """
    roles = base_roles(model)
    names = select_modules(model, targets, exclude, roles, opaque=AdapterLayer)
    _refuse_double(model, names)
    _refuse_tied(model, names)
    holder = task_ids(model) or TaskIds()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        layer = wrap(base, holder)  # type: ignore[arg-type]
        layer.train(base.training)
        setattr(model.get_submodule(parent), leaf, layer)
    model.adapter_task_ids = holder  # type: ignore[assignment]
    model.adapter_base_roles = roles  # type: ignore[assignment]
    return count_parameters(model)


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """The report of `Adapter.apply`: tied parameters count once; `modules` gives the adapter's parameters by wrapped module."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    modules = {name: sum(p.numel() for _, p in layer.adapter_parameters()) for name, layer in adapter_layers(model)}
    return {"trainable": trainable, "total": total, "percent": 100.0 * trainable / max(total, 1), "modules": modules}


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every wrapper of the model with the name of the module that it replaced."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name, module


def task_ids(model: nn.Module) -> TaskIds | None:
    """The model's holder of task ids, or None without an adapter."""
    return getattr(model, "adapter_task_ids", None)


def base_roles(model: nn.Module) -> dict[str, Role]:
    """Roles of the model's own parameters by their names before any wrapping; {} for a module without roles()."""
    if hasattr(model, "adapter_base_roles"):
        return dict(model.adapter_base_roles)  # type: ignore[arg-type]
    return dict(model.roles()) if hasattr(model, "roles") else {}  # type: ignore[operator]


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Role of every parameter by its name in `named_parameters()` now: `adapter` for what a wrapper added, the model's own for the rest.

    Optimizer groups, sharding and accounting read this, wrapped or not.
    """
    added = {f"{name}.{inner}" for name, layer in adapter_layers(model) for inner, _ in layer.adapter_parameters()}
    own = base_roles(model)
    roles: dict[str, Role] = {}
    for name, _ in model.named_parameters():
        if name in added:
            roles[name] = "adapter"
        elif (original := name.replace(".base_layer.", ".").removeprefix("base_layer.")) in own:
            roles[name] = own[original]
    return roles


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors alone, detached, by parameter name."""
    return {f"{name}.{inner}": p.detach() for name, layer in adapter_layers(model) for inner, p in layer.adapter_parameters()}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy tensors, named as in `adapter_state`, into the model. Keys and shapes must agree exactly.

    source: what to blame in the UserError for a missing or unknown key or another shape; nothing is copied then.
    """
    own = {f"{name}.{inner}": p for name, layer in adapter_layers(model) for inner, p in layer.adapter_parameters()}
    for name, tensor in state.items():
        if name not in own:
            near = difflib.get_close_matches(name, own, 1, cutoff=0.0)
            raise UserError(
                f"{source}: holds {name!r}, which this model has no place for; nearest: {', '.join(near) or 'none (no adapter)'}"
            )
        if tensor.shape != own[name].shape:
            raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}; this model needs {tuple(own[name].shape)}")
    missing = [name for name in own if name not in state]
    if missing:
        raise UserError(f"{source}: lacks {len(missing)} of {len(own)} adapter tensors, first {missing[0]!r}")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Add every adapter to its base weight: W <- W + delta, in float32, cast once. Merged layers are left as they are.

    Keeps a copy of each weight, so that `unmerge` restores every bit. Returns {'modules': count merged, 'max_rounding': the largest
    |delta| lost to the weight's dtype}. Raises UserError, before changing anything, for a delta that is not finite.
    """
    pending = [(name, layer) for name, layer in adapter_layers(model) if not layer.merged]
    for name, layer in pending:
        if not torch.isfinite(layer.delta_weight()).all():
            raise UserError(f"adapter.merge: the adapter of {name} holds NaN or infinity; nothing was merged")
    lost = 0.0
    for _, layer in pending:
        weight = layer.base_layer.weight
        delta = layer.delta_weight()
        exact = weight.to(delta.dtype) + delta
        layer.original = weight.detach().clone()
        weight.copy_(exact)
        lost = max(lost, (exact - weight).abs().max().item())
    return {"modules": len(pending), "max_rounding": lost}


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is bit for bit what it was."""
    for _, layer in adapter_layers(model):
        if layer.original is not None:
            layer.base_layer.weight.copy_(layer.original)
            layer.original = None


def unwrap(model: nn.Module) -> None:
    """Put every base layer back in the place of its wrapper and make all parameters trainable; what `merge` added stays."""
    for name, layer in list(adapter_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    model.requires_grad_(True)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters of the model on or off; off, the model is its base. Raises UserError for switching a merged one off."""
    layers = [layer for _, layer in adapter_layers(model)]
    if not enabled and any(layer.merged for layer in layers):
        raise UserError("adapter.merge: true; a merged adapter cannot be switched off, unmerge it first")
    for layer in layers:
        layer.enabled = enabled


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base (the reference model of preference losses, without a second copy)."""
    before = [(layer, layer.enabled) for _, layer in adapter_layers(model)]
    set_enabled(model, False)
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def _refuse_double(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if isinstance(model.get_submodule(name), AdapterLayer):
            raise UserError(f"adapter.targets: {name} has an adapter already; apply one adapter to a module")


def _refuse_tied(model: nn.Module, names: Sequence[str]) -> None:
    """A wrapper over a weight that another module reads would act in one place only."""
    chosen = set(names)
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in chosen or other in chosen):
                tied = name if name in chosen else other
                raise UserError(
                    f"adapter.targets: {tied} shares its weight with {other if tied == name else name}; leave it out by adapter.exclude"
                )
