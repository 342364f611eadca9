"""No adapter: the whole model is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from components.adapters.base import count_parameters


class NoAdapter:
    """Leaves the model as it is, every parameter trainable."""

    def apply(self, model: nn.Module) -> dict[str, Any]:
        """Return the report of `components.adapters.base.count_parameters`; nothing is wrapped or frozen."""
        return count_parameters(model)
