"""A model as decoding calls it: in eval mode, without gradients, on a CPU with its weights packed (kernels/packed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from components.blocks import MLP, Attention, AttentionBlock, Block, Context, RMSNorm
from components.contracts import Model
from components.layer_state import KVCache, LayerState
from kernels.packed import attention, linear, mlp, mlp_block, pack


class Forward:
    """Calls a model under `quiet`, which may be entered again and again and is never left open between steps.

    Packed weights are copies, made here: make a new object when the model's own have changed, as a training step changes them. They take
    the model's memory once more. A row has the same bits however many rows there are (see kernels/packed); torch's own differ below 4 rows.

    Args:
        dtype: float32, or bfloat16 autocast.
        packed: pack the plain linear layers, and the head where it is the embedding; where all of an MLP or of an attention is plain, it
            becomes one call, with the norm before it, and so does a block of a class that has a `packed_branch`, which is given what finds
            the packed weight of a layer (None: it has none) and returns the block's `branch`, or None. For float32 on a CPU, else without
            effect.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, packed: bool = False) -> None:
        self.model, self.dtype = model, dtype
        self._module = cast(nn.Module, model)
        self.device = next(self._module.parameters()).device
        self._packed: list[tuple[nn.Module, str, Callable[..., Tensor]]] = []  # what a method of a module is under `quiet`
        self._head: Callable[[Tensor], Tensor] = model.logits
        if packed and dtype == torch.float32 and self.device.type == "cpu":
            self._pack()

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        return self._head(hidden).float()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Eval mode without gradients around one step, never around a `yield` to the caller: its mode would leak there."""
        training = [module for module in self._module.modules() if module.training] if self._module.training else []
        # Tensors made in inference mode cannot take part in a later backward, and a model in training may cache some (RoPE tables).
        without_gradients = torch.no_grad() if training else torch.inference_mode()
        for module in training:
            module.training = False
        for module, method, packed in self._packed:
            module.__dict__[method] = packed
        plain = self.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        autocast = nullcontext() if plain else torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        try:
            with without_gradients, autocast:
                yield
        finally:
            for module, method, _ in self._packed:
                del module.__dict__[method]
            for module in training:
                module.training = True

    @torch.no_grad()
    def _pack(self) -> None:
        modules, weights = list(self._module.modules()), dict[nn.Module, Any]()
        for part in modules:
            if isinstance(part, nn.Linear) and _plain(nn.Linear, part) and part.weight.dtype == torch.float32:
                weights[part] = pack(part.weight, part.bias)
                self._packed.append((part, "forward", _linear(weights[part])))

        def own(kind: type[nn.Module], module: nn.Module | None, *names: str) -> list[Any]:
            """The packed layers of a module of this kind; empty where it is another, or one of them is not plain."""
            layers = [getattr(module, name) for name in names] if _plain(kind, module) else []
            return [weights[layer] for layer in layers] if all(layer in weights for layer in layers) else []

        for part in modules:
            if found := own(MLP, part, "gate_up_proj", "down_proj"):
                self._packed.append((part, "forward", _mlp(*found)))
            if not isinstance(part, Block):
                continue
            found = own(MLP, part.mlp, "gate_up_proj", "down_proj")
            if found and part.mlp_norm is not None and _plain(RMSNorm, part.mlp_norm) and type(part).feed is Block.feed:
                self._packed.append((part, "feed", _feed(part.mlp_norm, *found)))
            found = own(Attention, part.mixer, "qkv_proj", "o_proj")
            if found and isinstance(part, AttentionBlock) and _plain(AttentionBlock, part) and _plain(RMSNorm, part.mixer_norm):
                self._packed.append((part, "branch", _attention(part, *found)))
            own_way = vars(type(part)).get("packed_branch")  # not a base class's, whose mixing may be another
            plain = _untouched(part) and _untouched(part.mixer) and _plain(RMSNorm, part.mixer_norm)
            if own_way and plain and (branch := own_way(part, weights.get)):
                self._packed.append((part, "branch", branch))
        if getattr(self.model, "lm_head", self) is None:  # tied: no module, but a product with the embedding
            self._head = _linear(pack(self.model.head_weight))


def _plain(kind: type[nn.Module], module: Any) -> bool:
    """Whether a module is of this very kind; one that somebody wraps or listens to is left alone."""
    return type(module) is kind and _untouched(module)


def _untouched(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def _linear(weight: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, weight)


def _mlp(gate_up: Any, down: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: mlp(x, gate_up, down)


def _feed(norm: RMSNorm, gate_up: Any, down: Any) -> Callable[[Tensor, Tensor], Tensor]:
    weight = norm.weight.detach()
    return lambda branch, x: mlp_block(branch, x, (weight, norm.eps), gate_up, down)


def _attention(block: AttentionBlock, qkv: Any, o: Any) -> Callable[..., Tensor]:
    mixer, norm = block.mixer, (block.mixer_norm.weight.detach(), block.mixer_norm.eps)

    def branch(x: Tensor, context: Context, state: LayerState | None) -> Tensor:
        step, window = context.step, mixer.window
        if state is None or step is None or (window is not None and not step.fresh and x.shape[1] > 1):
            return AttentionBlock.branch(block, x, context, state)  # no cache, or a piece of a prompt that reads on in a window
        cache = cast(KVCache, state)
        cache.reserve(step)
        return attention(x, norm, qkv, o, context.rope, cache.keys, cache.values, step.positions, mixer.num_heads, window, step.fresh)

    return branch
