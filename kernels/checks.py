"""Argument checks shared by the ops: one-line ValueErrors that name the op, the argument, its shape and what was expected."""

from __future__ import annotations

from torch import Tensor


def expect_shape(op: str, name: str, tensor: Tensor | None, *shape: int, letters: str) -> None:
    """Raise ValueError unless `tensor` is None or has exactly `shape`. letters: how the docstring writes the shape, e.g. "(B, L, D)"."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {letters} = {shape}")


def expect_like(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is None, or floating point and on the device of `like`: some kernels read bare memory."""
    for name, tensor in tensors.items():
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != like.device):
            raise ValueError(f"{op}: {name} is {tensor.dtype} on {tensor.device}; expected floating point on {like.device}")


def expect_dims(op: str, name: str, tensor: Tensor, dims: int, letters: str) -> None:
    """Raise ValueError unless `tensor` is floating point with `dims` dimensions, none of them empty."""
    if tensor.dim() != dims or not tensor.is_floating_point() or 0 in tensor.shape:
        raise ValueError(
            f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}; expected floating point {letters} without empty dimensions"
        )


def expect_bool(op: str, name: str, tensor: Tensor | None) -> None:
    """Raise ValueError unless `tensor` is None or boolean."""
    if tensor is not None and str(tensor.dtype) != "torch.bool":
        raise ValueError(f"{op}: {name} is {tensor.dtype}; expected torch.bool")
