"""Spaces and evolutions with the values of conf/task/rope_search.yaml, but for what a test changes."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from components.search.space import Space
from components.search.variation import Evolution

CONF = Path(__file__).resolve().parents[3] / "conf"


@functools.cache
def task() -> dict[str, Any]:
    return yaml.safe_load((CONF / "task" / "rope_search.yaml").read_text())["task"]


def values(kind: type, changes: dict[str, Any]) -> dict[str, Any]:
    return {field.name: task()[field.name] for field in fields(kind) if field.name in task()} | changes


def make_space(rotary_dim: int, base: float, original_len: int, factor: float, **changes: Any) -> Space:
    return Space(**values(Space, {"rotary_dim": rotary_dim, "base": base, "original_len": original_len, "factor": factor} | changes))


def make_evolution(**changes: Any) -> Evolution:
    return Evolution(**values(Evolution, {"seed": 0} | changes))
