"""LoRA (Hu et al., arXiv 2106.09685): a frozen linear layer plus a trained product of two thin matrices."""

from __future__ import annotations

from torch import Tensor

from components.adapters.base.low_rank import LowRankLayer, PeftAdapter, widen


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


class LoRA(PeftAdapter):
    """Adapter option: low-rank updates of the chosen linear layers, everything else frozen. Options: see `PeftAdapter`."""

    layer = LoRALayer
