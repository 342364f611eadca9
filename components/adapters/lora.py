"""LoRA (Hu et al., arXiv 2106.09685): a frozen linear layer plus a trained product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.adapters.base import AdapterLayer, TaskIds, adapter_layers, adapter_state, inject, load_adapter_state
from components.adapters.base.peft_files import read_peft, write_peft
from components.contracts import UserError


class LoRALayer(AdapterLayer):
    """y = base(x) + scale * B A dropout(x): A (r, in) is kaiming-uniform with a = sqrt 5, B (out, r) starts at zero (section 4.1).

    A fused projection, such as q, k and v in one, has one A and one B over all its rows, as in PEFT. A and B are float32 under a narrower
    base (float64 under a float64 one); the sum is taken in the wider dtype and cast to that of the base output.
    """

    adapter_prefix = "lora_"

    def __init__(self, base_layer: nn.Linear, task_ids: TaskIds, r: int, scale: float, dropout: float) -> None:
        super().__init__(base_layer, task_ids)
        weight = base_layer.weight
        kwargs: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, **kwargs)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, **kwargs)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out) in the dtype of the base output."""
        y = self.base_layer(x)
        if not self.adds:
            return y
        x = self.dropout(x) if torch.is_autocast_enabled(x.device.type) else self.dropout(x.to(self.lora_A.weight.dtype))
        delta = self.lora_B(self.scale * self.lora_A(x))  # (..., r), then (..., out)
        return (y + delta).to(y.dtype)

    def delta_weight(self, task: int | None = None) -> Tensor:
        with torch.autocast(self.lora_A.weight.device.type, enabled=False):
            return self.scale * (self.lora_B.weight @ self.lora_A.weight)  # (out, in)


class LoRA:
    """Adapter option: low-rank updates of the chosen linear layers, everything else frozen.

    r: rank, >= 1. alpha: the scale is alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2312.03732). dropout: on the adapter's input, in
    [0, 1). targets, exclude: which modules, see `components.adapters.base.targets.select_modules`.
    Raises UserError for values out of range.
    """

    def __init__(self, r: int, alpha: float, dropout: float, targets: str | Sequence[str], exclude: str | None, use_rslora: bool) -> None:
        if r < 1:
            raise UserError(f"adapter.r: {r}; the rank must be at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"adapter.dropout: {dropout}; must be in [0, 1)")
        if not math.isfinite(alpha) or alpha <= 0:
            raise UserError(f"adapter.alpha: {alpha}; must be a finite number above 0")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.exclude = exclude
        self.use_rslora = use_rslora

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def apply(self, model: nn.Module) -> dict[str, Any]:
        """Wrap the targets in place and freeze the rest; the model's outputs do not change. See `components.adapters.base.inject`."""
        return inject(model, self.targets, self.exclude, lambda _, base, ids: LoRALayer(base, ids, self.r, self.scale, self.dropout))

    def save(self, model: nn.Module, folder: Path | str) -> None:
        """Write adapter_model.safetensors and adapter_config.json as PEFT lays them out; PEFT and vLLM read the folder."""
        names = [name for name, _ in adapter_layers(model)]
        write_peft(Path(folder), model, names, adapter_state(model), self.r, self.alpha, self.dropout, self.use_rslora)

    def load(self, model: nn.Module, folder: Path | str) -> None:
        """Read the tensors of such a folder into a model that `apply` has wrapped.

        Raises UserError when a file is missing or unreadable, or keys, shapes, rank or scale differ from this adapter's.
        """
        config, state = read_peft(Path(folder))
        for key, own in (("r", self.r), ("lora_alpha", self.alpha), ("use_rslora", self.use_rslora)):
            if config[key] != own:
                raise UserError(f"{folder}: {key} is {config[key]}; this adapter has {own}")
        load_adapter_state(model, state, str(folder))

    @classmethod
    def from_folder(cls, folder: Path | str) -> LoRA:
        """The adapter that a PEFT folder describes; then `apply` it and `load`. Raises UserError for more than plain LoRA."""
        config, _ = read_peft(Path(folder))
        return cls(
            config["r"],
            config["lora_alpha"],
            config["lora_dropout"],
            config["target_modules"],
            config["exclude_modules"],
            config["use_rslora"],
        )
