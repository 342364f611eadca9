"""What all adapters share: choosing modules, wrapping them, freezing the rest, roles, merging, and state by name prefix.

An adapter replaces each chosen leaf by an `AdapterLayer` that holds the original module, untouched, as `base_layer`. Every function below
takes the wrapped model and finds the layers in it, so nothing has to keep a handle, and a deep copy of the model works like the original.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from components.adapters.base.leaves import applied_weight, is_quantised, leaf_of
from components.adapters.base.targets import modules_ending_in, select_modules
from components.adapters.base.task_ids import TaskIds, after_recomputation, read_batch
from components.contracts import ModelOutput, Role, UserError


class AdapterLayer(nn.Module):
    """Base of all wrappers: y = base_layer(x) plus what a subclass adds. Parameters of the adapter start with `adapter_prefix`."""

    adapter_prefix: str = "adapter_"
    may_rest = False  # whether a batch may leave trained parameters of it without a gradient
    by_token = False  # whether it weighs its parts anew for each token: it asks for no task, and no one weight does what it does

    def __init__(self, base_layer: nn.Module, task_ids: TaskIds) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        leaf = leaf_of(base_layer)
        assert leaf is not None  # by select_modules
        self._leaf = leaf
        self.task_ids = task_ids
        self.enabled = True
        self.original: Tensor | None = None  # `base_weight` before merging; a plain attribute, so that no checkpoint holds it
        self.packed: tuple[nn.Module, ...] = ()  # the quantised base layer, while a dequantised copy with the adapter in it stands there

    @property
    def in_features(self) -> int:
        return self._leaf.in_features

    @property
    def out_features(self) -> int:
        return self._leaf.out_features

    @property
    def base_weight(self) -> Tensor:
        """The weight of the base layer as (out_features, in_features), a view whichever way it lies; of a quantised one what it applies."""
        if is_quantised(self.base_layer):
            return applied_weight(self.base_layer)
        weight: Tensor = self.base_layer.weight
        return weight.T if self.transposed else weight

    @property
    def transposed(self) -> bool:
        """Whether the weight of the base layer lies as (in_features, out_features)."""
        return self._leaf.transposed

    @property
    def merged(self) -> bool:
        return self.original is not None or bool(self.packed)

    @property
    def adds(self) -> bool:
        """Whether forward must add the adapter's part. Raises UserError for training merged weights."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise UserError("adapter.merge: true; merged weights cannot be trained further, train the adapter unmerged")
        return self.enabled and not self.merged

    def delta_weight(self, task: int | None = None) -> Tensor:
        """What merging adds to the weight, for a task where there are several: (out_features, in_features), float32 or wider.

        Raises UserError where no one matrix does what the adapter does.
        """
        raise NotImplementedError

    def merged_weight(self, task: int | None = None) -> Tensor:
        """The weight with the adapter in it, float32 or wider; where that is not a sum (DoRA) a subclass says how."""
        delta = self.delta_weight(task)
        return self.base_weight.to(delta.dtype) + delta

    def take_aux_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses, () each and weighted, of the forward just done; {} for most. They are averaged over the layers."""
        return {}

    def store_as(self, dtype: torch.dtype) -> None:
        """Keep the adapter's parameters in another dtype; what was drawn for them is rounded once."""
        for _, parameter in self.adapter_parameters():
            parameter.data = parameter.data.to(dtype)

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's own parameters by name inside the layer."""
        return [(name, p) for name, p in self.named_parameters() if name.startswith(self.adapter_prefix)]


def inject(
    model: nn.Module, targets: str | Sequence[str], exclude: str | None, wrap: Callable[[str, nn.Module, TaskIds], AdapterLayer],
    tasks: Sequence[str] = (), modules_to_save: Sequence[str] = (), train_bias: str = "none", embeddings: bool = False,
    allow_tied: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Wrap each chosen module in place and freeze the model's own parameters; an adapter on other modules goes on learning beside it.

    targets, exclude: see `components.adapters.base.targets.select_modules`. wrap: builds the layer from the module's name, the module and
    the shared TaskIds. tasks: their names; the ids of a batch (`Batch.task_ids`) are read before each forward. modules_to_save: endings of
    the names of modules that are trained in full, in their own dtype, and stored with the adapter. train_bias: `none`, `adapted` (biases
    of the wrapped modules) or `all`. embeddings: whether an nn.Embedding can be wrapped. allow_tied: whether a module may be wrapped that
    shares its weight with another; the adapter acts in its place alone, and cannot be merged.
    Returns the report of `count_parameters`.
    Raises UserError as `select_modules` does, when a chosen module has an adapter already or shares its weight (see allow_tied), and when
    one to be trained in full has an adapter or shares its weight; the model is then unchanged.
    """
    roles = base_roles(model)
    names = selected(model, targets, exclude, embeddings)
    _refuse_double(model, names)
    if not allow_tied and (tied := tied_to(model, names)) is not None:  # the wrapper would act in one place only
        remedy = "leave it out by adapter.exclude, or set adapter.allow_tied=true"
        raise UserError(f"adapter.targets: {tied[0]} shares its weight with {tied[1]}; {remedy}")
    in_full = _trained_in_full(model, names, modules_to_save, train_bias)
    stored = {id(p) for p in (*in_full, *(model.get_parameter(name) for name in _names_in_full(model)))}
    holder = _shared_ids(model, tasks)
    layers = {name: wrap(name, model.get_submodule(name), holder) for name in names}  # type: ignore[arg-type]
    beside = set(map(id, _own_parameters(model).values()))
    for parameter in model.parameters():
        if id(parameter) not in beside:
            parameter.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        layer.train(layer.base_layer.training)
        setattr(model.get_submodule(parent), leaf, layer)
    for parameter in in_full:
        parameter.requires_grad_(True)
    model.adapter_in_full = tuple(name for name, p in model.named_parameters() if id(p) in stored)  # type: ignore[assignment]
    if task_ids(model) is None:
        model.register_forward_pre_hook(read_batch, with_kwargs=True)
        model.register_forward_hook(add_aux_losses)
        model.register_forward_hook(after_recomputation, always_call=True)
    _hand_out(model, holder)
    model.adapter_base_roles = roles  # type: ignore[assignment]
    return count_parameters(model)


def selected(model: nn.Module, targets: str | Sequence[str], exclude: str | None, embeddings: bool = False) -> list[str]:
    """Names of the modules that `inject` would wrap. Raises UserError as `select_modules` does."""
    return select_modules(model, targets, exclude, base_roles(model), AdapterLayer, embeddings)


def add_aux_losses(model: nn.Module, args: tuple[object, ...], output: object) -> None:
    """Forward hook of an adapted model: what the wrappers want minimised besides, each the mean over the layers that have it."""
    if not isinstance(output, ModelOutput) or not model.training:
        return
    found: dict[str, list[Tensor]] = {}
    for _, layer in adapter_layers(model):
        for name, value in layer.take_aux_losses().items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        output.aux_losses[name] = torch.stack(values).mean()


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """The report of `Adapter.apply`: tied parameters count once; `modules` gives the adapter's parameters by wrapped module.

    `types` gives the same by their name in the layer, up to a dot (lora_A, lora_B ...), `roles` by the role of the wrapped module, or by
    the end of its name where the model has no roles; each adds up to the sum of `modules`. `in_full`: what is trained of the model's own.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    own, modules = base_roles(model), {}
    types: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    for name, layer in adapter_layers(model):
        sizes = {inner: p.numel() for inner, p in layer.adapter_parameters()}
        modules[name] = sum(sizes.values())
        roles[own.get(f"{name}.weight", name.rpartition(".")[2])] += modules[name]
        for inner, size in sizes.items():
            types[inner.partition(".")[0]] += size
    in_full = sum(model.get_parameter(name).numel() for name in _names_in_full(model))
    percent = 100.0 * trainable / max(total, 1)
    return {"trainable": trainable, "total": total, "percent": percent, "modules": modules, "types": dict(types), "roles": dict(roles),
            "in_full": in_full}  # fmt: skip


def breakdown(model: nn.Module) -> str:
    """The adapter's parameters by type and by role in one line; '' without an adapter."""
    report = count_parameters(model)
    parts = [", ".join(f"{name} {size:,}" for name, size in report[key].items()) for key in ("types", "roles")]
    if report["in_full"]:
        parts.append(f"{report['in_full']:,} of the model's own in full")
    return f"adapter: {sum(report['modules'].values()):,} parameters: {'; '.join(parts)}" if report["modules"] else ""


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every wrapper of the model with the name of the module that it replaced."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name, module


def may_rest(model: nn.Module) -> bool:
    """Whether a batch may leave trained parameters of the adapter without a gradient, which processes must then agree on."""
    return any(layer.may_rest for _, layer in adapter_layers(model))


def task_ids(model: nn.Module) -> TaskIds | None:
    """The model's holder of task ids, or None without an adapter."""
    return getattr(model, "adapter_task_ids", None)


def by_token(model: nn.Module) -> bool:
    """Whether an adapter of the model weighs its parts anew for each token, so that no weights do what it does."""
    return any(layer.by_token for _, layer in adapter_layers(model))


def tasks_to_say(model: nn.Module) -> tuple[str, ...]:
    """Names of the tasks of which one must be said before the model can answer; () for one at most, and where the adapter does not ask."""
    holder = task_ids(model)
    asked = holder is not None and len(holder) > 1 and not all(layer.by_token for _, layer in adapter_layers(model))
    return holder.names if holder is not None and asked else ()


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
    """The adapter's tensors alone, and what is trained in full beside it, detached, by parameter name."""
    return {name: p.detach() for name, p in _own_parameters(model).items()}


def _own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    own = {f"{name}.{inner}": p for name, layer in adapter_layers(model) for inner, p in layer.adapter_parameters()}
    return own | {name: model.get_parameter(name) for name in _names_in_full(model)}


def _names_in_full(model: nn.Module) -> tuple[str, ...]:
    """Names, wrapped, of the model's own parameters that are trained beside the adapter."""
    return getattr(model, "adapter_in_full", ())


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy tensors, named as in `adapter_state`, into the model. Keys and shapes must agree exactly.

    source: what to blame in the UserError for a missing or unknown key or another shape, and where the adapter is merged into the weights;
    nothing is copied then.
    """
    if any(layer.merged for _, layer in adapter_layers(model)):
        raise UserError(f"{source}: cannot be read into a merged adapter, whose weights would stay as they are; unmerge it first")
    own = _own_parameters(model)
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


def unwrap(model: nn.Module) -> None:
    """Put every base layer back in the place of its wrapper and make all parameters trainable; what `merge` added stays."""
    for name, layer in list(adapter_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    if task_ids(model) is not None:
        _hand_out(model, TaskIds())
        model.adapter_in_full = ()  # type: ignore[assignment]
    model.requires_grad_(True)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters of the model on or off; off, the model is its base.

    Raises UserError for switching off a merged one, and one beside which parameters of the base are trained, whose start is not kept.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    if not enabled and _names_in_full(model):
        raise UserError(
            f"adapter.modules_to_save, adapter.train_bias: {_names_in_full(model)[0]} is trained in full, so that the base model "
            "is gone and the adapter cannot be switched off; train the adapter alone"
        )
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


def _hand_out(model: nn.Module, holder: TaskIds) -> None:
    """Make this the model's holder, and that of the checkpoints inside it that say what their recomputation needs."""
    model.adapter_task_ids = holder  # type: ignore[assignment]
    for module in model.modules():
        if hasattr(module, "recompute_contexts"):
            module.recompute_contexts = holder.segment  # type: ignore[assignment]


def _shared_ids(model: nn.Module, tasks: Sequence[str]) -> TaskIds:
    """The model's holder, or a new one. Raises UserError for names twice, and for others than an adapter beside this one has."""
    if len(set(tasks)) < len(tasks):
        raise UserError(f"adapter.tasks: {', '.join(tasks)}; a name stands there twice")
    known = task_ids(model)
    holder = TaskIds(tasks) if known is None else known  # one without names is false, and shared all the same
    if tasks and holder.names != tuple(tasks):
        if holder.names:
            raise UserError(f"adapter.tasks: {', '.join(tasks)}, but the adapter beside it has {', '.join(holder.names)}")
        holder.names = tuple(tasks)
    return holder


def _refuse_double(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if isinstance(model.get_submodule(name), AdapterLayer):
            raise UserError(f"adapter.targets: {name} has an adapter already; apply one adapter to a module")


def tied_to(model: nn.Module, names: Sequence[str]) -> tuple[str, str] | None:
    """The first of these modules that shares a parameter with another, and that other one; None where all have their own.

    A model whose head reads the embedding without a module of its own says so by `head_weight`.
    """
    if (pair := _same_parameter(model, names)) is not None:
        return pair
    read = getattr(model, "head_weight", None)
    owner = next((name for name in names if any(p is read for p in model.get_submodule(name).parameters(recurse=False))), None)
    return None if owner is None or base_roles(model).get(f"{owner}.weight") == "head" else (owner, "the head")


def _same_parameter(model: nn.Module, names: Sequence[str]) -> tuple[str, str] | None:
    """The first of these modules that holds the parameter of another module too, and that one."""
    chosen = set(names)
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in chosen or other in chosen):
                return (name, other) if name in chosen else (other, name)
    return None


def _trained_in_full(
    model: nn.Module, wrapped: Sequence[str], modules_to_save: Sequence[str], train_bias: str
) -> list[nn.Parameter]:  # fmt: skip
    """The model's own parameters that stay trainable. wrapped: names of the modules that get an adapter."""
    found: dict[str, nn.Parameter] = {}
    adapted = [*wrapped, *(name for name, _ in adapter_layers(model))]
    for name in modules_ending_in(model, modules_to_save, "adapter.modules_to_save"):
        for other in adapted:
            if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}."):
                raise UserError(f"adapter.modules_to_save: {name} hits {other}, which has an adapter; train a module in one way")
        inside = [f"{name}.{inner}" if inner else name for inner, _ in model.get_submodule(name).named_modules()]
        if (tied := _same_parameter(model, inside)) is not None:  # a weight is stored under one name
            raise UserError(f"adapter.modules_to_save: {tied[0]} shares its weight with {tied[1]}; name others")
        found |= {f"{name}.{inner}": p for inner, p in model.get_submodule(name).named_parameters()}
    if train_bias == "adapted":
        found |= {f"{name}.bias": p for name in wrapped for inner, p in model.get_submodule(name).named_parameters() if inner == "bias"}
    elif train_bias == "all":
        found |= {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    return list(found.values())
