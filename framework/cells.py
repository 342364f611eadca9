"""Cells of the interchange matrix: which there are, which may be refused, and whether what became of one is right.

Options are found by listing the folders of conf/, so a new one joins by existing. What may be refused stands in `RULES` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from framework import overrides
from framework.overrides import group_options
from framework.procedure import Procedure
from framework.signatures import locate

Cell = dict[str, str]  # {group or key: value}, without those that have their default
CROSS = ("model", "adapter", "optimizer", "rope")  # groups whose options are all combined; those of the other groups come one at a time
APART = (
    "model/size",
    "model/overlay",
    "optimizer/overlay",
    "model/variant",
    "experiment",
    "local",
    "debug",
    "sweep",
    "eval",
    "decode/read",
    "decode/scorer",
    "decode/template",
    "task/prompts",
)  # no parts
RULES = Path(__file__).resolve().parent.parent / "tests" / "illegal_cells.yaml"
SEED, STEPS = 1, 2


@dataclass(frozen=True)
class Rule:
    """Cells that are refused on purpose. machine: the kind on which they are. instead: words that make the first option legal."""

    cell: dict[str, list[str]]
    reason: str
    message: str
    machine: str | None = None  # with cuda | without cuda; None: any
    instead: dict[str, str] = field(default_factory=dict)

    def covers(self, cell: Cell) -> bool:
        """Is this cell, defaults filled in, one of the rule's?"""
        if self.instead and self.instead.items() <= cell.items():
            return False
        whole = {**defaults("generate"), **defaults("train"), **cell}
        return all(str(whole.get(key)) in values for key, values in self.cell.items())

    def cells(self) -> list[Cell]:
        """Every combination that the rule names."""
        return [dict(zip(self.cell, values)) for values in itertools.product(*self.cell.values())]

    @property
    def holds_here(self) -> bool:
        """Is this machine of the rule's kind?"""
        return self.machine in (None, "with cuda" if torch.cuda.is_available() else "without cuda")


@dataclass(frozen=True)
class Still:
    """Trainable parameters, by a regex of their names, that may stand still in the cells of `rule`."""

    rule: Rule
    parameters: str


@dataclass
class Outcome:
    """What became of a cell. status: trained, refused (message says why) or failed (problems, and `error` where one was raised)."""

    cell: Cell
    status: str = "trained"
    message: str = ""
    problems: list[str] = field(default_factory=list)
    loss: float | None = None  # nats a token at the second step
    seconds: float | None = None  # of the second step
    memory_bytes: int | None = None  # weights, gradients, optimizer state, and what the backward keeps
    error: Exception | None = None


def read_rules(path: Path | None = None) -> tuple[list[Rule], list[Still], list[Rule]]:
    """The reviewed file: combinations refused on purpose, parameters that may stand still, and cells that may be twins."""
    stored = yaml.safe_load((path or RULES).read_text())

    def values(cell: dict[str, Any]) -> dict[str, list[str]]:
        return {key: [str(v) for v in (value if isinstance(value, list) else [value])] for key, value in cell.items()}

    rules = [Rule(**{**entry, "cell": values(entry["cell"])}) for entry in stored["illegal"]]
    still = [Still(Rule(values(entry["cell"]), entry["reason"], ""), entry["parameters"]) for entry in stored["still"]]
    return rules, still, [Rule(values(entry["cell"]), entry["reason"], "") for entry in stored["twins"]]


@cache
def _defaults(file: Path) -> dict[str, str]:
    entries = yaml.safe_load(file.read_text())["defaults"]
    pairs = {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
    return {key: value for key, value in pairs.items() if value is not None and " " not in key}


def defaults(config_name: str) -> dict[str, str]:
    """{group: default option} of train.yaml or generate.yaml."""
    return _defaults(overrides.CONF / f"{config_name}.yaml")


def cross_cells() -> list[Cell]:
    """Every combination of the options of `CROSS`."""
    return [dict(zip(CROSS, options)) for options in itertools.product(*(group_options(group) for group in CROSS))]


def covering_cells() -> list[Cell]:
    """A few of `cross_cells` in which every option occurs."""
    options = {group: group_options(group) for group in CROSS}
    return [{group: names[i % len(names)] for group, names in options.items()} for i in range(max(map(len, options.values())))]


def pair_cells() -> list[Cell]:
    """Some of `cross_cells` in which every two options of different groups meet: each next one is the first that brings most new pairs."""
    cells = cross_cells()
    pairs = [set(itertools.combinations(sorted(cell.items()), 2)) for cell in cells]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cells)), key=lambda i: len(pairs[i] & missing))
        chosen.append(cells[best])
        missing -= pairs[best]
    return chosen


def single_cells(config_name: str) -> list[Cell]:
    """Every option of the other groups of a command, alone against the defaults."""
    cells = []
    for group in defaults(config_name):
        if group in CROSS or group in APART or group.startswith(("override", "hydra")):
            continue
        cells += [{group: option} for option in group_options(group) if fits(config_name, group, option)]
    return cells


def fits(config_name: str, group: str, option: str) -> bool:
    """Does an option of a group that both commands have belong to this one? What train.py trains is a LightningModule.

    A task that ends by an interrupt alone (`endless`) is no cell: it is tried as a process of its own.
    """
    if group != "task":
        return True
    node = yaml.safe_load((overrides.CONF / group / f"{option}.yaml").read_text())
    target = locate(node.get(group, node)["_target_"])  # an option may also set keys beside its group's
    assert isinstance(target, type)
    if getattr(target, "endless", False):
        return False
    return not issubclass(target, Procedure) and issubclass(target, pl.LightningModule) == (config_name == "train")


def legal_cells(rules: list[Rule]) -> list[Cell]:
    """For each rule of this machine that says what makes its option legal: that."""
    found = [(rule, *next(iter(rule.cell.items()))) for rule in rules if rule.instead and rule.holds_here]
    return [{key: values[0], **rule.instead} for rule, key, values in found]


def verdict(outcome: Outcome, rules: list[Rule]) -> str | None:
    """What is wrong with an outcome given the rules; None when it is as it should be."""
    covering = [rule for rule in rules if rule.holds_here and rule.covers(outcome.cell)]
    name = label(outcome.cell)
    if outcome.status == "failed":
        return f"{name}: {'; '.join(outcome.problems)}"
    if outcome.status == "refused" and not covering:
        return f"{name}: refused ({outcome.message}), but {RULES.name} does not list it; make it work, or list it with its reason"
    if outcome.status == "refused" and not any(rule.message in outcome.message for rule in covering):
        return f"{name}: refused with {outcome.message!r}; {RULES.name} promises {covering[0].message!r}"
    if outcome.status == "trained" and covering:
        return f"{name}: works, but {RULES.name} lists it as illegal; take it out"
    return None


def label(cell: Cell) -> str:
    """A cell as words of a command line."""
    return " ".join(f"{key}={value}" for key, value in cell.items())


def mark_twins(outcomes: list[Outcome], expected: Sequence[Rule] = ()) -> None:
    """Make failures of trained cells whose losses are equal to the last bit: an option that makes no difference is not in use.

    expected: cells of one such rule may be equal.
    """
    first: dict[float, Cell] = {}
    for outcome in outcomes:
        if outcome.status == "trained" and outcome.loss is not None:
            other = first.setdefault(outcome.loss, outcome.cell)
            alike = any(rule.covers(other) and rule.covers(outcome.cell) for rule in expected)
            if other is not outcome.cell and not alike:
                outcome.status = "failed"
                outcome.problems.append(f"the loss is exactly that of {label(other)}; an option has no effect")
