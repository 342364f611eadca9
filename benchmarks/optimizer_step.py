"""One optimizer step by itself: its time, and the bytes of state it leaves, over the matrices of a few models.

`python -m benchmarks.optimizer_step` (minutes on two cores; --shapes llama130m and larger are for a GPU, `--device cuda`, which has not
been run yet). Every side steps the same weights with the same gradients, low rank plus noise, and takes its turn in every round;
Newton-Schulz runs in bfloat16 on all sides where the hardware multiplies it (torch.optim.Muon's always does). A first step, which makes
the state, is timed in a fresh optimizer of its own. COSMOS's peer is `benchmarks.official_cosmos`, compared with ours in float64 before
anything is timed.

SOAP renews its bases every 10 steps: its cost is the mean over a multiple of 10 rounds, of which the median sees nothing. Its first step
makes the bases and moves nothing.

Numbers to meet: Cosmos in at most 0.8 of the official COSMOS's time; in at most 1.6 (d256x4) and 1.35 (d768x2) of torch.optim.Muon's, with
1.3 and 1.2 as the aim; the first step in at most 0.2 of the official's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    Clock,
    append_row,
    clock_of,
    environment,
    interleaved,
    raise_allocator_thresholds,
    relative_rms,
    spread,
    table,
    verdict,
)
from benchmarks.decode import CLOCKS
from benchmarks.official_cosmos import OfficialCosmos
from benchmarks.plots import log_log
from components.contracts import NamedParameter, Role
from components.optim.cosmos import Cosmos
from components.optim.muon import Muon
from components.optim.soap import Soap
from kernels.newton_schulz.eager import fast_dtype

Matrix = tuple[Role, int, int]
Parameters = list[NamedParameter]
SAME_STEP = 1e-9  # relative RMS of two float64 trajectories of COSMOS; 2.5e-12 was measured
ROUNDS_OF_SOAP = 10  # between two renewals of its bases
OURS, OFFICIAL, TORCH_MUON = "Cosmos", "official COSMOS", "torch.optim.Muon"
WANTED = {  # shape: {(side, against): (bound, aim)}
    "d256x4": {(OURS, OFFICIAL): (0.8, None), (OURS, TORCH_MUON): (1.6, 1.3)},
    "d768x2": {(OURS, OFFICIAL): (0.8, None), (OURS, TORCH_MUON): (1.35, 1.2)},
}
WANTED_FIRST = 0.2  # of the official COSMOS's first step
_LR, _BETAS, _DECAY = 3e-3, (0.9, 0.95), 0.1


def gpt(d: int) -> list[Matrix]:
    """A block of 12 d^2 weights: q, k, v and o apart, an MLP of 4 d."""
    return [("qkv", d, d), ("qkv", d, d), ("qkv", d, d), ("o", d, d), ("gate_up", 4 * d, d), ("down", d, 4 * d)]


def llama(d: int, wide: int) -> list[Matrix]:
    """A block with a gated MLP, nothing fused."""
    return [*gpt(d)[:4], ("gate_up", wide, d), ("gate_up", wide, d), ("down", d, wide)]


SHAPES: dict[str, list[Matrix]] = {
    "d256x4": gpt(256) * 4,
    "d768x2": gpt(768) * 2,
    "llama130m": llama(768, 2048) * 12,
    "llama350m": llama(1024, 2736) * 24,
    "phi4mini_layer": [("qkv", 5120, 3072), ("o", 3072, 3072), ("gate_up", 16384, 3072), ("down", 3072, 8192)],  # fused, taken whole
    "smoke": gpt(24) * 2,
}


def parameters_of(matrices: list[Matrix], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Parameters:
    """The matrices with a gradient each: products of 16 random pairs of vectors, ever smaller, and noise of a tenth of their size."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = 2.0 ** -torch.arange(16.0)
    parameters = []
    for i, (role, m, n) in enumerate(matrices):
        parameter = nn.Parameter((0.02 * draw(m, n)).to(device, dtype))
        gradient = (draw(m, 16) * weights) @ draw(16, n)
        parameter.grad = (1e-3 * (gradient + 0.1 * draw(m, n))).to(device, dtype)
        parameters.append(NamedParameter(f"layer.{i}", parameter, role))
    return parameters


def copied(parameters: Parameters) -> Parameters:
    """Weights of their own, and the same gradients: no side writes to those."""
    copies = []
    for p in parameters:
        parameter = nn.Parameter(p.parameter.detach().clone())
        parameter.grad = p.parameter.grad
        copies.append(NamedParameter(p.name, parameter, p.role))
    return copies


def _tensors(parameters: Parameters) -> list[Tensor]:
    return [p.parameter for p in parameters]


_ROLES: dict[str, Any] = {"matrix_roles": ["qkv", "o", "gate_up", "down"], "no_decay_roles": [], "overrides": {}}
_NS: dict[str, Any] = {"ns_steps": 5, "ns_coefficients": [3.4445, -4.7750, 2.0315]}


def cosmos(parameters: Parameters, rank: int, ns_dtype: str = "auto") -> torch.optim.Optimizer:
    """Ours, as conf/optimizer/cosmos.yaml has it."""
    return Cosmos(
        parameters, lr=_LR, lr_ratio=0.2, betas=_BETAS, rank=rank, gamma=0.2, eps=1e-8, weight_decay=_DECAY, wd_mode="eta", nesterov=True,
        rel_floor=1e-5, residual_tol=1e-5, ns_dtype=ns_dtype, qr="auto", compile=False, **_NS, **_ROLES,
    )  # fmt: skip


def official(parameters: Parameters, rank: int, ns_dtype: torch.dtype | None = None) -> torch.optim.Optimizer:
    """The peer of `cosmos`, at the same settings."""
    device = parameters[0].parameter.device
    return OfficialCosmos(
        _tensors(parameters), 0.2 * _LR, _BETAS, rank, gamma=0.2, weight_decay=_DECAY, ns_dtype=ns_dtype or fast_dtype(device.type)
    )


def muon(parameters: Parameters) -> torch.optim.Optimizer:
    """Ours, as conf/optimizer/muon.yaml has it."""
    return Muon(
        parameters, lr=_LR, momentum=0.95, nesterov=True, weight_decay=_DECAY, ns_dtype="auto", scale="match_rms_adamw", adamw_lr=_LR,
        adamw_betas=_BETAS, adamw_eps=1e-8, **_NS, **_ROLES,
    )  # fmt: skip


def soap(parameters: Parameters) -> torch.optim.Optimizer:
    """Ours, as conf/optimizer/soap.yaml has it."""
    return Soap(
        parameters, lr=_LR, betas=(0.95, 0.95), shampoo_beta=None, eps=1e-8, weight_decay=_DECAY, precondition_frequency=ROUNDS_OF_SOAP,
        max_precond_dim=10000, sides="both", first_step="initialise", **_ROLES,
    )  # fmt: skip


Make = Callable[[Parameters], torch.optim.Optimizer]


def makers(rank: int) -> tuple[dict[str, Make], dict[str, str]]:
    """Every side that can be made here, in the order of the table, and why the others cannot."""
    sides: dict[str, Make] = {
        "torch.optim.AdamW": lambda ps: torch.optim.AdamW(_tensors(ps), _LR, _BETAS, weight_decay=_DECAY, fused=True),
        TORCH_MUON: lambda ps: torch.optim.Muon(_tensors(ps), _LR, _DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        "Muon": muon,
        OURS: lambda ps: cosmos(ps, rank),
        OFFICIAL: lambda ps: official(ps, rank),
        "SOAP": soap,
    }
    absent = {}
    try:
        theirs = import_module("pytorch_optimizer").SOAP
        sides["pytorch-optimizer SOAP"] = lambda ps: theirs(
            _tensors(ps), lr=_LR, betas=(0.95, 0.95), weight_decay=_DECAY, precondition_frequency=ROUNDS_OF_SOAP
        )
    except ImportError as error:
        absent["pytorch-optimizer SOAP"] = f"not measured: not installed ({error})"
    return sides, absent


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes behind all tensors of the state, each storage once: a view counts with all that it keeps alive."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _held(optimizer.state)}
    return sum(storages.values())


def _held(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _held(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _held(part)


def difference(device: torch.device, steps: int = 3) -> float:
    """Greatest relative RMS, over matrices, between what ours and the official COSMOS have moved in float64, by gradients that change."""
    start = parameters_of(gpt(24), device, torch.float64)
    sides = [copied(start), copied(start)]
    steppers = [cosmos(sides[0], 8, "float64"), official(sides[1], 8, torch.float64)]
    for seed in range(1, steps + 1):
        fresh = parameters_of(gpt(24), device, torch.float64, seed)
        for side, optimizer in zip(sides, steppers, strict=True):
            for p, new in zip(side, fresh, strict=True):
                p.parameter.grad = new.parameter.grad
            optimizer.step()
    moved = [[p.parameter.detach() - old.parameter.detach() for p, old in zip(side, start, strict=True)] for side in sides]
    return max(relative_rms(mine, theirs) for mine, theirs in zip(*moved, strict=True))


def measure(
    start: Parameters, sides: dict[str, Make], rounds: int, first_rounds: int, limit_seconds: float, clock: Clock
) -> dict[str, dict[str, Any]]:
    """Of every side: milliseconds of a step (and their mean) and of a first step, and bytes of state.

    start: weights to copy, with gradients. first_rounds: first steps of each side, 0 for none. limit_seconds: as for `interleaved`.
    """
    weights = {name: copied(start) for name in sides}
    steppers = {name: make(weights[name]) for name, make in sides.items()}
    # Two unmeasured steps: the first makes the state, and SOAP's second is the first that moves anything.
    seconds = interleaved(
        {name: optimizer.step for name, optimizer in steppers.items()}, dict.fromkeys(sides, rounds), 2, clock, limit_seconds
    )
    found: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        ms = [1e3 * value for value in values]
        found[name] = {"ms": spread(ms), "mean_ms": sum(ms) / len(ms), "state_bytes": state_bytes(steppers[name])}
    del steppers
    first: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(first_rounds):
        for name, make in sides.items():
            first[name].append(1e3 * clock(make(weights[name]).step))
    for name, values in first.items():
        found[name]["first_ms"] = spread(values) if values else None
    return found


def print_shape(shape: str, matrices: list[Matrix], found: dict[str, dict[str, Any]], threads: int) -> None:
    weights = sum(m * n for _, m, n in matrices)
    print(f"\n{shape}: {len(matrices)} matrices, {weights:,} weights fp32, {threads} threads")
    lines = []
    for name, r in found.items():
        first = f"{r['first_ms']['median']:.1f}" if r["first_ms"] else "-"
        times = [f"{r['ms']['median']:.2f}", f"{r['mean_ms']:.2f}", f"{r['ms']['min']:.2f} - {r['ms']['max']:.2f}", str(r["ms"]["runs"])]
        lines.append([name, *times, first, f"{r['state_bytes'] / 2**20:.2f}"])
    print(table(["optimizer", "median ms", "mean ms", "range ms", "runs", "first step ms", "state MiB"], lines))


def judge(shape: str, found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the ratios of Cosmos against its peers, next to the numbers to meet where the shape has some. Returns them."""
    ratios: dict[str, float] = {}
    if OURS not in found:
        return ratios
    wanted = WANTED.get(shape, {})
    for other in (OFFICIAL, TORCH_MUON):
        if other not in found:
            continue
        ratio = ratios[f"{OURS} / {other}"] = found[OURS]["ms"]["median"] / found[other]["ms"]["median"]
        bound, aim = wanted.get((OURS, other), (None, None))
        goal = f"; {verdict(ratio, bound, at_least=False)}" if bound else ""
        print(f"{shape}: {OURS} / {other} {ratio:.3f}{goal}{f' (aim {aim:g})' if aim else ''}")
    if OFFICIAL in found and found[OURS]["first_ms"]:
        ratio = found[OURS]["first_ms"]["median"] / found[OFFICIAL]["first_ms"]["median"]
        ratios[f"first step: {OURS} / {OFFICIAL}"] = ratio
        goal = f"; {verdict(ratio, WANTED_FIRST, at_least=False)}" if wanted else ""
        print(f"{shape}: first step of {OURS} / {OFFICIAL} {ratio:.3f}{goal}")
    return ratios


def picture(path: Path, shapes: dict[str, dict[str, dict[str, Any]]], machine: str) -> bool:
    """Time against state, a line for every side through its shapes."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for found in shapes.values():
        for name, r in found.items():
            lines.setdefault(name, []).append((r["state_bytes"] / 2**20, r["mean_ms"]))
    return log_log(path, lines, "state, MiB", "ms a step (mean)", f"one optimizer step, {', '.join(shapes)}; {machine}")


def main(arguments: list[str] | None = None) -> None:
    """Compare, measure, print tables and ratios, write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="d256x4,d768x2", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--arms", default="", help="comma-separated names of the table's sides; all of them by default")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=64, help="of COSMOS's subspace")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each side; a multiple of 10, for SOAP's mean")
    parser.add_argument("--first-rounds", type=int, default=1, help="measured first steps of each side; 0 leaves them out")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a shape begins no further round")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, on a machine that others use too")
    parser.add_argument("--no-save", action="store_true", help="write nothing under benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, nothing written: does it run?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.shapes, options.rank, options.rounds, options.no_save = "smoke", 8, 2, True
    names = options.shapes.split(",")
    sides, absent = makers(options.rank)
    arms = options.arms.split(",") if options.arms else list(sides)
    if unknown := [*(n for n in names if n not in SHAPES), *(a for a in arms if a not in sides and a not in absent)]:
        parser.error(f"unknown: {', '.join(unknown)}; shapes: {', '.join(SHAPES)}; arms: {', '.join([*sides, *absent])}")
    raise_allocator_thresholds()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    worst = difference(device)
    if worst > SAME_STEP:
        raise SystemExit(
            f"{OURS} and the {OFFICIAL} step differently: {worst:.1e} (relative RMS), allowed is {SAME_STEP:.0e}: nothing was timed"
        )
    print(f"steps of {OURS} and the {OFFICIAL} differ by {worst:.1e} (relative RMS, float64)")
    chosen = {name: make for name, make in sides.items() if name in arms}
    clock = clock_of(device) if device.type == "cuda" else CLOCKS[options.clock]
    shapes, ratios = {}, {}
    for shape in names:
        start = parameters_of(SHAPES[shape], device)
        found = measure(start, chosen, options.rounds, options.first_rounds, options.limit, clock)
        print_shape(shape, SHAPES[shape], found, torch.get_num_threads())
        shapes[shape] = found
    for name, why in absent.items():
        print(f"{name}: {why}")
    for shape, found in shapes.items():
        ratios[shape] = judge(shape, found)
    if not options.no_save:
        row = {**vars(options), **environment("pytorch-optimizer"), "dtype": "float32", "ns_dtype": str(fast_dtype(device.type))}
        row |= {"difference": worst, "shapes": shapes, "ratios": ratios, "absent": absent}
        path, machine = append_row("optimizer_step", row), f"{row['gpu'] or row['cpu']}, {row['threads']} threads"
        drawn = picture(path.with_name(f"optimizer_step_{device.type}.png"), shapes, machine)
        print(f"row appended to {path}{'; a picture beside it' if drawn else ''}")


if __name__ == "__main__":
    main()
