"""What optimizer state costs: per parameter as an optimizer has it, and per rule by formula, before anything is allocated.

Step counters (4 bytes a tensor) are in what an optimizer reports of itself, and not in the formulas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from components.contracts import NamedParameter, UserError
from components.optim.cosmos import rank_of

GIB, MIB = 2**30, 2**20
ELEMENT_BYTES = 4  # state is float32 under every parameter but float64 ones
RANK, MAX_PRECOND_DIM = 64, 10000  # of rules that have them, where nothing else is said
GALORE_SHARE = 0.25  # GaLore's rank, of a matrix's shorter side: its paper's at most model sizes
RULES = {
    "adamw": "two moments of every element",
    "muon": "one moment",
    "cosmos": "one moment, and a subspace of the n side: m n + m r + n r + r r",
    "soap": "two moments, and two squares for each side: 2 m n + 2 (m m + n n)",
    "soap_input": "two moments, and two squares for the n side: 2 m n + 2 n n",
    "galore": "a projection of the shorter side s to s / 4, two moments of what is projected (approximate)",
    "adam_mini": "one moment, and one number a row; of every parameter (approximate)",
}
APPROXIMATE = ("galore", "adam_mini")  # after their papers; nothing here runs them
# Roles whose matrices take the rule, as the options of the group `optimizer` have them.
MATRIX_ROLES = ("qkv", "o", "gate_up", "down", "in_proj", "out_proj", "x_proj")


class RuleRow(NamedTuple):
    """State of a whole model under one rule: numbers in it, bytes in float32, and how many more than under AdamW."""

    rule: str
    elements: int
    bytes: int
    over_adamw: int  # bytes, negative where it is less
    approximate: bool


class ParameterRow(NamedTuple):
    """Parameters alike in all but their place in a repeated layer. name: with `*` for what differs; state_bytes: of one of them."""

    name: str
    shape: tuple[int, ...]
    kind: str
    state_bytes: int
    tensors: int


def state_elements(rule: str, m: int, n: int, rank: float = RANK, max_precond_dim: int = MAX_PRECOND_DIM) -> int:
    """Numbers in the state of one matrix (m, n), without step counters.

    rule: one of `RULES`. rank: of COSMOS, a whole number or a share of n, n at most. max_precond_dim: SOAP leaves longer sides alone.
    Raises UserError for an unknown rule.

    >>> state_elements("cosmos", 768, 768, rank=64) - state_elements("muon", 768, 768)
    102400
    """
    if rule not in RULES:
        raise UserError(f"rule: {rule!r}; allowed: {', '.join(RULES)}")
    r, short, long = rank_of(rank, n), min(m, n), max(m, n)
    projected = max(1, int(GALORE_SHARE * short))
    left, right = (2 * k * k if k <= max_precond_dim else 0 for k in (m, n))
    return {
        "adamw": 2 * m * n,
        "muon": m * n,
        "cosmos": m * n + m * r + n * r + r * r,
        "soap": 2 * m * n + left + right,
        "soap_input": 2 * m * n + right,
        "galore": short * projected + 2 * long * projected,
        "adam_mini": m * n + m,
    }[rule]


def total_elements(
    rule: str, parameters: Iterable[NamedParameter], rank: float = RANK, max_precond_dim: int = MAX_PRECOND_DIM,
    matrix_roles: Sequence[str] = MATRIX_ROLES,
) -> int:  # fmt: skip
    """Numbers in the state of all parameters: matrices by the rule, fused blocks and stacks one by one, everything else by AdamW."""
    total = 0
    for item in parameters:
        shape = tuple(item.parameter.shape)
        if rule == "adam_mini":  # it takes all: a number a row of embeddings and head, one a vector
            total += state_elements(rule, prod(shape[:-1]) if len(shape) > 1 else 1, shape[-1] if shape else 1)
        elif item.role in matrix_roles and len(shape) >= 2:
            heights = item.splits or (shape[-2],) * prod(shape[:-2])
            total += sum(state_elements(rule, m, shape[-1], rank, max_precond_dim) for m in heights)
        else:
            total += 2 * prod(shape)
    return total


def compare_rules(
    parameters: Sequence[NamedParameter], rank: float = RANK, max_precond_dim: int = MAX_PRECOND_DIM,
    matrix_roles: Sequence[str] = MATRIX_ROLES,
) -> list[RuleRow]:  # fmt: skip
    """A row for every rule of `RULES`. See `total_elements`; bytes are of float32 state, whatever the parameters are."""
    totals = {rule: total_elements(rule, parameters, rank, max_precond_dim, matrix_roles) for rule in RULES}
    return [
        RuleRow(rule, count, ELEMENT_BYTES * count, ELEMENT_BYTES * (count - totals["adamw"]), rule in APPROXIMATE)
        for rule, count in totals.items()
    ]


def rules_table(rows: Sequence[RuleRow]) -> str:
    """The rows of `compare_rules` as text, in GiB (MiB where none has a tenth of one)."""
    unit, size = ("GiB", GIB) if max(row.bytes for row in rows) >= GIB / 10 else ("MiB", MIB)
    lines = [
        (f"{'~' if row.approximate else ''}{row.rule}", f"{row.bytes / size:.3f}", f"{row.over_adamw / size:+.3f}", RULES[row.rule])
        for row in rows
    ]
    return _table(("rule", f"state {unit}", "over adamw", "matrices hold"), lines, right=(1, 2))


def parameter_rows(optimizer: torch.optim.Optimizer) -> list[ParameterRow]:
    """A row for all parameters of a group that differ in the number of their layer only. The optimizer needs no gradients, nor memory:
    parameters may be on the meta device.

    Raises ValueError when the optimizer's groups do not say what they hold, as those of the options of this project do.
    """
    found: dict[ParameterRow, int] = {}
    for group in optimizer.param_groups:
        if "parameter_names" not in group or not ("bytes_per_element" in group or hasattr(optimizer, "state_bytes")):
            raise ValueError(f"{type(optimizer).__name__}: a param group that does not say what it holds; build it with an option of ours")
        for i, (name, p) in enumerate(zip(group["parameter_names"], group["params"], strict=True)):
            alone = {key: [value[i]] if key in ("params", "splits", "parameter_names") else value for key, value in group.items()}
            row = ParameterRow(_layerless(name), tuple(p.shape), group["kind"], _state_bytes(optimizer, alone), 1)
            found[row] = found.get(row, 0) + 1
    return [row._replace(tensors=count) for row, count in found.items()]


def report(optimizer: torch.optim.Optimizer) -> str:
    """The table of `parameter_rows`, with a sum: name, shape, kind and bytes of state of every trainable parameter."""
    rows = parameter_rows(optimizer)
    lines = [
        (
            f"{row.name} (x{row.tensors})" if row.tensors > 1 else row.name,
            " x ".join(map(str, row.shape)) or "scalar",
            row.kind,
            f"{row.state_bytes:,}",
            f"{row.tensors * row.state_bytes:,}",
        )
        for row in rows
    ]
    total = sum(row.tensors * row.state_bytes for row in rows)
    parameters = sum(row.tensors for row in rows)
    lines.append((f"all {parameters:,}", f"{sum(row.tensors * prod(row.shape) for row in rows):,} elements", "", "", f"{total:,}"))
    return _table(("parameter", "shape", "kind", "state bytes", "of all"), lines, right=(3, 4))


def _state_bytes(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> int:
    """Bytes of a group, as `components.optim.groups.describe` has them."""
    if hasattr(optimizer, "state_bytes"):
        return int(optimizer.state_bytes(group))
    return sum(group["bytes_per_element"] * p.numel() + 4 for p in group["params"])


def _layerless(name: str) -> str:
    """A parameter's name without the number of its layer: the first number in it."""
    return re.sub(r"(^|\.)\d+(\.|$)", r"\1*\2", name, count=1)


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """Columns of text, two spaces apart, those of number `right` to the right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    lines = []
    for row in (titles, *rows):
        cells = (cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
