"""Sliding-window attention, forward and backward: ours against torch's with a mask over the whole row; cost against length.

`python -m benchmarks.attention` (two minutes on two cores). On a GPU (--device cuda, bf16, the shape of Samba-421M; not run there yet)
flex_attention is a further side: it has no backward on the CPU. Sides are compared before anything is timed. At a fixed window ours
grows with the length and a mask with its square.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from benchmarks.common import (
    RESULTS,
    append_row,
    clock_of,
    environment,
    interleaved,
    raise_allocator_thresholds,
    relative_rms,
    spread,
    table,
)
from benchmarks.plots import log_log
from benchmarks.roofline import attention_floor, card_found

CPU_SHAPE, GPU_SHAPE = (1, 8, 2, 64), (8, 12, 12, 128)  # B, H, G, K: size small on the CPU, 421m on a GPU
CPU_WINDOW, GPU_WINDOW = 512, 2048  # of these sizes
LONGEST_MASK = 8192  # a longer mask over the whole row is left out
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative RMS
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], tuple[Tensor, ...]]


def masked(length: int, window: int, device: torch.device) -> Attend:
    """torch's attention with the window as a (T, T) mask, made beforehand."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    mask = (distance >= 0) & (distance < window)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flex(length: int, window: int, device: torch.device) -> Attend:
    """torch's flex_attention, compiled, with the window as a block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    mask = create_block_mask(visible, None, None, length, length, device=device.type)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def training(case: cases.Case, attend: Attend) -> Run:
    """Forward and backward of `attend` on the case's numbers."""
    q, k, v = (case.inputs[name].detach().clone().requires_grad_() for name in ("q", "k", "v"))
    cotangents = cases.cotangents_of((case.inputs["q"],))

    def run() -> tuple[Tensor, ...]:
        y = attend(q, k, v)
        return (y.detach(), *torch.autograd.grad(y, (q, k, v), cotangents))

    return run


def sides_of(case: cases.Case, backends: list[str], length: int, window: int, with_flex: bool) -> dict[str, Run]:
    """What is timed at this length: our backends, torch with a mask, and on a GPU flex_attention."""
    device = case.device
    sides: dict[str, Run] = {f"ours, {backend}": cases.forward_backward(case, backend) for backend in backends}
    if length <= LONGEST_MASK:
        sides["torch, mask"] = training(case, masked(length, window, device))
    if with_flex and device.type == "cuda":
        sides["torch, flex_attention"] = training(case, flex(length, window, device))
    return sides


def difference(case: cases.Case, backend: str, run: Run) -> float:
    """Greatest relative RMS between output and gradients of a backend and of a peer."""
    return max(relative_rms(ours, theirs) for ours, theirs in zip(cases.results(case, backend).values(), run()))


def measure(
    shape: tuple[int, int, int, int],
    lengths: list[int],
    window: int,
    dtype: torch.dtype,
    device: torch.device,
    backends: list[str],
    rounds: int,
    limit_seconds: float = 20.0,
    with_flex: bool = True,
) -> list[dict[str, Any]]:
    """One entry a length: milliseconds of every side, the greatest difference from torch's (None without it), a listed card's least."""
    entries = []
    batch, heads, groups, head_dim = shape
    clock = clock_of(device)
    for length in lengths:
        case = cases.attention_case(batch, heads, groups, length, head_dim, window, dtype, device)
        sides = sides_of(case, backends, length, window, with_flex)
        peers = [run for name, run in sides.items() if name.startswith("torch")]
        worst = max((difference(case, backend, run) for backend in backends for run in peers), default=None)
        if worst is not None and not worst <= TOLERANCE[dtype]:
            raise SystemExit(
                f"length {length}: sides differ by {worst:.1e} (relative RMS), allowed is {TOLERANCE[dtype]:.0e}: nothing timed"
            )
        seconds = interleaved(sides, dict.fromkeys(sides, rounds), warmup=2, clock=clock, limit_seconds=limit_seconds)
        entry: dict[str, Any] = {"length": length, "difference": worst, "floor_ms": None}
        entry["ms"] = {name: spread([1e3 * s for s in values]) for name, values in seconds.items()}
        card = card_found(device)
        if card is not None:
            entry["floor_ms"] = sum(f.ms for f in attention_floor(card, batch, heads, groups, length, head_dim, window))
        entries.append(entry)
    return entries


def print_entries(entries: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for entry in entries for name in entry["ms"]))
    lines = []
    for entry in entries:
        floor = "-" if entry["floor_ms"] is None else f"{entry['floor_ms']:.2f}"
        times = [entry["ms"].get(name) for name in names]
        cells = ["-" if r is None else f"{r['median']:.2f} ({r['min']:.2f} - {r['max']:.2f})" for r in times]
        lines.append([str(entry["length"]), *cells, floor, "-" if entry["difference"] is None else f"{entry['difference']:.1e}"])
    print(table(["length", *(f"{name} ms" for name in names), "least ms", "difference"], lines))


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print the table, write the row and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--window", type=int, help=f"{CPU_WINDOW} on the CPU, {GPU_WINDOW} on a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-save", action="store_true", help="write nothing under benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, nothing written: does it run?")
    options = parser.parse_args(arguments)
    raise_allocator_thresholds()
    torch.manual_seed(0)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    shape, dtype = (GPU_SHAPE, torch.bfloat16) if on_gpu else (CPU_SHAPE, torch.float32)
    window = options.window or (GPU_WINDOW if on_gpu else CPU_WINDOW)
    lengths, rounds = options.lengths, options.rounds
    if options.smoke:
        shape, window, lengths, rounds = (1, 4, 2, 16), 16, [16, 48], 2
    entries = measure(shape, lengths, window, dtype, device, ["triton" if on_gpu else "cpu", "eager"], rounds)
    batch, heads, groups, head_dim = shape
    title = f"window {window}, B={batch} H={heads} G={groups} K={head_dim} {str(dtype).removeprefix('torch.')}, forward and backward"
    print(title)
    print_entries(entries)
    if options.smoke or options.no_save:
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, r in entry["ms"].items():
            lines.setdefault(name, []).append((entry["length"], r["median"]))
    log_log(RESULTS / f"attention_{device.type}.png", lines, "length, tokens", "ms (median)", title)
    row = {**environment(), "device": options.device, "dtype": str(dtype), "shape": shape, "window": window, "lengths": entries}
    print(f"row appended to {append_row('attention', row)}")


if __name__ == "__main__":
    main()
