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
_CARRIED = ", carried state and documents"


@dataclass(frozen=True)
class Case:
    """op: folder under `kernels`. call: runs a backend's function on the inputs. Every output has a gradient; those of the inputs named
    by `learned` are taken."""

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


def scan_case(batch: int, length: int, dim: int, states: int, dtype: torch.dtype, device: torch.device, carried: bool = False) -> Case:
    """As Samba calls it: bias, softplus, skip, gate; dt spread over 1e-3 .. 0.1 by the bias.

    carried: rows go on from a state and hold several documents; the last state is an output too, and has a gradient.
    """
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
    if carried:
        inputs["initial_state"] = _noise(batch, dim, states, device=device)
        inputs["document_start"] = document_starts(batch, length, device)

    def call(module: ModuleType, x: Inputs) -> tuple[Tensor, ...]:
        before, start = x.get("initial_state"), x.get("document_start")
        y, state = module.selective_scan(x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"], x["z"], x["dt_bias"], True, before, start)
        return (y, state) if carried else (y,)

    return Case(f"selective scan{_CARRIED if carried else ''}", "selective_scan", inputs, _floating(inputs), call)


def conv_case(batch: int, length: int, dim: int, dtype: torch.dtype, device: torch.device, carried: bool = False) -> Case:
    """carried: as in `scan_case`; the state is the inputs before the row."""
    inputs = {
        "x": _noise(batch, length, dim, dtype=dtype, device=device),
        "weight": _noise(dim, 4, device=device) / 2,
        "bias": _noise(dim, device=device),
    }
    if carried:
        inputs["initial_state"] = _noise(batch, 3, dim, dtype=dtype, device=device)
        inputs["document_start"] = document_starts(batch, length, device)

    def call(module: ModuleType, x: Inputs) -> tuple[Tensor, ...]:
        before, start = x.get("initial_state"), x.get("document_start")
        y, state = module.causal_conv1d(x["x"], x["weight"], x["bias"], "silu", before, start)
        return (y, state) if carried else (y,)

    return Case(f"causal conv1d{_CARRIED if carried else ''}", "causal_conv1d", inputs, _floating(inputs), call)


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
    batch: int,
    heads: int,
    groups: int,
    length: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    documents: bool = False,
) -> Case:
    """documents: rows hold several, and no query looks out of its own."""
    inputs = {
        name: _noise(batch, n, length, head_dim, dtype=dtype, device=device) for name, n in (("q", heads), ("k", groups), ("v", groups))
    }
    if documents:
        inputs["segment_ids"] = document_starts(batch, length, device).cumsum(dim=1)
    call = lambda m, x: (m.attention(x["q"], x["k"], x["v"], window, x.get("segment_ids"), None),)  # noqa: E731
    name = f"attention, window {window}{', documents' if documents else ''}"
    return Case(name, "sliding_window", inputs, ("q", "k", "v"), call)


def cached_attention_case(
    batch: int, heads: int, groups: int, slots: int, head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Case:
    """One decoded token against a cache whose slots lie in any order, some of them empty; without gradients, as it is used."""
    inputs = {
        name: _noise(batch, n, size, head_dim, dtype=dtype, device=device)
        for name, n, size in (("q", heads, 1), ("k", groups, slots), ("v", groups, slots))
    }
    newest = (slots - 1 - slots // 8 - torch.arange(batch)[:, None]).clamp_min(0)  # (B, 1): rows stand at different positions
    held = torch.stack([torch.randperm(slots) for _ in range(batch)])
    inputs["key_positions"] = held.masked_fill(held > newest, -1).to(device)
    inputs["query_positions"] = newest.to(device)
    call = lambda m, x: (m.cached_attention(x["q"], x["k"], x["v"], x["key_positions"], x["query_positions"], window, None),)  # noqa: E731
    return Case(f"cached attention, window {window}", "sliding_window", inputs, (), call)


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
    learned = [inputs[name] for name in case.learned]
    grads = torch.autograd.grad(outputs, learned, cotangents_of(outputs)) if learned else ()
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, **{f"d{name}": g for name, g in zip(case.learned, grads)}}


def errors(case: Case, backend: str) -> dict[str, float]:
    """Relative RMS of every output and gradient against the reference in float64 on the same, already rounded, inputs."""
    expected = results(case, "reference", torch.float64)
    return {name: relative_rms(value, expected[name]) for name, value in results(case, backend).items()}


def document_starts(batch: int, length: int, device: torch.device) -> Tensor:
    """(B, L) bool: documents that begin after a third of the row and one position before its end; in odd rows one position earlier.

    So the first document goes on from a given state, and a convolution of four taps meets a border inside its last state.
    """
    start = torch.zeros(batch, length, dtype=torch.bool, device=device)
    for row in range(batch):
        start[row, [max(1, place - row % 2) for place in (length // 3, length - 2)]] = True
    return start


def _floating(inputs: Inputs) -> tuple[str, ...]:
    return tuple(name for name, tensor in inputs.items() if tensor.is_floating_point())


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
