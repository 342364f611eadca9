"""DoRA (Liu et al., arXiv 2402.09353): the rows of a weight keep a trained length, and a low-rank update turns their direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.adapters.base import TaskIds
from components.adapters.base.leaves import is_quantised
from components.adapters.base.low_rank import LowRankLayer, PeftAdapter, wide, widen
from components.contracts import UserError


class DoRALayer(LowRankLayer):
    """y = (m / |V|) V x + bias with V = W + scale * B A, |V| the norms of its rows, m trained from |W| (eq. 5).

    |V| is a constant of the backward (section 4.3). The lengths of the rows of W are kept, so that
    |V|^2 = |W|^2 + 2 scale <B A, W> + scale^2 |B A|^2 by rows needs no dense V. Where a row has no update |V| is |W| itself, so that
    m / |V| is exactly 1 while B is zero: the adapted model starts as its base, bit for bit, on whatever device.
    """

    lora_weight_norm: Tensor  # (out,), |W|; in checkpoints, as the base weight may be loaded after wrapping

    def __init__(self, base_layer: nn.Module, task_ids: TaskIds, r: int, scale: float, dropout: float) -> None:
        super().__init__(base_layer, task_ids, r, scale, dropout)
        if is_quantised(base_layer):
            kind = self.base_layer.weight.dtype
            raise UserError(f"adapter: dora needs the lengths of the weight's rows, and {kind} has none; use adapter=lora")
        norm = torch.linalg.vector_norm(self.base_weight.detach().to(self.lora_A.weight.dtype), dim=1)  # (out,)
        self.register_buffer("lora_weight_norm", norm)
        self.lora_magnitude_vector = nn.Parameter(norm.clone())

    def store_as(self, dtype: torch.dtype) -> None:
        """The lengths stay float32 or wider: rounded to less, m / |V| would not be 1 at the start."""
        lengths = self.lora_magnitude_vector.data
        super().store_as(dtype)
        self.lora_magnitude_vector.data = lengths

    def gain(self) -> Tensor:
        """m / |V|: (out,), float32 or wider. Only m gets a gradient."""
        a, b = (wide(side.weight) for side in (self.lora_A, self.lora_B))
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            cross = (b * (self.base_weight.to(a.dtype) @ a.T)).sum(1)  # (out,), rows of B A times rows of W
            square = (b @ (a @ a.T) * b).sum(1)  # (out,), squared rows of B A
            length, change = self.lora_weight_norm.to(a.dtype), 2 * self.scale * cross + self.scale**2 * square
            norm = (length.square() + change).clamp_min(0).sqrt()
            norm = torch.where(change == 0, length, norm)  # the square root of MKL's vectors is not always that of a^2 (float64, Intel)
            norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)  # a row of zeros stays one
        return self.lora_magnitude_vector / norm

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out) in the dtype of the base output.

        With dropout: base(x) + (m / |V| - 1) W x' + (m / |V|) scale B A x' on the dropped x', so that the base itself sees all of x.
        """
        y: Tensor = self.base_layer(x)
        if not self.adds:
            return y
        weight, bias, gain = self.base_weight, self.base_layer.bias, self.gain()
        dropped = self.dropout(widen(x, gain.dtype))
        if self.training and self.dropout.p:
            turned = F.linear(dropped.to(weight.dtype), weight)
        else:
            turned = y if bias is None else y - bias
        return (y + (gain - 1) * turned + gain * self.low_rank(widen(dropped, self.lora_A.weight.dtype))).to(y.dtype)

    def merged_weight(self, task: int | None = None) -> Tensor:
        delta = super().delta_weight(task)
        return self.gain()[:, None] * (self.base_weight.to(delta.dtype) + delta)  # (out, in)

    def delta_weight(self, task: int | None = None) -> Tensor:
        merged = self.merged_weight(task)
        return merged - self.base_weight.to(merged.dtype)


class DoRA(PeftAdapter):
    """Adapter option: low-rank updates of direction and trained lengths of the rows of the chosen linear layers, everything else frozen.

    Options: see `PeftAdapter`.
    """

    layer = DoRALayer
    use_dora = True
