"""A model as decoding calls it: in eval mode, without gradients, on a CPU with its weights in the layout of oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Model

_ROWS_HINT = 32  # rows that the layout is chosen for; any number may come


class Forward:
    """Calls a model under `quiet`, which may be entered again and again and is never left open between steps.

    Packed weights are copies, made here: make a new object when the model's own have changed, as a training step changes them. They take
    the model's memory once more, and products of 8 and more rows take half the time of torch's own (32 x 256 x 1408 on one core of a
    Zen 5: 107 us, 233 us). A row of such a product has the same bits however many rows there are; torch's own differ below 4 rows.

    Args:
        dtype: float32, or bfloat16 autocast.
        packed: pack the plain linear layers, and the head where it is the embedding; float32 on a CPU that has oneDNN, else without effect.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, packed: bool = False) -> None:
        self.model, self.dtype = model, dtype
        self._module = cast(nn.Module, model)
        self.device = next(self._module.parameters()).device
        self._linears: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        self._head: Callable[[Tensor], Tensor] = model.logits
        if packed and dtype == torch.float32 and self.device.type == "cpu" and _can_pack():
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
        for module, packed in self._linears.items():
            module.__dict__["forward"] = packed
        try:
            with without_gradients, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield
        finally:
            for module in self._linears:
                del module.__dict__["forward"]
            for module in training:
                module.training = True

    def _pack(self) -> None:
        with torch.no_grad():
            for module in self._module.modules():
                if type(module) is nn.Linear and module.weight.dtype == torch.float32 and "forward" not in module.__dict__:
                    self._linears[module] = _packed(module.weight, module.bias)
            if getattr(self.model, "lm_head", self) is None:  # tied: no module, but a product with the embedding
                self._head = _packed(self.model.head_weight, None)


def _can_pack() -> bool:
    """Whether torch has the two operators, which its own compiler uses and no documentation promises."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """F.linear with a weight (N, K) that is copied into oneDNN's layout."""
    packed = cast(Any, torch.ops.mkldnn)._reorder_linear_weight(weight.detach(), _ROWS_HINT)
    product = cast(Any, torch.ops.mkldnn)._linear_pointwise

    def linear(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        return product(x, packed, bias, "none", [], "")

    return linear
