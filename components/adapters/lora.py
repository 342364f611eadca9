"""LoRA (Hu et al., arXiv 2106.09685): a frozen linear layer plus a trained product of two thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.adapters.base import AdapterLayer, TaskIds
from components.adapters.base.leaves import is_embedding
from components.adapters.base.low_rank import LowRankLayer, PeftAdapter, parameter_options, wide, widen


class LoRALayer(LowRankLayer):
    """y = base(x) + scale * B A dropout(x) (section 4.1). The sum is taken in the wider dtype and cast to that of the base output.

    A fused projection, such as q, k and v in one, has one A and one B over all its rows, as in PEFT.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out) in the dtype of the base output."""
        y: Tensor = self.base_layer(x)
        if not self.adds:
            return y
        delta = self.low_rank(self.dropout(widen(x, self.lora_A.weight.dtype)))
        return (y + delta).to(y.dtype)


class LoRAEmbeddingLayer(AdapterLayer):
    """y = base(i) + scale * B A[:, i], for ids i, with A (r, rows) zero and B (dim, r) normal at the start, as in PEFT. No dropout."""

    adapter_prefix = "lora_"

    def __init__(self, base_layer: nn.Module, task_ids: TaskIds, r: int, scale: float) -> None:
        super().__init__(base_layer, task_ids)
        kwargs = parameter_options(base_layer)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, self.in_features, **kwargs))
        self.lora_embedding_B = nn.Parameter(torch.randn(self.out_features, r, **kwargs))
        self.padding_idx = self.base_layer.padding_idx  # this row learns nothing, as in the base
        self.scale = scale
        self.rank = r

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...). Returns (..., dim) in the dtype of the base output."""
        y: Tensor = self.base_layer(ids)
        if not self.adds:
            return y
        rows = F.embedding(ids, self.lora_embedding_A.T, self.padding_idx)  # (..., r)
        return (y + F.linear(self.scale * rows, self.lora_embedding_B)).to(y.dtype)

    def delta_weight(self, task: int | None = None) -> Tensor:
        with torch.autocast(self.lora_embedding_A.device.type, enabled=False):
            return self.scale * (wide(self.lora_embedding_B) @ wide(self.lora_embedding_A))  # (dim, rows)


class LoRA(PeftAdapter):
    """Adapter option: low-rank updates of the chosen linear layers and embeddings, everything else frozen. Options: see `PeftAdapter`."""

    layer = LoRALayer
    embeddings = True

    def wrap(self, base: nn.Module, ids: TaskIds, r: int, scale: float) -> AdapterLayer:
        return LoRAEmbeddingLayer(base, ids, r, scale) if is_embedding(base) else super().wrap(base, ids, r, scale)
