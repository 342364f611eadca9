"""`python train.py preflight=true ...`: all that can be known about a run before it, and all that is wrong with it at once."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import nn

from components.adapters.base import parameter_roles
from components.contracts import UserError
from framework import build, runtime, sweep
from framework.estimate import Estimate, Rehearsal, occurrences, rehearse, without_interruptions
from framework.inherit import take_model
from framework.overrides import group_names, group_options
from framework.parts import Parts, build_parts
from framework.runs import with_inherited
from framework.validate import RULES, problems

PARTS = ("data", "model", "adapter", "optimizer", "schedule", "task", "trainer", "logger")
GIB = 2**30


@dataclass(frozen=True)
class Preflight:
    """What the pre-flight found out."""

    parts: list[tuple[str, str, str]]  # group, option, target
    parameters: dict[tuple[str, str], tuple[int, int]]  # {(owner, role): (all, trainable)}; owner: model or adapter
    flops_per_token: float  # of a training step
    tokens: int  # of the whole run, all processes
    processes: int
    rehearsal: Rehearsal
    cost: Estimate  # of the whole run


def preflight(config: DictConfig, run_dir: Path, choices: dict[str, str] | None = None) -> Preflight:
    """Check a run without starting it; print its parts, parameters and cost. The folder that was made for the run is removed.

    Args:
        config: composed, not yet checked.
        run_dir: where the run would write; nothing is left there.
        choices: {group: option}; None: those of the Hydra application that runs.

    Raises:
        ConfigErrors: with every problem found: types, unknown keys, illegal pairs, and what each part refuses when it is built.
        UserError: asked for a resumed run or a sweep.
    """
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    if sweep.in_sweep():
        raise UserError("preflight: true is of one run, and every job of a sweep is checked before it starts; drop it, or -m")
    if config.resume:
        raise UserError(
            f"preflight: true goes with a new run, not with resume={config.resume!r}, which was checked when it began; drop one"
        )
    if config.ckpt:
        take_model(config, words)
    try:
        return inspect(config, choices if choices is not None else typed_choices(config))
    finally:
        remove(run_dir)


def inspect(config: DictConfig, choices: dict[str, str]) -> Preflight:
    """The checks and figures of `preflight`."""
    console = Console(width=160)
    parts = resolved_parts(config, choices)
    console.print(table(("part", "option", "what is built"), parts))
    console.print()
    built = build_all(config)
    parameters = parameters_by_owner(built.model)
    console.print(parameter_table(parameters))
    console.print()
    tokens = int(config.trainer.max_steps) * config.trainer.accumulate_grad_batches * built.data.batch_size * built.data.seq_len
    flops = 3.0 * built.model.forward_flops(built.data.seq_len)
    rehearsal, processes, device = rehearse_alone(config, built)
    found = Preflight(parts, parameters, flops, tokens * processes, processes, rehearsal, rehearsal.whole_run(config))
    for line in lines_of(found, config, built, device):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return found


def rehearse_alone(config: DictConfig, parts: Parts) -> tuple[Rehearsal, int, torch.device]:
    """Rehearse the run in this process; also how many processes the run will have, and the device of this one."""
    from framework.train import NOISE, Session

    for name in NOISE:
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = without_interruptions(config)
    quiet.model.vocab_size = parts.model.vocab_size
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        session = Session(quiet, Path(folder), parts)
        processes = session.trainer.world_size
        if processes > 1:  # each has its own rows, so that one alone does the work of a step
            OmegaConf.update(quiet, "trainer", {"devices": 1, "num_nodes": 1, "strategy": "auto"}, force_add=True)
            session = Session(quiet, Path(folder), parts)
        return rehearse(session), processes, session.trainer.strategy.root_device


def typed_choices(config: DictConfig) -> dict[str, str]:
    """The running application's choices; with `ckpt=`, model and RoPE rule of the run it names."""
    if not HydraConfig.initialized():
        return {}
    chosen = {group: str(option) for group, option in HydraConfig.get().runtime.choices.items() if option not in (None, "null")}
    if config.ckpt:  # those of the default model, which is not built
        chosen = {group: option for group, option in chosen.items() if not group.startswith("model/overlay")}
    return with_inherited(chosen, config.ckpt, Path(config.paths.root))


def resolved_parts(config: DictConfig, choices: dict[str, str]) -> list[tuple[str, str, str]]:
    """(group, option, target) of every part, in the order of the configuration."""
    groups = [group for group in choices if not group.startswith("hydra/")] or [str(k) for k in config if is_part(config[k])]
    groups = [
        group for group in groups if group not in group_names() or choices[group] in group_options(group)
    ]  # optional ones may be absent
    order = [str(key) for key in config]
    groups.sort(key=lambda group: order.index(group.split("/")[0]) if group.split("/")[0] in order else -1)
    return [(group, choices.get(group, "-"), str(OmegaConf.select(config, f"{group}._target_") or "")) for group in groups]


def is_part(node: Any) -> bool:
    """Is the node built into an object?"""
    return isinstance(node, DictConfig) and "_target_" in node


def build_all(config: DictConfig) -> Parts:
    """Build every part.

    Raises:
        ConfigErrors: with every problem of every part.
    """
    lines = config_errors(config)
    if not lines:
        runtime.prepare_process(config.seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                parts = build_parts(config, Path(folder), resuming=False)
                lines = [line for group in ("optimizer", "schedule") for line in attempt(lambda g=group: finish(config, g, parts.model))]  # type: ignore[misc]
                if not lines:
                    return parts
            except UserError as error:
                lines = str(error).splitlines()
    lines += [line for line in part_errors(config, lines) if line not in lines]
    raise build.ConfigErrors(lines)


def config_errors(config: DictConfig) -> list[str]:
    """Problems of the configuration alone. Rules between keys are tried even where a type is wrong: most do not touch that key."""
    lines = attempt(lambda: build.check(config))
    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        return lines
    if lines and problems(resolved):
        for rule in RULES:
            try:
                lines += [line for line in rule(resolved) if line.split(":")[0] not in {known.split(":")[0] for known in lines}]
            except (TypeError, KeyError, AttributeError):  # it met the wrong type, which is reported
                continue
    return lines


def part_errors(config: DictConfig, known: Iterable[str]) -> list[str]:
    """What each part refuses when it is built by itself; parts with a known problem, and what needs them, are left out."""
    wrong = {line.split(":")[0].split(".")[0] for line in known}
    lines: list[str] = []
    kept: dict[str, Any] = {}

    def part(name: str, needs: tuple[str, ...], make: Callable[[], Any]) -> None:
        if name in wrong or any(need not in kept for need in needs):
            return

        def keep() -> None:
            kept[name] = make()

        lines.extend(attempt(keep))

    def data() -> Any:
        made: Any = build.build_data(config)
        made.prepare(Path(config.paths.cache_dir))
        made.train_stream(seed=0)  # as many tokens as fill a batch?
        return made

    part("data", (), data)
    known_size = kept["data"].tokenizer.vocab_size if "data" in kept else config.model.get("vocab_size") or 256
    part("model", (), lambda: build.build_model(config, known_size))
    part("adapter", ("model",), lambda: build.build(config.adapter).apply(kept["model"]))
    part("optimizer", ("model",), lambda: build.build_optimizer(config, kept["model"]))
    if "adapter" not in kept:  # a pattern may be meant for what the adapter would have added
        lines = [line for line in lines if not line.startswith("optimizer.overrides")]
    part("schedule", (), lambda: finish(config, "schedule", nn.Linear(1, 1)))
    part("logger", (), lambda: build.build(config.logger))
    return lines


def finish(config: DictConfig, group: str, model: nn.Module) -> Any:
    """Build the optimizer of a model, or the schedule over one."""
    if group == "optimizer":
        return build.build_optimizer(config, model)
    return build.build(config.schedule)(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=config.trainer.max_steps)


def attempt(action: Callable[[], Any]) -> list[str]:
    """Lines of the user's mistakes that an action meets."""
    try:
        action()
    except UserError as error:
        return str(error).splitlines()
    return []


def parameters_by_owner(model: nn.Module) -> dict[tuple[str, str], tuple[int, int]]:
    """{(owner, role): (all, trainable)} of every parameter, shared ones once; what an adapter added is its own."""
    roles = parameter_roles(model)
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        role = str(roles.get(name, "?"))
        key = ("adapter" if role == "adapter" else "model", role)
        total, trainable = counts.get(key, (0, 0))
        counts[key] = (total + parameter.numel(), trainable + parameter.numel() * parameter.requires_grad)
    return dict(sorted(counts.items(), key=lambda item: (item[0][0] == "adapter", -item[1][0])))


def table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]], right: int = 99) -> Table:
    """Rows without lines; columns from number `right` on are figures."""
    made = Table(box=None, pad_edge=False)
    for index, title in enumerate(titles):
        made.add_column(title, justify="right" if index >= right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def parameter_table(parameters: dict[tuple[str, str], tuple[int, int]]) -> Table:
    """Parameters by owner and role, and their sum."""
    rows = [(owner, role, f"{total:,}", f"{trainable:,}") for (owner, role), (total, trainable) in parameters.items()]
    sums = [f"{sum(count[i] for count in parameters.values()):,}" for i in (0, 1)]
    return table(("owner", "role", "parameters", "trainable"), [*rows, ("all", "", *sums)], right=2)


def lines_of(found: Preflight, config: DictConfig, parts: Parts, device: torch.device) -> list[str]:
    """The figures in words."""
    facts, cost, timed, often = parts.data.summary(), found.cost, found.rehearsal, occurrences(config)
    names = {"validation": "validations", "checkpoint": "checkpoints", "sample": "samples"}
    others = ", ".join(f"{often[what]} {name} of {getattr(timed, what):.3g} s" for what, name in names.items() if often[what])
    where = "allocated on the device" if device.type == "cuda" else "of this process"
    training = int(facts.get("train_tokens", 0))
    epochs = f" ({found.tokens / training:.2f} epochs)" if training else ""
    alone = f"        of each of {found.processes} processes, measured alone: waiting for one another is not counted"
    return [
        f"data    {training:,} training tokens, {facts.get('val_tokens', 0):,} held out; this run takes {found.tokens:,}{epochs}",
        f"compute {found.flops_per_token / 1e6:,.1f} MFLOP a token (three forwards), "
        f"{found.flops_per_token * found.tokens / 1e12:,.3g} TFLOP in all; {config.trainer.precision} on {device.type}",
        f"memory  {cost.memory_bytes / GIB:.2f} GiB {where}, measured at its peak over everything below",
        f"time    {cost.seconds:,.0f} s: {often['step']} steps of {timed.step:.3g} s ({timed.steps} timed, middle half within "
        f"{timed.spread:.0%}), {others or 'nothing else'}; start-up not counted",
        *([alone] if found.processes > 1 else []),
        "nothing was trained; drop preflight=true to start",
    ]


def remove(run_dir: Path) -> None:
    """Delete the folder that Hydra made for the run, unless a run is in it."""
    from framework.entry import remove_empty_run

    if HydraConfig.initialized() and run_dir == Path(HydraConfig.get().runtime.output_dir):
        remove_empty_run()
        with contextlib.suppress(OSError):
            run_dir.parent.rmdir()  # that of the name, where there is no other run of it
