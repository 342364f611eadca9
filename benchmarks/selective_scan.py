"""Selective scan, forward and backward: ours against transformers' loop over time, as shipped and mended; cost against length.

`python -m benchmarks.selective_scan` (about two minutes on two cores; --stock-rounds 0 leaves the shipped loop out).
Every side gets the same inputs in its own layout; outputs and gradients are compared before anything is timed. Numbers to meet, at B=4
L=512 D=512 N=16 fp32: compiled at least 4 times as fast as eager, eager at least 20 times as fast as the shipped loop and 1.3 times as
fast as the mended one.

`--device cuda` times the Triton kernels against eager in bf16 at B=8 L=4096 D=3072 N=16, next to the least time that the card allows,
after a comparison with the float64 reference. That part has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.common import (
    RESULTS,
    append_row,
    clock_of,
    environment,
    interleaved,
    peak_memory,
    raise_allocator_thresholds,
    relative_rms,
    reset_peak_memory,
    spread,
    table,
    verdict,
)
from benchmarks.mamba_block import unbound_scan
from benchmarks.plots import log_log
from benchmarks.roofline import card_found, scan_floor

CPU_SHAPE, GPU_SHAPE = (4, 512, 512, 16), (8, 4096, 3072, 16)  # B, L, D, N
TOLERANCE = 1e-4  # relative RMS; fp32 sums of up to B*L*D = 1e6 terms in different orders
GPU_TOLERANCE = 1e-2  # bf16 inputs and outputs
WANTED = {("compiled", "eager"): 4.0, ("eager", "transformers"): 20.0, ("eager", "transformers, mended"): 1.3}  # (faster, slower)
LONGEST = {"transformers": 256, "transformers, mended": 2048}  # the shipped loop's backward grows with L^2, the mended one keeps B*L*D*N
SWEEP_DIM = 512  # channels of the one row in the comparison of lengths
_CHANNEL_MAJOR = ("u", "dt", "B", "C", "z")  # (B, L, X) here, (B, X, L) there
Run = Callable[[], tuple[Tensor, ...]]


def peer(case: cases.Case, scan: Callable[..., Any]) -> Run:
    """Forward and backward of a scan with the arguments of transformers' and mamba_ssm's, on the case's numbers in their layout."""
    x = {name: (t.transpose(1, 2).contiguous() if name in _CHANNEL_MAJOR else t.clone()) for name, t in case.inputs.items()}
    x = {name: t.requires_grad_() for name, t in x.items()}
    cotangent = cases.cotangents_of((case.inputs["u"],))[0].transpose(1, 2).contiguous()

    def run() -> tuple[Tensor, ...]:
        y = scan(x["u"], x["dt"], x["A"], x["B"], x["C"], D=x["D"], z=x["z"], delta_bias=x["dt_bias"], delta_softplus=True)
        y = y[0] if isinstance(y, tuple) else y
        grads = torch.autograd.grad(y, list(x.values()), cotangent)
        return (y.detach(), *grads)

    return run


def cpu_sides(case: cases.Case) -> dict[str, Run]:
    """The four sides in the order of the table."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return {
        "compiled": cases.forward_backward(case, "cpu"),
        "eager": cases.forward_backward(case, "eager"),
        "transformers, mended": peer(case, unbound_scan),
        "transformers": peer(case, mamba_selective_scan),
    }


def difference(case: cases.Case, backend: str, run: Run) -> float:
    """Greatest relative RMS between the output and gradients of a backend and what the peer's `run` returns."""
    ours, theirs = cases.results(case, backend), run()
    worst = 0.0
    for (name, value), other in zip(ours.items(), theirs):
        worst = max(worst, relative_rms(value, other.transpose(1, 2) if name[1:] in (*_CHANNEL_MAJOR, "0") else other))
    return worst


def compare_cpu(shape: tuple[int, int, int, int], rounds: int, stock_rounds: int) -> dict[str, Any]:
    """Check, time and print the four sides."""
    case = cases.scan_case(*shape, torch.float32, torch.device("cpu"))
    sides = cpu_sides(case)
    counts = {name: stock_rounds if name == "transformers" else rounds for name in sides}
    worst = max(difference(case, backend, sides["transformers, mended"]) for backend in ("cpu", "eager"))
    # The shipped loop is compared on 32 steps: at full length that would cost as much as a round.
    short = cases.scan_case(shape[0], min(32, shape[1]), *shape[2:], torch.float32, torch.device("cpu"))
    worst = max(worst, difference(short, "cpu", cpu_sides(short)["transformers"]))
    if worst > TOLERANCE:
        raise SystemExit(f"outputs or gradients differ by {worst:.1e} (relative RMS), allowed is {TOLERANCE:.0e}: nothing was timed")
    seconds = interleaved({name: run for name, run in sides.items() if counts[name]}, counts)
    found = {name: spread(values) for name, values in seconds.items() if values}
    base = found["compiled"]["median"]
    print(f"B={shape[0]} L={shape[1]} D={shape[2]} N={shape[3]} fp32, forward and backward, {torch.get_num_threads()} threads")
    lines = [
        [name, f"{r['median'] * 1e3:.1f}", f"{r['min'] * 1e3:.1f} - {r['max'] * 1e3:.1f}", str(r["runs"]), f"{r['median'] / base:.2f}x"]
        for name, r in found.items()
    ]
    print(table(["scan", "median ms", "range ms", "runs", "time against compiled"], lines))
    print(f"greatest relative RMS difference of output and gradients: {worst:.1e}")
    ratios = {}
    for (fast, slow), bound in WANTED.items():
        if slow in found:
            ratio = ratios[f"{fast} against {slow}"] = found[slow]["median"] / found[fast]["median"]
            print(f"{fast} against {slow}: {ratio:.1f} times as fast; {verdict(ratio, bound, at_least=True)}")
    return {"shape": shape, "seconds": found, "ratios": ratios, "difference": worst}


def against_length(lengths: list[int], dim: int, rounds: int, stock: bool) -> dict[str, list[tuple[int, float]]]:
    """Median milliseconds of forward and backward of one row, by side and length."""
    found: dict[str, list[tuple[int, float]]] = {}
    for length in lengths:
        sides = cpu_sides(cases.scan_case(1, length, dim, 16, torch.float32, torch.device("cpu")))
        sides = {name: run for name, run in sides.items() if length <= LONGEST.get(name, length) and (stock or name != "transformers")}
        counts = {name: 2 if name == "transformers" else rounds for name in sides}
        for name, values in interleaved(sides, counts, limit_seconds=20).items():
            found.setdefault(name, []).append((length, 1e3 * spread(values)["median"]))
    print(f"\nmilliseconds against length, B=1 D={dim} N=16 fp32, forward and backward")
    cells = {(name, length): f"{ms:.2f}" for name, points in found.items() for length, ms in points}
    print(table(["length", *found], [[str(length), *(cells.get((name, length), "-") for name in found)] for length in lengths]))
    return found


def sliced(case: cases.Case, channels: int) -> cases.Case:
    """The first row's first channels as a scan of their own: every channel runs by itself."""
    cut = {"A": lambda t: t[:channels], "B": lambda t: t[:1], "C": lambda t: t[:1], "D": lambda t: t[:channels]}
    cut |= {"dt_bias": cut["D"], **dict.fromkeys(("u", "dt", "z"), lambda t: t[:1, :, :channels])}
    return cases.Case(case.name, case.op, {name: cut[name](t).contiguous() for name, t in case.inputs.items()}, case.learned, case.call)


def measure_device(
    shape: tuple[int, int, int, int], device: torch.device, backend: str, rounds: int, limit_seconds: float = 20.0
) -> dict[str, Any]:
    """Check `backend` on a slice against the float64 reference, then time it and eager, forward and forward + backward, in bf16."""
    case = cases.scan_case(*shape, torch.bfloat16, device)
    slice_errors = cases.errors(sliced(case, 64), backend)
    sides: dict[str, Callable[[], object]] = {}
    for side in dict.fromkeys((backend, "eager")):
        sides[f"{side} forward"], sides[f"{side} forward + backward"] = cases.forward(case, side), cases.forward_backward(case, side)
    peers, absent = optional_peers(case)
    sides |= peers
    seconds = interleaved(sides, dict.fromkeys(sides, rounds), warmup=3, clock=clock_of(device), limit_seconds=limit_seconds)
    found: dict[str, Any] = {"shape": shape, "ms": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()}}
    reset_peak_memory(device)
    sides[f"{backend} forward + backward"]()
    found |= {"errors": slice_errors, "peers": absent, "peak_bytes": peak_memory(device), "floor_ms": None}
    card = card_found(device)
    if card is not None:
        floors = scan_floor(card, *shape)
        found["floor_ms"] = {"card": card.name, "forward": floors[0].ms, "backward": floors[1].ms, "both": floors[0].ms + floors[1].ms}
    return found


def optional_peers(case: cases.Case) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Scans of other packages that can be imported, and why the others are not measured."""
    absent = {"flash-linear-attention": "not measured: it has no Mamba-1 scan of its own and calls mamba_ssm's"}
    if case.device.type != "cuda":
        return {}, absent | {"mamba_ssm": "not measured: its scan needs CUDA"}
    try:
        scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError as error:
        return {}, absent | {"mamba_ssm": f"not measured: not installed ({error})"}
    return {"mamba_ssm forward + backward": peer(case, scan)}, absent


def print_device(found: dict[str, Any]) -> None:
    batch, length, dim, states = found["shape"]
    print(f"B={batch} L={length} D={dim} N={states} bf16")
    lines = [[name, f"{r['median']:.3f}", f"{r['min']:.3f} - {r['max']:.3f}", str(r["runs"])] for name, r in found["ms"].items()]
    print(table(["scan", "median ms", "range ms", "runs"], lines))
    worst = max(found["errors"], key=found["errors"].get)
    error = found["errors"][worst]
    print(f"against float64 on a slice: worst {worst}, relative RMS {error:.1e}; {verdict(error, GPU_TOLERANCE, at_least=False)}")
    if found["floor_ms"] is not None:
        print("least ms on this {card}: forward {forward:.2f}, backward {backward:.2f}, both {both:.2f}".format(**found["floor_ms"]))
    for name, why in found["peers"].items():
        print(f"{name}: {why}")


def run_cpu(options: argparse.Namespace) -> dict[str, Any]:
    shape = (2, 32, 16, 4) if options.smoke else CPU_SHAPE
    rounds, stock_rounds = (2, 1) if options.smoke else (options.rounds, options.stock_rounds)
    lengths = [16, 32] if options.smoke else options.lengths
    found = compare_cpu(shape, rounds, stock_rounds)
    dim = shape[2] if options.smoke else SWEEP_DIM
    sweep = against_length(lengths, dim, min(rounds, 5), stock_rounds > 0)
    if not options.smoke and not options.no_save:
        title = f"selective scan, B=1 D={dim} N=16 fp32, forward and backward, {torch.get_num_threads()} threads"
        log_log(RESULTS / "selective_scan_cpu.png", sweep, "length, tokens", "ms (median)", title)
    return found | {"against_length": sweep, "sweep": {"batch": 1, "dim": dim, "states": 16}}


def run_device(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    found = measure_device(GPU_SHAPE, device, "triton", options.rounds)
    print_device(found)
    sweep: dict[str, list[tuple[int, float]]] = {}
    for length in options.lengths:
        one = measure_device((1, length, *GPU_SHAPE[2:]), device, "triton", 20, limit_seconds=10)
        for name, r in one["ms"].items():
            sweep.setdefault(name, []).append((length, r["median"]))
    if not options.no_save:
        log_log(RESULTS / "selective_scan_cuda.png", sweep, "length, tokens", "ms (median)", "selective scan, B=1 D=3072 N=16 bf16")
    return found | {"against_length": sweep}


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print the tables, write the row and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20, help="measured calls of all sides but the shipped loop")
    parser.add_argument("--stock-rounds", type=int, default=2, help="measured calls of the shipped loop, seconds each; 0 leaves it out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--no-save", action="store_true", help="write nothing under benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, nothing written: does it run?")
    options = parser.parse_args(arguments)
    raise_allocator_thresholds()
    torch.manual_seed(0)
    device = torch.device(options.device)
    found = run_cpu(options) if device.type == "cpu" else run_device(options, device)
    if not options.smoke and not options.no_save:
        row = {**environment("transformers"), "device": options.device, "dtype": "float32" if device.type == "cpu" else "bfloat16", **found}
        print(f"row appended to {append_row('selective_scan', row)}")


if __name__ == "__main__":
    main()
