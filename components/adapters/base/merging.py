"""Putting an adapter into the weights, and taking it out again to the bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.adapters.base.leaves import is_quantised
from components.adapters.base.wrapping import adapter_layers, task_ids, tied_to
from components.contracts import UserError


@torch.no_grad()
def merge(model: nn.Module, task: int | str | None = None, dequantize: bool = False) -> dict[str, float]:
    """Put every adapter into its base weight, computed in float32 and cast once. Merged layers are left as they are.

    task: name or id, needed where there are several. dequantize: a quantised base layer is replaced by an nn.Linear with what it applies
    and the adapter in it, in the dtype that the rest of the model has; it is never quantised anew. `unmerge` restores every bit, since a
    copy of each weight, or the quantised layer itself, is kept. Returns {'modules': count merged, 'max_rounding': the largest amount lost
    to the weight's dtype}. Raises UserError, before changing anything, for a weight that is quantised without dequantize, tied to another
    module's, or not finite in its dtype, a missing or unknown task, another than the one that is merged, and an adapter that cannot be
    merged or is switched off.

    The `state_dict` of a merged model holds the merged weights beside the adapter: read into an unmerged model it would add the adapter
    twice. Unmerge before storing it, or drop the adapter by `unwrap`.
    """
    pending = [(name, layer) for name, layer in adapter_layers(model) if not layer.merged]
    if not all(layer.enabled for _, layer in pending):
        raise UserError("adapter.merge: true, but the adapter is switched off; merge it when it is on")
    for _, layer in pending:
        if layer.by_token:
            layer.delta_weight()  # it says why there is none, which no task would change
    chosen = _task_to_merge(model, task)
    tied = tied_to(model, [f"{name}.base_layer" if name else "base_layer" for name, _ in pending])
    if tied is not None:
        place, other = (name.removesuffix(".base_layer") for name in tied)
        raise UserError(f"adapter.merge: true, but {place} shares its weight with {other}, which would change too; leave it unmerged")
    for name, layer in pending:
        if is_quantised(layer.base_layer) and not dequantize:
            kind = layer.base_layer.weight.dtype
            raise UserError(
                f"adapter.merge: true, but the weight of {name} is quantised ({kind}); run it unmerged, or call merge(model, "
                "dequantize=True), which puts a dense layer in its place"
            )
        exact = layer.merged_weight(chosen)
        if not torch.isfinite(exact).all():
            raise UserError(f"adapter.merge: the adapter of {name} holds NaN or infinity; nothing was merged")
        dtype = _dtype_of(model) if is_quantised(layer.base_layer) else layer.base_weight.dtype
        if not torch.isfinite(exact.to(dtype)).all():
            raise UserError(f"adapter.merge: the merged weight of {name} is too large for {dtype}; nothing was merged")
    lost = 0.0
    for _, layer in pending:
        exact = layer.merged_weight(chosen)
        if is_quantised(layer.base_layer):
            layer.packed = (layer.base_layer,)
            layer.base_layer = _dense(layer.base_layer, exact, _dtype_of(model))
        else:
            layer.original = layer.base_weight.detach().clone()
            layer.base_weight.copy_(exact)
        lost = max(lost, (exact - layer.base_weight).abs().max().item())
    if pending:
        pending[0][1].task_ids.merged = chosen  # of the holder that all share
    return {"modules": len(pending), "max_rounding": lost}


def _dense(packed: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear with this weight (out, in) and the bias of a quantised layer, frozen."""
    bias: Tensor | None = getattr(packed, "bias", None)  # type: ignore[assignment]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, dtype)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear.requires_grad_(False).train(packed.training)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of the model's own weights which are not quantised, as its activations are; float32 where there are none."""
    added = {id(p) for _, layer in adapter_layers(model) for _, p in layer.adapter_parameters()}
    kinds = [p.dtype for p in model.parameters() if id(p) not in added and p.is_floating_point() and p.element_size() > 1]
    return kinds[0] if kinds else torch.float32


def _task_to_merge(model: nn.Module, task: int | str | None) -> int | None:
    """Id of the task to merge; None where the adapter has no tasks."""
    holder = task_ids(model)
    if holder is None or not len(holder):
        if task is not None:
            raise UserError(f"adapter.task: {task!r}, but the adapter has no tasks; drop it")
        return None
    if task is None and len(holder) > 1:
        raise UserError(
            f"adapter.merge: true, and the adapter has {len(holder)} tasks ({', '.join(holder.names)}); say which by adapter.task"
        )
    chosen = holder.index(0 if task is None else task)
    if chosen < 0:
        raise UserError(f"adapter.task: {chosen} means no adapter; there is nothing to merge")
    if holder.merged is not None and holder.merged != chosen:
        raise UserError(f"adapter.task: {holder.names[chosen]!r}, but {holder.names[holder.merged]} is merged already; unmerge it first")
    said = holder.said[0]
    if said is not None and bool((said != chosen).any()):
        raise UserError(f"adapter.task: {holder.names[chosen]!r} is to be merged, but the ids that were set mean other tasks; set it first")
    return chosen


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is bit for bit what it was."""
    for _, layer in adapter_layers(model):
        if not layer.merged:
            continue
        if layer.packed:
            (layer.base_layer,), layer.packed = layer.packed, ()
        else:
            assert layer.original is not None
            layer.base_weight.copy_(layer.original)
            layer.original = None
        layer.task_ids.merged = None
