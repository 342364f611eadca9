"""Launching Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def on_device_of(tensor: Tensor) -> Any:
    """Context in which the tensor's device is the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dense_channels(tensor: Tensor) -> Tensor:
    """(B, L, .) with its last dimension contiguous; rows and positions may have any stride, as the halves of a projection have."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def on_device(function: Function) -> Function:
    """Run `function` with the device of its first argument, a tensor, as the current one. Autograd does so for a backward by itself."""

    @wraps(function)
    def guarded(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with on_device_of(first):
            return function(first, *args, **kwargs)

    return guarded  # type: ignore[return-value]
