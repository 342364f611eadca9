"""Everything that needs a GPU, in one command of less than nine minutes: `python -m benchmarks.gpu`.

It has never run on a GPU: what is checked is its control flow, by `--smoke` on the CPU, where no CUDA graph is recorded. Needs torch and
triton alone. Sections run one by one; an exception in one is recorded, the others go on, and the exit status is 1 at the end. One JSON row
with everything goes to benchmarks/results/gpu.jsonl. Without a GPU: one line, exit status 2.

Numbers to meet on an H200: bf16 gradients within 1e-2 (relative RMS) of the float64 references; selective scan forward and backward at B=8
L=4096 D=3072 N=16 in at most 3 ms; Samba-421M trains at 110,000 tokens/s or more. The paper (arXiv 2406.07522) reports 3.64 times the
decoding speed of full attention at 64K and 3.73 times at reading a prompt of 128K, on an A100.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import attention, cases, decode, roofline, selective_scan, train_samba
from benchmarks.common import append_row, clock_of, environment, interleaved, raise_allocator_thresholds, spread, verdict
from components.blocks import Decoder
from components.contracts import Batch

TOLERANCE = 1e-2  # relative RMS of bf16 outputs and gradients
SCAN_MS, TRAIN_TOKENS, TRAIN_AIM = 3.0, 110_000, 150_000
PAPER_DECODE, PAPER_PROMPT = 3.64, 3.73
COMPARISONS = 5  # timed in one section, at most; each takes its three rounds and at most Plan.limit_seconds, or twice that for whole models


@dataclass(frozen=True)
class Plan:
    """What to run. check: (B, L, D, N) of the compared scan, whose numbers the other compared ops share."""

    device: torch.device
    backend: str
    check: tuple[int, int, int, int]
    heads: tuple[tuple[int, int, int], ...]  # (H, G, K) of the compared attentions
    scan: tuple[int, int, int, int]
    hidden: int
    intermediate: int
    vocabulary: int
    attention: tuple[int, int, int, int]  # B, H, G, K
    lengths: tuple[int, ...]  # of attention
    window: int
    train: tuple[str, int, int]  # size, rows, length
    decode: tuple[str, int, int]  # size, rows, position
    steps: tuple[str, int, int]  # the same, of the decoding steps that are compared
    prompt: tuple[str, int]  # size, length
    rounds: int
    limit_seconds: float  # of each timed comparison
    dtype: torch.dtype = torch.bfloat16


def full_plan() -> Plan:
    """Samba-421M for kernels and training; decoding and prompt at 1.7B, batch 16, as in the paper."""
    return Plan(
        torch.device("cuda"), "triton", (2, 301, 200, 16), ((12, 12, 128), (8, 2, 64), (11, 1, 256)),
        (8, 4096, 3072, 16), 1536, 4096, 32000, (8, 12, 12, 128), (4096, 16384), 2048,
        ("421m", 8, 4096), ("1b7", 16, 65536), ("small", 4, 301), ("1b7", 131072), 20, 15.0,
    )  # fmt: skip


def smoke_plan(backend: str) -> Plan:
    """Tiny shapes on the CPU."""
    return Plan(
        torch.device("cpu"), backend, (2, 19, 20, 4), ((4, 2, 16),), (1, 16, 20, 4), 24, 32, 50,
        (1, 2, 1, 16), (24,), 8, ("test", 1, 16), ("test", 1, 24), ("test", 2, 19), ("test", 24), 1, 1.0,
    )  # fmt: skip


def compared_cases(plan: Plan) -> list[Callable[[], cases.Case]]:
    """Cases at odd sizes, made when their turn comes."""
    batch, length, dim, states = plan.check
    rows, dtype, device = batch * length, plan.dtype, plan.device
    made: list[Callable[[], cases.Case]] = [
        lambda: cases.scan_case(batch, length, dim, states, dtype, device),
        lambda: cases.scan_case(batch, length, dim, states, dtype, device, carried=True),
        lambda: cases.conv_case(batch, length, dim, dtype, device),
        lambda: cases.conv_case(batch, length, dim, dtype, device, carried=True),
        lambda: cases.norm_case(rows, plan.hidden, dtype, device),
        lambda: cases.add_norm_case(rows, plan.hidden, dtype, device),
        lambda: cases.swiglu_case(rows, plan.intermediate, dtype, device),
        lambda: cases.cross_entropy_case(rows, dim, plan.vocabulary, dtype, device),
    ]
    for heads, groups, size in plan.heads:
        for window in (length // 3, None):
            for documents in (False, True):
                made.append(partial(cases.attention_case, batch, heads, groups, length, size, window, dtype, device, documents))
            made.append(partial(cases.cached_attention_case, batch, heads, groups, length, size, window, dtype, device))
        made.append(partial(cases.rope_case, batch, heads, length, size, dtype, device))
    return made


def correctness(plan: Plan) -> dict[str, Any]:
    """Every op against its float64 reference, then decoding steps; a case that fails does not end the section."""
    found: dict[str, Any] = {"failed": []}
    for i, make in enumerate(compared_cases(plan)):
        name = f"case {i}"
        try:
            case = make()
            name = f"{case.name} {tuple(next(iter(case.inputs.values())).shape)}"
            errors = found[name] = cases.errors(case, plan.backend)
        except Exception as error:
            found["failed"].append(f"{name}: {type(error).__name__}: {error}")
            traceback.print_exc()
            continue
        worst = max(errors, key=lambda key: errors[key])
        print(f"  {name}: worst {worst} {errors[worst]:.1e}")
        if not errors[worst] <= TOLERANCE:  # also where it is NaN
            found["failed"].append(f"{name}: {worst} differs by {errors[worst]:.1e}, allowed is {TOLERANCE:.0e}")
    found["steps"] = replayed_steps(plan, found["failed"])
    return found


def replayed_steps(plan: Plan, failed: list[str]) -> dict[str, Any]:
    """Logits of replayed CUDA graphs against plain steps, for each model; nothing without a GPU. Adds to `failed`."""
    if plan.device.type != "cuda":
        print("  decoding steps, graph against none: skipped, a CUDA graph needs a GPU")
        return {"skipped": "a CUDA graph needs a GPU"}
    found: dict[str, Any] = {}
    size, rows, position = plan.steps
    for name, pattern in decode.PATTERNS.items():
        try:
            error = found[name] = decode.step_difference(model_of(plan, pattern, size), rows, position, plan.dtype)
        except Exception as problem:
            failed.append(f"decoding steps of {name}: {type(problem).__name__}: {problem}")
            traceback.print_exc()
            continue
        print(f"  decoding steps of {name}, graph against none: {error:.1e}")
        if not error <= TOLERANCE:
            failed.append(f"decoding steps of {name}: a graph's differ by {error:.1e}, allowed is {TOLERANCE:.0e}")
    return found


def scan(plan: Plan) -> dict[str, Any]:
    """Selective scan against eager and the card's limits."""
    found = selective_scan.measure_device(plan.scan, plan.device, plan.backend, plan.rounds, plan.limit_seconds)
    selective_scan.print_device(found)
    ms = found["ms"][f"{plan.backend} forward + backward"]["median"]
    print(f"  forward + backward {ms:.2f} ms; {verdict(ms, SCAN_MS, at_least=False)}")
    return found


def kernels(plan: Plan) -> dict[str, Any]:
    """The other ops against eager, at the shapes of one layer."""
    batch, length, dim, _ = plan.scan
    rows, dtype, device, card = batch * length, plan.dtype, plan.device, roofline.card_found(plan.device)
    _, heads, _, size = plan.attention
    turned = roofline.traffic_floor
    timed: list[tuple[Callable[[], cases.Case], Callable[[roofline.Card], tuple[roofline.Floor, roofline.Floor]]]] = [
        (lambda: cases.conv_case(batch, length, dim, dtype, device), lambda c: turned(c, *roofline.conv_bytes(batch, length, dim))),
        (lambda: cases.add_norm_case(rows, plan.hidden, dtype, device), lambda c: turned(c, *roofline.add_norm_bytes(rows, plan.hidden))),
        (
            lambda: cases.swiglu_case(rows, plan.intermediate, dtype, device),
            lambda c: turned(c, *roofline.swiglu_bytes(rows, plan.intermediate)),
        ),
        (lambda: cases.rope_case(batch, heads, length, size, dtype, device), lambda c: turned(c, *[4 * rows * heads * size] * 2)),
        (
            lambda: cases.cross_entropy_case(rows, plan.hidden, plan.vocabulary, dtype, device),
            lambda c: roofline.cross_entropy_floor(c, rows, plan.hidden, plan.vocabulary),
        ),
    ]
    found: dict[str, Any] = {"failed": []}
    for make, floors in timed:
        name = "?"
        try:
            case = make()
            name = case.name
            sides: dict[str, Callable[[], object]] = {}
            for backend in dict.fromkeys((plan.backend, "eager")):
                sides[f"{backend} forward"] = cases.forward(case, backend)
                sides[f"{backend} forward + backward"] = cases.forward_backward(case, backend)
            seconds = interleaved(sides, dict.fromkeys(sides, plan.rounds), 3, clock_of(device), plan.limit_seconds)
            ms = {side: spread([1e3 * s for s in values]) for side, values in seconds.items()}
            least = None if card is None else [floor.ms for floor in floors(card)]
            found[name] = {"ms": ms, "floor_ms": least}
            text = ", ".join(f"{side} {r['median']:.3f}" for side, r in ms.items())
            print(f"  {name}: {text} ms" + ("" if least is None else f"; least {least[0]:.3f} and {least[1]:.3f} ms"))
        except Exception as error:
            found["failed"].append(f"{name}: {type(error).__name__}: {error}")
            traceback.print_exc()
        release()
    return found


def windowed(plan: Plan) -> dict[str, Any]:
    """Attention against torch's with a mask, without flex_attention."""
    return _attention(plan, list(plan.lengths), with_flex=False)


def flex(plan: Plan) -> dict[str, Any]:
    """Attention against flex_attention, which torch compiles first: a section of its own, as that may fail."""
    return _attention(plan, [plan.lengths[0]], with_flex=True)


def _attention(plan: Plan, lengths: list[int], with_flex: bool) -> dict[str, Any]:
    entries = attention.measure(
        plan.attention, lengths, plan.window, plan.dtype, plan.device, [plan.backend], plan.rounds, plan.limit_seconds, with_flex
    )
    attention.print_entries(entries)
    return {"shape": plan.attention, "window": plan.window, "lengths": entries}


def training(plan: Plan) -> dict[str, Any]:
    """Tokens per second of Samba, then of full attention, one in memory at a time."""
    size, rows, length = plan.train
    found: dict[str, Any] = {}
    for name, pattern in decode.PATTERNS.items():
        models = {name: model_of(plan, pattern, size)}
        found |= train_samba.measure(models, rows, length, plan.dtype, plan.device, plan.rounds, 2 * plan.limit_seconds)
        del models
        release()
    train_samba.print_found(found)
    rate, card = found["samba"]["tokens_per_second"]["median"], roofline.card_found(plan.device)
    if card is not None:
        parameters = found["samba"]["parameters"]
        seconds = sum(roofline.samba_step_ms(card, rows, length, **train_samba.floor_shape(size), parameters=parameters).values()) / 1e3
        found["samba"]["floor_tokens_per_second"] = rows * length / seconds
        print(f"  at most {rows * length / seconds:,.0f} tokens/s on this {card.name}")
    print(f"  {rate:,.0f} tokens/s; {verdict(rate, TRAIN_TOKENS, True)}; the aim: {verdict(rate, TRAIN_AIM, True)}")
    return found


def model_of(plan: Plan, pattern: list[str], size: str) -> Decoder:
    """Made on the device itself: drawing 1.7e9 weights on the CPU takes longer than a section."""
    with plan.device:
        return decode.model_of(pattern, size, plan.device)


def bf16_weights(model: Decoder) -> Decoder:
    """Matrices in bf16, as for serving; norms, convolutions, A, D and the dt bias stay float32."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.to(torch.bfloat16)
    return model


def decoding_side(plan: Plan, model: Decoder, static: bool) -> Callable[[], None]:
    """A call that decodes with `model`; the state that it began with is freed where the step has a copy."""
    _, rows, position = plan.decode
    room = decode.TOKENS * (plan.rounds + 8)
    state = decode.state_at(model, position, rows, room, plan.dtype)
    step: decode.DecodeStep
    if static:
        step = decode.static_step(model, decode.make_static(state, position + room), plan.dtype)
    else:
        step = decode.plain_step(model, state, plan.dtype)
    return decode.decoding(step, rows, plan.dtype, plan.device)


def decoding(plan: Plan) -> dict[str, Any]:
    """Milliseconds a token far into the sequence, like against like: both models replay CUDA graphs (on the CPU: run the same static
    steps without), then both launch every operator.

    Full attention's graph reads caches of the final size (`decode.make_static`), under one percent more slots than are filled.
    """
    size, rows, position = plan.decode
    sides: dict[str, Callable[[], object]] = {}
    graphs = "graphs" if plan.device.type == "cuda" else "static steps"
    models = {name: bf16_weights(model_of(plan, pattern, size)) for name, pattern in decode.PATTERNS.items()}
    found: dict[str, Any] = {"size": size, "batch": rows, "position": position, "failed": []}
    for kind, static, suffix in ((graphs, True, ""), ("no graphs", False, "_without_graphs")):
        try:
            sides = {name: decoding_side(plan, model, static) for name, model in models.items()}
            seconds = interleaved(sides, dict.fromkeys(sides, plan.rounds), 2, clock_of(plan.device), 2 * plan.limit_seconds)
        except Exception as error:
            found["failed"].append(f"{kind}: {type(error).__name__}: {error}")
            traceback.print_exc()
        else:
            ms = found[f"ms_per_token{suffix}"] = {
                name: spread([1e3 * s / decode.TOKENS for s in values]) for name, values in seconds.items()
            }
            ratio = found[f"ratio{suffix}"] = ms["full attention"]["median"] / ms["samba"]["median"]
            text = ", ".join(f"{name} {r['median']:.2f} ms a step" for name, r in ms.items())
            print(f"  position {position}, batch {rows}, {kind}: {text}; ratio {ratio:.2f}")
        sides = {}  # 26 GB of full attention's cache at 64K
        release()
    print(f"  the paper has a ratio of {PAPER_DECODE} on an A100")
    return found


def prompt(plan: Plan) -> dict[str, Any]:
    """Milliseconds to read one long row into a fresh state."""
    size, length = plan.prompt
    ids = torch.zeros(1, length, dtype=torch.int64, device=plan.device)
    sides: dict[str, Callable[[], object]] = {}
    for name, pattern in decode.PATTERNS.items():
        model = bf16_weights(model_of(plan, pattern, size))

        def read(model: Decoder = model) -> None:
            with torch.inference_mode(), torch.autocast(plan.device.type, plan.dtype):
                state = model.new_state(1, length, plan.dtype)
                model.logits(model(Batch(ids), state).hidden[:, -1])

        sides[name] = read
    rounds = min(10, plan.rounds)
    seconds = interleaved(sides, dict.fromkeys(sides, rounds), 1, clock_of(plan.device), 2 * plan.limit_seconds)
    ms = {name: spread([1e3 * s for s in values]) for name, values in seconds.items()}
    ratio = ms["full attention"]["median"] / ms["samba"]["median"]
    print(f"  {length} tokens: " + ", ".join(f"{name} {r['median']:.1f} ms" for name, r in ms.items()))
    print(f"  ratio {ratio:.2f}; the paper has {PAPER_PROMPT} on an A100")
    return {"size": size, "length": length, "ms": ms, "ratio": ratio}


SECTIONS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "correctness": correctness, "scan": scan, "training": training, "decode": decoding, "prompt": prompt, "kernels": kernels,
    "attention": windowed, "flex_attention": flex,
}  # fmt: skip


def release() -> None:
    """Give freed memory back, so that a section does not fail for what an earlier one left."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def run(plan: Plan, names: list[str], budget_seconds: float, found: dict[str, Any]) -> list[str]:
    """Fill `found` section by section; returns what failed. A section that would begin after the budget is skipped, which is no failure;
    one that begins late times its sides for less long, so that it ends soon after the budget."""
    began = time.perf_counter()
    failures: list[str] = []
    for name in names:
        start = time.perf_counter()
        if start - began > budget_seconds:
            found[name] = {"skipped": f"{budget_seconds:.0f} s were used up"}
            print(f"[{start - began:6.1f} s] {name}: skipped, {budget_seconds:.0f} s are used up", flush=True)
            continue
        print(f"[{start - began:6.1f} s] {name}", flush=True)
        torch.manual_seed(0)
        try:
            with cases.forced(plan.backend):
                left = (budget_seconds - (start - began)) / COMPARISONS
                found[name] = SECTIONS[name](replace(plan, limit_seconds=min(plan.limit_seconds, left)))
            failures += [f"{name}: {text}" for text in found[name].get("failed", [])]
        except (Exception, SystemExit) as error:  # a comparison ends its own benchmark with SystemExit
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            failures.append(f"{name}: {found[name]['error']}")
        found[name]["took_seconds"] = time.perf_counter() - start
        release()
    return failures


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, write the row; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins later than this")
    parser.add_argument("--no-save", action="store_true", help="write nothing under benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, nothing written; Triton if TRITON_INTERPRET=1 is set")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU found by torch.cuda; nothing was run (--smoke tries the control flow on the CPU)")
        return 2
    raise_allocator_thresholds()
    plan = full_plan()
    if options.smoke:
        plan = smoke_plan("triton" if os.environ.get("TRITON_INTERPRET") == "1" else "eager")
    found: dict[str, Any] = {}
    failures: list[str] = ["interrupted"]
    try:
        failures = run(plan, options.sections, 60 * options.minutes, found)
    finally:
        if not options.smoke and not options.no_save:
            row = {**environment("triton"), "backend": plan.backend, "sections": found, "failures": failures}
            print(f"row appended to {append_row('gpu', row)}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
