"""Which runs are the same configuration, how configurations differ, and what to call them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from framework.report.read import RunData

# Keys that do not touch the numbers, besides those that follow the seed.
IRRELEVANT = (
    "seed", "name", "tags", "paths", "resume", "resume_force", "logger", "progress", "traceback", "checkpoint", "samples",
    "optimized_metric", "allow_targets", "claim", "sweep", "on_error",
)  # fmt: skip
IRRELEVANT_CHOICES = ("logger", "debug", "local", "sweep")
ABSENT = "(absent)"


@dataclass
class Configuration:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: list[RunData]  # counted: the newest finished run of each seed, by seed
    others: list[RunData]  # repeated, unfinished or failed runs of the same configuration

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]

    @property
    def lost(self) -> int:
        """Seeds that were begun and have no finished run: with them the mean might be another."""
        return len({run.seed for run in self.others} - set(self.seeds))

    @property
    def command(self) -> str:
        """The line that makes all counted runs of this configuration."""
        words = [word for word in self.runs[0].overrides if not word.startswith("seed=")]
        if len(self.runs) == 1:
            return self.runs[0].command
        return shlex.join(["python", "train.py", "-m", *words, f"seed={','.join(str(s) for s in self.seeds)}"])


def counts(key: str) -> bool:
    """Does a key of the configuration touch the numbers of a run?"""
    return key.split(".")[0] not in IRRELEVANT


def hashable(value: Any) -> str:
    """A value as text that differs where values differ."""
    return repr(value)


def relevant_keys(runs: list[RunData]) -> list[str]:
    """Keys whose values differ between runs and are no consequence of the seed, in the order of the configuration."""
    keys: dict[str, None] = {key: None for run in runs for key in run.config if counts(key)}
    seeds = [hashable(run.seed) for run in runs]
    differing = []
    for key in keys:
        values = [hashable(run.config.get(key, ABSENT)) for run in runs]
        if len(set(values)) > 1 and values != seeds:
            differing.append(key)
    return differing


def group(runs: list[RunData], finished: Iterable[str] = ("done",)) -> list[Configuration]:
    """Configurations of the runs that have one, in order of appearance; those without a finished run are left out.

    The name of a configuration has the options and typed keys that differ, then as few other keys as tell the rest apart.
    """
    known = [run for run in runs if run.config]
    keys = relevant_keys(known)
    parts = label_parts(known, keys)
    together: dict[tuple[str, ...], list[RunData]] = {}
    for run in known:
        together.setdefault(tuple(hashable(run.config.get(key, ABSENT)) for key in keys), []).append(run)
    found = []
    for members in together.values():
        newest: dict[int | None, RunData] = {}
        for run in sorted(members, key=lambda run: run.created):
            if run.status in finished:
                newest[run.seed] = run
        if newest:
            counted = sorted(newest.values(), key=lambda run: run.seed or 0)
            found.append(Configuration(label_of(counted[0], parts), counted, [run for run in members if run not in counted]))
    return found


def label_parts(runs: list[RunData], keys: list[str]) -> list[tuple[str, bool]]:
    """What names a configuration: (group, True) for options, (key, False) for keys."""
    groups: dict[str, None] = {name: None for run in runs for name in run.choices if name not in IRRELEVANT_CHOICES}
    differing = [name for name in groups if len({run.choices.get(name) for run in runs}) > 1 and "/overlay" not in name]
    parts: list[tuple[str, bool]] = [(name, True) for name in differing]
    typed = [typed_key(word) for run in runs for word in run.overrides]
    chosen = [key for key in dict.fromkeys(typed) if key in keys]
    parts += [(key, False) for key in chosen]
    partition = [tuple(value_of(run, part) for part in parts) for run in runs]
    for key in keys:
        if key in chosen:
            continue
        finer = [(*cell, value_of(run, (key, False))) for cell, run in zip(partition, runs)]
        if len(set(finer)) > len(set(partition)):
            parts.append((key, False))
            partition = finer
    return parts


def typed_key(word: str) -> str:
    """Key path of an override."""
    return word.lstrip("+~").partition("=")[0].replace("/", ".")


def value_of(run: RunData, part: tuple[str, bool]) -> str:
    """The run's option or value for one part of a label."""
    name, is_choice = part
    return run.choices.get(name, "none") if is_choice else shown(run.config.get(name, ABSENT))


def shown(value: Any) -> str:
    """A configuration value as a person would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(shown(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def label_of(run: RunData, parts: list[tuple[str, bool]]) -> str:
    """Name of the run's configuration; all runs being the same, what it is made of."""
    if parts:
        return " ".join(f"{part[0]}={value_of(run, part)}" for part in parts)
    main = [
        run.choices[name] for name in ("model", "model/size", "adapter", "optimizer", "data") if run.choices.get(name, "none") != "none"
    ]
    return " ".join(main) or run.path.name


def differences(configurations: list[Configuration]) -> list[tuple[str, list[str]]]:
    """Keys that differ between configurations, with each one's value; then versions and commits that differ between any runs."""
    firsts = [c.runs[0] for c in configurations]
    table = [(key, [shown(run.config.get(key, ABSENT)) for run in firsts]) for key in relevant_keys(firsts)]
    facts = [[{**flat_facts(run)} for run in c.runs] for c in configurations]
    names = dict.fromkeys(name for runs in facts for run in runs for name in run)
    for name in names:
        values = [sorted({run.get(name, ABSENT) for run in runs}) for runs in facts]
        if len({value for cell in values for value in cell}) > 1:
            table.append((name, [", ".join(cell) for cell in values]))
    return table


def flat_facts(run: RunData) -> dict[str, str]:
    """Versions of libraries and the commit that a run recorded."""
    facts = {f"version of {name}": str(value) for name, value in (run.state.get("versions") or {}).items()}
    sha = (run.state.get("git") or {}).get("sha")
    return facts | ({"commit": str(sha)[:10]} if sha else {})
