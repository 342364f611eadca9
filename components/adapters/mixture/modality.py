"""One LoRA by the mode of a row or token: Phi-4-Multimodal's (arXiv 2503.01743), and several named LoRAs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.adapters.base import OFF, AdapterLayer, TaskIds
from components.adapters.base.low_rank import wide
from components.adapters.mixture.matrices import new_matrix
from kernels.lora_grouped import Segments, lora_grouped, segments


class RowChoice:
    """Which expert each token uses: looked up once a batch, for all layers of a model.

    rules: number of the expert of each mode, OFF for none.
    """

    def __init__(self, rules: Sequence[int], experts: int) -> None:
        self.rules = tuple(rules)
        self.experts = experts
        self._seen: tuple[Any, ...] = ()
        self._found: tuple[Tensor, Segments] | None = None

    def of(self, task_ids: TaskIds, x: Tensor) -> tuple[Tensor, Segments]:
        """Expert of each token of x (..., in), flat (N,), and the tokens sorted by expert."""
        ids = task_ids.now()
        fixed = ids is None or not ids.is_inference()  # else nobody can tell whether the same tensor was filled anew
        seen = (ids, ids._version if ids is not None and fixed else 0, x.shape[:-1], x.device)
        if self._found is None or not fixed or seen[0] is not self._seen[0] or seen[1:] != self._seen[1:]:
            table = torch.tensor([*self.rules, OFF], device=x.device)  # the last entry is that of the id OFF = -1
            chosen = table[task_ids.of(x)]
            chosen = chosen.reshape(*chosen.shape, *(1,) * (x.dim() - 1 - chosen.dim())).expand(x.shape[:-1]).reshape(-1)
            self._seen, self._found = seen, (chosen, segments(chosen, self.experts))
        return self._found


class ModalityLayer(AdapterLayer):
    """y = W x + s_e B_e A_e dropout_e(x) with e the expert of the token's mode; y = W x, bit for bit, where the mode has none.

    experts: {name: {r, scale, dropout}}, each its own. One that no token of a batch uses gets no gradient, so no optimizer moves it.
    """

    adapter_prefix = "lora_"
    may_rest = True

    def __init__(
        self, base: nn.Module, task_ids: TaskIds, choice: RowChoice, experts: Mapping[str, Mapping[str, Any]], train: Sequence[str]
    ) -> None:
        super().__init__(base, task_ids)
        self.choice = choice
        self.names = list(experts)  # in the order of their numbers; a ParameterDict sorts its keys
        self.lora_A = nn.ParameterDict({name: new_matrix(base, e["r"], self.in_features, True) for name, e in experts.items()})
        self.lora_B = nn.ParameterDict({name: new_matrix(base, self.out_features, e["r"], False) for name, e in experts.items()})
        for name in experts:
            self.lora_A[name].requires_grad_(name in train)
            self.lora_B[name].requires_grad_(name in train)
        self.scales = [float(e["scale"]) for e in experts.values()]
        self.dropouts = [float(e["dropout"]) for e in experts.values()]

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts' parameters."""
        return self.lora_A[self.names[0]].dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out) in the dtype of the base output."""
        y = self.base_layer(x)
        if not self.adds:
            return y
        chosen, rows = self.choice.of(self.task_ids, x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        with torch.autocast(kind, enabled=False):
            x = self._dropped(x.reshape(-1, x.shape[-1]).to(dtype), chosen)
            a, b = ([side[name].to(dtype) for name in self.names] for side in (self.lora_A, self.lora_B))
            return lora_grouped(y.reshape(-1, y.shape[-1]), x, a, b, self.scales, rows).view_as(y)

    def _dropped(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x (N, in) with the dropout of each token's expert."""
        if not self.training or not any(self.dropouts):
            return x
        keep = torch.tensor([1 - p for p in self.dropouts], device=x.device)[chosen, None]  # (N, 1); that of no expert is not read
        return x * (torch.rand(x.shape, device=x.device) < keep) / keep.to(x.dtype)

    def delta_weight(self, task: int | None = None) -> Tensor:
        expert = self.choice.rules[task or 0]
        if expert == OFF:
            return wide(self.lora_A[self.names[0]]).new_zeros(self.out_features, self.in_features)
        a, b = (wide(side[self.names[expert]]) for side in (self.lora_A, self.lora_B))
        with torch.autocast(a.device.type, enabled=False):
            return self.scales[expert] * (b @ a)  # (out, in)
