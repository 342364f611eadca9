"""Comparison helpers of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected`, in float64; an all-zero `expected` asks for an exact match."""
    difference = (actual.detach().double() - expected.detach().double()).square().mean().sqrt()
    scale = expected.detach().double().square().mean().sqrt()
    return float(difference / scale) if scale > 0 else float(difference) * float("inf") if difference > 0 else 0.0


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS error {error:.2e} > {tolerance:.0e}"


def gradients(function: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Call function(**inputs) on leaves, and return its outputs (out0, out1, ...) and the gradient of every floating-point input."""
    leaves = {k: v.detach().clone(memory_format=torch.preserve_format) for k, v in inputs.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    outputs = function(**leaves)
    torch.autograd.backward(list(outputs), [c.to(o.dtype) for c, o in zip(cotangents, outputs)])
    result = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    return result | {f"d_{k}": v.grad for k, v in leaves.items() if v.requires_grad}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, name)
