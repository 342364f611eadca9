"""What an adapter costs: a training step of phi4mini with adapters on all projections, and the grouped product for many adapters.

`python -m benchmarks.adapters` (seven minutes on one idle core at size small; `--length 128` takes a quarter of that). One batch of 8 rows;
every side steps its own copy of the same model, forward, backward and AdamW, and takes its turn in every round. Sides: the frozen base,
whose backward goes through all layers and trains nothing; PEFT's LoRA, and ours, compared with the same A and B in loss and gradients
before anything is timed; MTL-LoRA with one task, and with eight tasks in one batch, mixed by row
and by token; MoE-LoRA by task and by token. Bytes of adapter,
gradients and optimizer state must be those of the closed formula. The grouped product runs against a loop over 64 adapters, forward and
backward, compared first too. On a GPU (`--device cuda`) it has not been run yet.

Numbers to meet: MTL-LoRA of eight tasks in at most 1.05 of one task's time, and in at most 1.15 of PEFT's LoRA.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    Clock,
    append_row,
    clock_of,
    environment,
    interleaved,
    model_shape,
    raise_allocator_thresholds,
    relative_rms,
    spread,
    table,
    verdict,
)
from benchmarks.decode import CLOCKS
from components.adapters.base import adapter_state
from components.adapters.lora import LoRA
from components.adapters.moe_lora import MoELoRA
from components.adapters.mtl_lora import MTLLoRA
from components.contracts import Batch
from components.losses.lm import next_token_loss
from components.models.phi4mini import Phi4Mini
from components.rope.rules import NoRescaling
from kernels.lora_grouped import lora_grouped, segments

VOCABULARY, TASKS, N_UP, EXPERTS, EMBEDDING = 2048, 8, 3, 4, 64
BASE, PEFT, OURS, MTL_1, MTL_8, MTL_TOKENS, MOE_TASK, MOE_TOKEN = (
    "frozen base", "PEFT LoRA", "lora", "mtl_lora, 1 task", "mtl_lora, 8 tasks", "mtl_lora, 8 tasks by token", "moe_lora, task",
    "moe_lora, token",
)  # fmt: skip
BOUNDS = {(side, other): bound for side in (MTL_8, MTL_TOKENS) for other, bound in ((MTL_1, 1.05), (PEFT, 1.15))}
ROLES = ("qkv", "o", "gate_up", "down")
TOLERANCE = 1e-5  # relative RMS of fp32 losses and gradients of two orders of summation
_ADAPTERS, _RANK = 64, 16  # of the grouped product


def model_of(size: str) -> Phi4Mini:
    """The model of conf/model/phi4mini.yaml; the same weights every time."""
    keys = [key for key in inspect.signature(Phi4Mini).parameters if key not in ("max_length", "rope")]
    shape = model_shape("phi4mini", size, *keys)
    torch.manual_seed(0)
    return Phi4Mini(**{**shape, "vocab_size": shape["vocab_size"] or VOCABULARY}, max_length=512, rope=NoRescaling()).train()


def options_of(r: int, dropout: float) -> dict[str, Any]:
    """What lora and mtl_lora share, as conf/adapter has it."""
    return {
        "r": r, "alpha": 2 * r, "dropout": dropout, "targets": "role:qkv,o,gate_up,down", "exclude": None, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "train_bias": "none",
    }  # fmt: skip


def adapters(r: int, dropout: float) -> dict[str, Any]:
    """Our options by name of side."""
    shared = options_of(r, dropout)
    mtl: dict[str, Any] = {"n_up": N_UP, "tau": 0.5, "lambda_type": "full", "w_init": "uniform", "split_fused": True}
    moe: dict[str, Any] = {key: shared[key] for key in ("r", "alpha", "dropout", "targets", "exclude")}
    moe |= {"num_experts": EXPERTS, "embedding_dim": EMBEDDING, "top_k": None, "aux": {}, "experts": {}, "rules": {}, "train": None}
    tasks = [f"task{i}" for i in range(TASKS)]
    return {
        OURS: LoRA(**shared, match_parameters=None),
        MTL_1: MTLLoRA(**shared, **mtl, tasks=tasks[:1]),
        MTL_8: MTLLoRA(**shared, **mtl, tasks=tasks),
        MTL_TOKENS: MTLLoRA(**shared, **mtl, tasks=tasks),
        MOE_TASK: MoELoRA(router="task", **moe, tasks=tasks),
        MOE_TOKEN: MoELoRA(router="token", **moe, tasks=None),
    }


def parameters_by_formula(model: Phi4Mini, r: int) -> dict[str, int]:
    """Adapter parameters of every side, from the shapes of the projections."""
    roles, splits = model.roles(), model.fused_splits()
    found = dict.fromkeys((BASE, PEFT, OURS, MTL_1, MTL_8, MTL_TOKENS, MOE_TASK, MOE_TOKEN), 0)
    for name, weight in model.named_parameters():
        if roles[name] not in ROLES:
            continue
        out, inside = weight.shape
        blocks = len(splits.get(name, [out]))
        found[PEFT] += r * (inside + out)
        found[OURS] += r * (inside + out)
        for side, tasks in ((MTL_1, 1), (MTL_8, TASKS), (MTL_TOKENS, TASKS)):
            found[side] += r * inside + N_UP * out * r + tasks * (blocks * r * r + N_UP)
        found[MOE_TASK] += r * (inside + out) + TASKS * EMBEDDING + EXPERTS * EMBEDDING
        found[MOE_TOKEN] += r * inside + EXPERTS * out * r + EXPERTS * inside
    return found


def frozen(model: Phi4Mini) -> Phi4Mini:
    """Nothing is trained, and the backward goes through every layer all the same, as it does for an adapter on the first."""
    model.requires_grad_(False)
    model.get_submodule("embed_tokens").register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def with_peft(model: Phi4Mini, r: int, dropout: float) -> Phi4Mini:
    """The model with PEFT's LoRA inside. Raises ImportError without PEFT."""
    peft = import_module("peft")
    names = sorted({name.split(".")[-2] for name, role in model.roles().items() if role in ROLES})
    peft.inject_adapter_in_model(peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=names), model)
    return model


def sides_of(size: str, r: int, dropout: float, device: torch.device) -> tuple[dict[str, Phi4Mini], dict[str, str]]:
    """The models, and why a side is absent."""
    models = {BASE: frozen(model_of(size))}
    absent: dict[str, str] = {}
    try:
        models[PEFT] = with_peft(model_of(size), r, dropout)
    except ImportError as error:
        absent[PEFT] = f"not measured: not installed ({error})"
    for name, adapter in adapters(r, dropout).items():
        models[name] = model_of(size)
        adapter.apply(models[name])
    return {name: model.to(device) for name, model in models.items()}, absent


def noise_batch(rows: int, length: int, device: torch.device) -> Batch:
    """Tokens are noise, since cost does not depend on them; every row has another task, as far as there are tasks."""
    ids = torch.randint(VOCABULARY, (rows, length + 1), device=device)
    tasks = torch.arange(rows, device=device) % TASKS
    return Batch(ids[:, :-1], labels=ids[:, 1:], task_ids=tasks, loss_tokens=rows * length)


def loss_of(model: Phi4Mini, batch: Batch) -> Tensor:
    assert batch.labels is not None and batch.loss_tokens is not None
    output = model(batch)
    loss = next_token_loss(output.hidden, model.head_weight, batch.labels, batch.loss_tokens)
    return torch.stack([loss, *output.aux_losses.values()]).sum()


def difference_from_peft(size: str, r: int) -> float:
    """Greatest relative RMS between losses and gradients of PEFT's LoRA and ours with the same A and B. Raises ImportError without PEFT."""
    ours, theirs = model_of(size), with_peft(model_of(size), r, 0.0)
    adapters(r, 0.0)[OURS].apply(ours)
    state = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, p in adapter_state(ours).items():
            state[name].copy_(p.normal_(std=0.02))
    batch = noise_batch(2, 24, torch.device("cpu"))
    losses = [loss_of(model, batch) for model in (ours, theirs)]
    names, leaves = zip(*((name, p) for name, p in ours.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(losses[0], leaves), torch.autograd.grad(losses[1], [state[name] for name in names])
    return max(relative_rms(a.detach(), b.detach()) for a, b in zip([losses[0], *grads[0]], [losses[1], *grads[1]]))


def training_step(model: Phi4Mini, batch: Batch) -> tuple[Callable[[], Tensor], torch.optim.Optimizer | None]:
    """A call that makes one step of AdamW on the batch and returns the loss before it, and the optimizer (None: nothing to train)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # lr 0 keeps the model from learning the one batch by heart, and costs the same.
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True) if trained else None

    def step() -> Tensor:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    return step, optimizer


def bytes_of(model: Phi4Mini, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Bytes of what an adapter adds after a step: its parameters, their gradients, the optimizer's state but its counters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    entries = optimizer.state.values() if optimizer is not None else ()
    state = [value for entry in entries for value in entry.values() if isinstance(value, Tensor) and value.dim()]
    return {"adapter": size(trained), "gradient": size(p.grad for p in trained if p.grad is not None), "state": size(state)}


def steps(options: argparse.Namespace, device: torch.device, clock: Clock) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Seconds of a step, and bytes against the formula, of every side."""
    models, absent = sides_of(options.size, options.rank, options.dropout, device)
    batch = noise_batch(options.batch, options.length, device)
    ids: dict[str, Tensor | None] = {MTL_1: None, MTL_TOKENS: torch.randint(TASKS, batch.input_ids.shape, device=device)}
    formula = parameters_by_formula(model_of(options.size), options.rank)
    runs: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        run, optimizer = training_step(model, replace(batch, task_ids=ids.get(name, batch.task_ids)))
        run()  # optimizer state; the unmeasured round
        counted = bytes_of(model, optimizer)
        expected = {"adapter": 4 * formula[name], "gradient": 4 * formula[name], "state": 8 * formula[name]}
        found[name] = {"bytes": counted, "formula": expected}
        if counted != expected:
            raise SystemExit(f"{name}: {counted} bytes, by the formula {expected}: nothing was timed")
        runs[name] = run
    seconds = interleaved(runs, dict.fromkeys(runs, options.rounds), warmup=0, clock=clock, limit_seconds=options.limit)
    for name, values in seconds.items():
        found[name]["seconds"] = spread(values)
    return found, absent


def loop(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], ids: Tensor) -> Tensor:
    """What `lora_grouped` does, adapter by adapter."""
    out = y.clone()
    for g in range(len(a)):
        places = (ids == g).nonzero()[:, 0]
        if len(places):
            out[places] = out[places] + scales[g] * (x[places] @ a[g].T) @ b[g].T
    return out


def grouped(tokens: int, size: str, rounds: int, by_row: bool, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Forward and backward for 64 adapters: the grouped product, sorting included, and the loop. by_row: runs of 64 tokens share one."""
    inside = model_shape("phi4mini", size, "hidden_size")["hidden_size"]
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=device).requires_grad_()  # noqa: E731
    y, x, dy = draw(tokens, inside), draw(tokens, inside), torch.randn(tokens, inside, device=device)
    a, b = ([draw(*shape) for _ in range(_ADAPTERS)] for shape in ((_RANK, inside), (inside, _RANK)))
    scales = [2.0] * _ADAPTERS
    ids = torch.randperm(tokens, device=device) % _ADAPTERS
    if by_row:
        ids = (torch.randperm(-(-tokens // 64), device=device) % _ADAPTERS).repeat_interleave(64)[:tokens]
    leaves = [y, x, *a, *b]
    calls: Mapping[str, Callable[[], Tensor]] = {
        "grouped": lambda: lora_grouped(y, x, a, b, scales, segments(ids, _ADAPTERS)),
        "loop": lambda: loop(y, x, a, b, scales, ids),
    }
    results = {name: (call(), torch.autograd.grad(call(), leaves, dy, allow_unused=True)) for name, call in calls.items()}
    pairs = [(results["grouped"][0], results["loop"][0]), *zip(results["grouped"][1], results["loop"][1])]
    worst = max(relative_rms(ours.detach(), theirs.detach()) for ours, theirs in pairs if theirs is not None)
    if worst > TOLERANCE:
        raise SystemExit(f"grouped product and loop differ by {worst:.1e} (relative RMS), allowed is {TOLERANCE:.0e}: nothing was timed")
    runs = {name: (lambda call=call: torch.autograd.grad(call(), leaves, dy, allow_unused=True)) for name, call in calls.items()}
    seconds = {name: spread(values) for name, values in interleaved(runs, dict.fromkeys(runs, rounds), clock=clock).items()}
    return {"seconds": seconds, "ratio": seconds["grouped"]["median"] / seconds["loop"]["median"], "difference": worst}


def print_steps(found: dict[str, dict[str, Any]], absent: dict[str, str], options: argparse.Namespace) -> dict[str, float]:
    """Print the table and the ratios; return these."""
    base = found[BASE]["seconds"]["median"]
    lines = []
    for name, r in found.items():
        s, size = r["seconds"], r["bytes"]
        times = [f"{s['median'] * 1e3:.1f}", f"{s['min'] * 1e3:.1f} - {s['max'] * 1e3:.1f}", str(s["runs"]), f"{s['median'] / base:.3f}"]
        lines.append([name, *times, *(f"{size[key] / 2**20:.3f}" for key in ("adapter", "gradient", "state"))])
    print(
        f"phi4mini {options.size}, {options.batch} rows of {options.length} tokens, r = {options.rank}, dropout {options.dropout}, fp32, "
        f"{torch.get_num_threads()} threads; a step is forward, backward and AdamW"
    )
    print(table(["side", "median ms", "range ms", "runs", "of the base", "adapter MiB", "gradient MiB", "state MiB"], lines))
    for name, why in absent.items():
        print(f"{name}: {why}")
    ratios = {}
    for (side, other), bound in BOUNDS.items():
        if other in found:
            ratios[f"{side} / {other}"] = ratio = found[side]["seconds"]["median"] / found[other]["seconds"]["median"]
            print(f"{side} / {other}: {ratio:.3f}; {verdict(ratio, bound, at_least=False)}")
    return ratios


def step_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options of a benchmark of adapted layers, at the shapes of phi4mini."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="an option of model/size")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, on a machine that others use too")
    parser.add_argument("--no-save", action="store_true", help="write nothing under benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="size test, short rows, nothing written: does it run?")
    return parser


def prepared(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[argparse.Namespace, torch.device, Clock]:
    """The options, with the process set up as they say; the device and its clock."""
    options = parser.parse_args(arguments)
    if options.smoke:
        options.size, options.batch, options.length, options.rounds, options.no_save = "test", 8, 16, 2, True
    raise_allocator_thresholds()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    return options, device, clock_of(device) if device.type == "cuda" else CLOCKS[options.clock]


def main(arguments: list[str] | None = None) -> None:
    """Compare, measure, print tables and ratios, write the row."""
    parser = step_parser(__doc__, rounds=7)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no further round of steps begins")
    options, device, clock = prepared(parser, arguments)
    try:
        worst: float | None = difference_from_peft(options.size, options.rank)
    except ImportError:
        worst = None
    if worst is not None and worst > TOLERANCE:
        raise SystemExit(f"PEFT's LoRA and ours differ by {worst:.1e} (relative RMS), allowed is {TOLERANCE:.0e}: nothing was timed")
    found, absent = steps(options, device, clock)
    ratios = print_steps(found, absent, options)
    if worst is not None:
        print(f"losses and gradients of PEFT's LoRA and ours differ by {worst:.1e} (relative RMS)")
    many = {}
    for kind in ("row", "token"):
        tokens = options.batch * options.length
        many[kind] = r = grouped(tokens, options.size, max(3, options.rounds), kind == "row", device, clock)
        times = ", ".join(f"{name} {s['median'] * 1e3:.1f} ms" for name, s in r["seconds"].items())
        print(f"{_ADAPTERS} adapters by {kind}, {tokens} tokens: {times}; grouped / loop {r['ratio']:.3f}")
    if not options.no_save:
        row = {**vars(options), **environment("peft"), "dtype": "float32", "difference": worst, "sides": found, "ratios": ratios}
        print(f"row appended to {append_row('adapters', {**row, 'absent': absent, 'grouped': many})}")


if __name__ == "__main__":
    main()
