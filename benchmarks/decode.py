"""Decoding: milliseconds per token and bytes of state against the position, the hybrid beside full attention of the same width.

`python -m benchmarks.decode` (a minute on one CPU core at size tiny). With --device cuda both models replay CUDA graphs, full attention
against caches of the final size, or neither does (--no-graphs); that has not been run on a GPU yet. Weights are random and caches are
filled with noise: cost depends on neither, and positions of 64K would otherwise take minutes of prefill. Sides take turns of 16 tokens, so
that a change of the machine's load meets all of them while a side does not find its weights swept out of the processor's caches by the side
before. Number to meet, measured first and by itself: the hybrid at position 8192 costs at most 1.1 times a token at position 128, and the
process does not grow on the way there.
"""

from __future__ import annotations

import argparse
import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    append_row,
    environment,
    interleaved,
    model_shape,
    raise_allocator_thresholds,
    relative_rms,
    spread,
    table,
    wall_seconds,
)
from benchmarks.plots import log_log
from components.blocks import Decoder
from components.contracts import Batch
from components.decode_state import DecodeState
from components.decoding.graph_step import StaticStep
from components.layer_state import KVCache
from components.models.samba import Samba
from components.rope.rules import NoRescaling

TOKENS = 16  # decoded by a side in its turn
VOCABULARY, TRAINED = 2048, 256  # of the default run: rows of the head, length of a training row
PATTERNS = {"samba": ["mamba", "attention"], "full attention": ["full_attention"]}
NEAR, FAR, BOUND = 128, 8192, 1.1  # the number to meet
Side = tuple[str, int]  # (model, position)
DecodeStep = Callable[[Tensor], Tensor]  # ids (B, 1) -> logits (B, V) of the next


def model_of(pattern: list[str], size: str, device: torch.device) -> Decoder:
    """The model of conf/model/samba.yaml with the given mixers."""
    keys = [key for key in inspect.signature(Samba).parameters if key not in ("max_length", "rope")]
    shape = {**model_shape("samba", size, *keys), "layer_pattern": pattern}
    shape["vocab_size"] = shape["vocab_size"] or VOCABULARY
    torch.manual_seed(0)
    return Samba(**shape, max_length=TRAINED, rope=NoRescaling()).eval().to(device)


def state_at(model: Decoder, position: int, batch: int, room: int, dtype: torch.dtype) -> DecodeState:
    """A state whose rows have read `position` tokens, all noise; room: tokens that it may still take."""
    saved = model.new_state(batch, position + room, dtype).save()
    for layer in saved["layers"]:
        if layer["kind"] == "kv" and layer["window"] is None:
            for name in ("keys", "values"):
                rows, groups, _, size = layer[name].shape
                layer[name] = layer[name].new_empty(rows, groups, position, size)
        for value in layer.values():
            if isinstance(value, torch.Tensor):
                value.normal_(std=0.1)
    saved["length"].fill_(position)
    return DecodeState.load(saved, saved["length"].device)


def make_static(state: DecodeState, slots: int) -> DecodeState:
    """Give the caches that grow `slots` slots for good, in place, so that a CUDA graph can be replayed on them. Returns the state.

    Such a cache is a ring that never turns: the same attention for as long as no row is longer than `slots`.
    """
    for layer in state.layers:
        if isinstance(layer, KVCache) and layer.window is None:
            room = (0, 0, 0, slots - layer.keys.shape[2])
            layer.keys, layer.values, layer.window = F.pad(layer.keys, room), F.pad(layer.values, room), slots
    return state


def static_step(model: Decoder, state: DecodeState, dtype: torch.dtype) -> StaticStep:
    """A step from a copy of `state` on, in buffers that never move: a CUDA graph on a GPU, the same without a graph elsewhere."""
    step = StaticStep(model, state, state.batch_size, dtype)
    step.load(state)
    return step


def plain_step(model: Decoder, state: DecodeState, dtype: torch.dtype) -> DecodeStep:
    """A step that is launched operator by operator, and moves `state` on. dtype: that of the autocast which it is called under."""
    return lambda ids: model.logits(model(Batch(ids), state).hidden[:, -1])


@contextmanager
def inference(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """No gradients, autocast to `dtype` where it is not float32; autocast keeps its casts of float32 weights until the end."""
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def decoding(step: DecodeStep, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A call that decodes TOKENS tokens of `batch` rows greedily and goes on from there the next time."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def run() -> None:
        nonlocal token
        with inference(device, dtype):
            for _ in range(TOKENS):
                token = step(token).argmax(-1, keepdim=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def step_difference(model: Decoder, batch: int, position: int, dtype: torch.dtype, tokens: int = 4) -> float:
    """Greatest relative RMS between the logits of static and of plain steps, from the same state on and over the same tokens."""
    device = next(model.parameters()).device
    state = state_at(model, position, batch, tokens, dtype)
    static = static_step(model, make_static(state.fork(1), position + tokens), dtype)
    plain, worst = plain_step(model, state, dtype), 0.0
    for _ in range(tokens):
        ids = torch.randint(model.vocab_size, (batch, 1), device=device)
        with inference(device, dtype):
            worst = max(worst, relative_rms(static(ids), plain(ids)))
    return worst


def resident_bytes() -> int:
    """Resident size of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_bytes(run: Callable[[], None], tokens: int) -> int:
    """By how much the process is larger after `tokens` more tokens."""
    run()
    before = resident_bytes()
    for _ in range(tokens // TOKENS):
        run()
    return resident_bytes() - before


def near_and_far(options: argparse.Namespace) -> dict[str, Any]:
    """The number to meet: cost of a token at FAR over that at NEAR, the two in turns; and growth of the process in between (CPU)."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model, turns = model_of(PATTERNS["samba"], options.size, device), 5 * options.rounds
    step = static_step if device.type == "cuda" and options.graphs else plain_step
    states = {position: state_at(model, position, options.batch, FAR, dtype) for position in (NEAR, FAR)}
    runs: dict[str, Callable[[], object]] = {
        str(position): decoding(step(model, state, dtype), options.batch, dtype, device) for position, state in states.items()
    }
    seconds = interleaved(runs, dict.fromkeys(runs, turns), clock=CLOCKS[options.clock])
    near, far = (spread([1e3 * value / TOKENS for value in values]) for values in seconds.values())
    found = {"near_ms": near, "far_ms": far, "slowdown": far["median"] / near["median"]}
    if device.type == "cpu":
        further = plain_step(model, state_at(model, NEAR, options.batch, FAR, dtype), dtype)
        found["growth_bytes"] = growth_bytes(decoding(further, options.batch, dtype, device), FAR - NEAR)
    return found


def measure(options: argparse.Namespace) -> dict[Side, dict[str, Any]]:
    """Figures of every side. Bytes of state are those at the position, without room for what follows."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    room, graphs = TOKENS * (options.rounds + 2), device.type == "cuda" and options.graphs
    runs: dict[str, Callable[[], object]] = {}
    found: dict[Side, dict[str, Any]] = {}
    for name, pattern in PATTERNS.items():
        model = model_of(pattern, options.size, device)
        for position in options.positions:
            state = state_at(model, position, options.batch, room, dtype)
            found[(name, position)] = {"state_bytes": state.size_bytes}
            if graphs:
                state = make_static(state, position + room)
            step = (static_step if graphs else plain_step)(model, state, dtype)
            runs[f"{name} {position}"] = decoding(step, options.batch, dtype, device)
    seconds = interleaved(runs, dict.fromkeys(runs, options.rounds), clock=CLOCKS[options.clock])
    for (name, position), row in found.items():
        row["ms_per_token"] = spread([1e3 * value / TOKENS for value in seconds[f"{name} {position}"]])
    return found


def cpu_seconds(run: Callable[[], object]) -> float:
    """Processor time of one call: for a machine that others use too. More than wall time with several threads."""
    began = time.process_time()
    run()
    return time.process_time() - began


def pictures(found: dict[Side, dict[str, Any]], title: str, stem: str) -> list[str]:
    """Draw cost and state against the position; returns the files' names."""
    drawn = []
    for name, what, figure in (
        ("ms", "ms per token (median)", lambda row: row["ms_per_token"]["median"]),
        ("state", "decode state, MiB", lambda row: row["state_bytes"] / 2**20),
    ):
        lines = {model: [(place, figure(row)) for (side, place), row in found.items() if side == model] for model in PATTERNS}
        if log_log(RESULTS / f"{stem}_{name}.png", lines, "position in the sequence, tokens", what, title):
            drawn.append(f"{stem}_{name}.png")
    return drawn


CLOCKS = {"wall": wall_seconds, "cpu": cpu_seconds}  # a GPU's steps wait for it at the end of a turn


def main() -> None:
    """Measure, print the table, write the row and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="an option of model/size")
    parser.add_argument("--positions", type=int, nargs="+", default=[NEAR, 1024, 2048, 4096, FAR, 16384, 32768, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help=f"turns of {TOKENS} tokens for each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="on a GPU: launch every operator of every step")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, on a machine that others use too")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    raise_allocator_thresholds()
    wanted = near_and_far(options)
    verdict = "met" if wanted["slowdown"] <= BOUND else "NOT met"
    print(
        f"samba at {NEAR} {wanted['near_ms']['median']:.3f}, at {FAR} {wanted['far_ms']['median']:.3f} ms a token: "
        f"{wanted['slowdown']:.3f}x; at most {BOUND}x is wanted: {verdict}"
    )
    if "growth_bytes" in wanted:
        print(f"the process grew by {wanted['growth_bytes'] / 2**20:.2f} MiB from position {NEAR} to {FAR}")
    found = measure(options)
    lines = []
    for position in options.positions:
        ours, full = (found[(name, position)] for name in PATTERNS)
        times = [row["ms_per_token"] for row in (ours, full)]
        lines.append([
            f"{position:,}", *(f"{t['median']:.2f} ({t['min']:.2f} - {t['max']:.2f})" for t in times),
            f"{times[1]['median'] / times[0]['median']:.2f}x", *(f"{row['state_bytes']:,}" for row in (ours, full)),
        ])  # fmt: skip
    print(table(["position", *(f"{name} ms/token" for name in PATTERNS), "ratio", *(f"{name} state bytes" for name in PATTERNS)], lines))
    row: dict[str, Any] = {**environment("matplotlib"), **vars(options), "tokens_a_turn": TOKENS, **wanted}
    row["sides"] = [{"model": name, "position": position, **figures} for (name, position), figures in found.items()]
    title = f"size {options.size}, batch {options.batch}, {options.dtype}, {row['cpu']}, {row['threads']} threads"
    drawn = pictures(found, title, f"decode_{options.size}_{options.device}_batch{options.batch}")
    print(f"row appended to {append_row('decode', row)}; pictures beside it: {', '.join(drawn) or 'none'}")


if __name__ == "__main__":
    main()
