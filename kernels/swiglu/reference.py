"""SwiGLU written out: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `kernels.swiglu.swiglu`."""
    return gate / (1 + torch.exp(-gate)) * up
