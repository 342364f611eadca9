"""One call of each op with made-up inputs: what the benchmarks time, and compare with the float64 reference of the op's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.common import relative_rms
from kernels.dispatch import available, force, pick

Inputs = dict[str, Tensor]
OPS = ("selective_scan", "causal_conv1d", "rms_norm", "swiglu", "rope", "sliding_window", "cross_entropy")


@dataclass(frozen=True)
class Case:
    """op: folder under `kernels`. call: runs a backend's function on the inputs. Gradients are taken of all `learned` inputs."""

    name: str
    op: str
    inputs: Inputs
    learned: tuple[str, ...]
    call: Callable[[ModuleType, Inputs], tuple[Tensor, ...]]

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """`dispatch.force` for all ops that offer `backend`; the others keep their choice."""
    with ExitStack() as stack:
        for op in OPS:
            if backend in available(op):
                stack.enter_context(force(backend, op))
        yield


def scan_case(batch: int, length: int, dim: int, states: int, dtype: torch.dtype, device: torch.device) -> Case:
    """As Samba calls it: bias, softplus, skip, gate; dt spread over 1e-3 .. 0.1 by the bias."""
    low = torch.rand(dim, device=device) * math.log(100) - math.log(1000)
    inputs = {
        "u": _noise(batch, length, dim, dtype=dtype, device=device),
        "dt": _noise(batch, length, dim, dtype=dtype, device=device),
        "A": -torch.arange(1, states + 1, dtype=torch.float32, device=device).repeat(dim, 1),
        "B": _noise(batch, length, states, dtype=dtype, device=device),
        "C": _noise(batch, length, states, dtype=dtype, device=device),
        "D": torch.ones(dim, device=device),
        "z": _noise(batch, length, dim, dtype=dtype, device=device),
        "dt_bias": low.exp().expm1().log(),  # inverse of softplus
    }

    def call(module: ModuleType, x: Inputs) -> tuple[Tensor, ...]:
        return (module.selective_scan(x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"], x["z"], x["dt_bias"], True, None, None)[0],)

    return Case("selective scan", "selective_scan", inputs, tuple(inputs), call)


def conv_case(batch: int, length: int, dim: int, dtype: torch.dtype, device: torch.device) -> Case:
    inputs = {
        "x": _noise(batch, length, dim, dtype=dtype, device=device),
        "weight": _noise(dim, 4, device=device) / 2,
        "bias": _noise(dim, device=device),
    }

    def call(module: ModuleType, x: Inputs) -> tuple[Tensor, ...]:
        return (module.causal_conv1d(x["x"], x["weight"], x["bias"], "silu", None, None)[0],)

    return Case("causal conv1d", "causal_conv1d", inputs, tuple(inputs), call)


def norm_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    inputs = {"x": _noise(rows, size, dtype=dtype, device=device), "weight": 1 + _noise(size, device=device) / 10}
    return Case("rms norm", "rms_norm", inputs, tuple(inputs), lambda m, x: (m.rms_norm(x["x"], x["weight"], 1e-5),))


def add_norm_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A branch in `dtype` on a float32 stream."""
    inputs = {
        "x": _noise(rows, size, dtype=dtype, device=device),
        "residual": _noise(rows, size, device=device),
        "weight": 1 + _noise(size, device=device) / 10,
    }
    call = lambda m, x: m.add_rms_norm(x["x"], x["residual"], x["weight"], 1e-5)  # noqa: E731
    return Case("add + rms norm", "rms_norm", inputs, tuple(inputs), call)


def swiglu_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    inputs = {name: _noise(rows, size, dtype=dtype, device=device) for name in ("gate", "up")}
    return Case("swiglu", "swiglu", inputs, tuple(inputs), lambda m, x: (m.swiglu(x["gate"], x["up"]),))


def rope_case(batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Case:
    from kernels.rope import rope_tables

    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    cos, sin = rope_tables(torch.arange(length, device=device)[None], frequencies)
    inputs = {"x": _noise(batch, heads, length, head_dim, dtype=dtype, device=device), "cos": cos, "sin": sin}
    return Case("rope", "rope", inputs, ("x",), lambda m, x: (m.apply_rope(x["x"], x["cos"], x["sin"]),))


def attention_case(
    batch: int, heads: int, groups: int, length: int, head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Case:
    inputs = {
        name: _noise(batch, n, length, head_dim, dtype=dtype, device=device) for name, n in (("q", heads), ("k", groups), ("v", groups))
    }
    call = lambda m, x: (m.attention(x["q"], x["k"], x["v"], window, None, None),)  # noqa: E731
    return Case(f"attention, window {window}", "sliding_window", inputs, tuple(inputs), call)


def cross_entropy_case(rows: int, size: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The loss summed over all rows but the few that are ignored."""
    labels = torch.randint(vocabulary, (rows,), device=device)
    labels[:: max(2, rows // 4)] = -100
    inputs = {
        "hidden": _noise(rows, size, dtype=dtype, device=device),
        "weight": _noise(vocabulary, size, dtype=dtype, device=device) / size**0.5,
        "labels": labels,
    }
    call = lambda m, x: (m.linear_cross_entropy(x["hidden"], x["weight"], x["labels"], -100, "sum", None),)  # noqa: E731
    return Case("linear cross-entropy", "cross_entropy", inputs, ("hidden", "weight"), call)


def forward(case: Case, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the op that keeps what a backward needs."""
    module = pick(case.op, case.device, backend)
    inputs = _leaves(case, None)
    return lambda: case.call(module, inputs)


def forward_backward(case: Case, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the op and of its backward, with the same output gradients each time."""
    module = pick(case.op, case.device, backend)
    inputs = _leaves(case, None)
    learned = [inputs[name] for name in case.learned]
    cotangents = cotangents_of(case.call(module, inputs))
    return lambda: torch.autograd.grad(case.call(module, inputs), learned, cotangents)


def results(case: Case, backend: str, dtype: torch.dtype | None = None) -> Inputs:
    """Outputs y0, y1, .. and gradients by the input's name. dtype: of the floating-point inputs; None leaves them."""
    module = pick(case.op, case.device, backend)
    inputs = _leaves(case, dtype)
    outputs = case.call(module, inputs)
    grads = torch.autograd.grad(outputs, [inputs[name] for name in case.learned], cotangents_of(outputs))
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, **{f"d{name}": g for name, g in zip(case.learned, grads)}}


def errors(case: Case, backend: str) -> dict[str, float]:
    """Relative RMS of every output and gradient against the reference in float64 on the same, already rounded, inputs."""
    expected = results(case, "reference", torch.float64)
    return {name: relative_rms(value, expected[name]) for name, value in results(case, backend).items()}


def _noise(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _leaves(case: Case, dtype: torch.dtype | None) -> Inputs:
    inputs = {name: t.to(dtype) if dtype is not None and t.is_floating_point() else t for name, t in case.inputs.items()}
    return {name: t.detach().clone().requires_grad_() if name in case.learned else t for name, t in inputs.items()}


def cotangents_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same numbers for every dtype: noise rounded to bfloat16 (ones for a scalar)."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.ones_like(y) if y.dim() == 0 else torch.randn(y.shape, generator=generator).bfloat16().to(y.device, y.dtype) for y in outputs
    ]
