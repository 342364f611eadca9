"""How the matrices of a LoRA start."""

from __future__ import annotations

import math

import torch
from torch import nn

from components.adapters.base.low_rank import parameter_options


def new_matrix(base: nn.Module, rows: int, columns: int, start: bool) -> nn.Parameter:
    """A trained matrix on the base's device, float32 or wider; start: kaiming-uniform with a = sqrt 5 as LoRA's A, else zeros as its B."""
    matrix = torch.zeros(rows, columns, **parameter_options(base))
    return nn.Parameter(nn.init.kaiming_uniform_(matrix, a=math.sqrt(5)) if start else matrix)
