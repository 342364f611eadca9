"""Figures of each configuration with their spread over seeds, and paired differences between configurations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.contracts import UserError
from framework.report.group import Configuration, differences, group
from framework.report.read import RunData
from framework.signatures import nearest
from framework.statistics import mean_interval

ONE_SEED = "one seed: no spread"
ALL_PAIRS_UP_TO = 5  # configurations; with more, each is compared with the best one only
LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Values of one figure over the seeds of a configuration."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / self.n

    @property
    def std(self) -> float | None:
        """Sample standard deviation, s = sqrt(sum (x - mean)^2 / (n - 1)); None for one value."""
        if self.n < 2:
            return None
        return math.sqrt(math.fsum((value - self.mean) ** 2 for value in self.values) / (self.n - 1))

    def best(self, higher: bool = False) -> float:
        return max(self.values) if higher else min(self.values)


@dataclass(frozen=True)
class Paired:
    """Difference of a figure between two configurations over the seeds that both have."""

    first: str
    second: str
    seeds: tuple[int | None, ...]
    mean: float  # of first minus second
    low: float  # 95 % interval; -inf for one seed
    high: float
    sure: bool  # does the interval at level 1 - 0.05 / (number of comparisons) leave out zero, too?

    @property
    def clear(self) -> bool:
        """Does the interval leave out zero?"""
        return self.low > 0 or self.high < 0


@dataclass
class Summary:
    """All that a report shows, whatever its form."""

    title: str
    folders: list[Path]
    metric: str
    higher: bool  # is more better?
    runs: list[RunData]
    configurations: list[Configuration]  # best first
    results: list[dict[str, Spread]]  # by metric, of each configuration
    pairs: list[Paired]
    costs: list[dict[str, Spread]]
    differing: list[tuple[str, list[str]]]
    sweep: dict[str, Any]  # sweep.json
    verdict: dict[str, Any] | None = None  # of the claim that the sweep carries
    verdict_lines: list[str] = field(default_factory=list)  # the same in words, the outcome first

    @property
    def unfinished(self) -> list[RunData]:
        """Runs that take no part in the figures because they did not finish."""
        return [run for run in self.runs if run.status != "done"]

    @property
    def repeated(self) -> list[RunData]:
        """Finished runs that a newer one of the same configuration and seed replaces."""
        counted = {id(run) for c in self.configurations for run in c.runs}
        return [run for run in self.runs if run.status == "done" and id(run) not in counted]

    @property
    def metrics(self) -> list[str]:
        """Figures of the table: the one judged by, then other held-out ones."""
        names = dict.fromkeys(name for result in self.results for name in result)
        return [self.metric, *sorted(name for name in names if name != self.metric)]


def spread(runs: Sequence[RunData], key: str) -> Spread | None:
    """Values of a final figure over the runs; None where any of them lacks it (a mean over fewer seeds would pass for the whole)."""
    values = [run.metrics[key] for run in runs if key in run.metrics]
    return Spread(tuple(values)) if values and len(values) == len(runs) else None


def costs_of(runs: Sequence[RunData]) -> dict[str, Spread]:
    """What a configuration cost: tokens, seconds, tokens/s, FLOPs (tokens x FLOPs per token), peak memory, parameters; as far as known."""
    found = {
        "tokens": spread(runs, "tokens"),
        "seconds": spread(runs, "seconds"),
        "tokens/s": spread(runs, "perf/tokens_per_second"),
        "memory": next((s for key in runs[0].metrics if "peak_memory" in key and (s := spread(runs, key))), None),
        "parameters": spread(runs, "params/total"),
        "trainable": spread(runs, "params/trainable"),
    }
    tokens, per_token = found["tokens"], spread(runs, "perf/flops_per_token")
    if tokens and per_token:
        found["FLOPs"] = Spread(tuple(t * f for t, f in zip(tokens.values, per_token.values)))
    order = ("tokens", "seconds", "tokens/s", "FLOPs", "memory", "parameters", "trainable")
    return {key: value for key in order if (value := found.get(key)) is not None}


def paired(first: Configuration, second: Configuration, metric: str, comparisons: int = 1) -> Paired | None:
    """Paired difference first - second over common seeds; None where there are none. comparisons: how many are made together.

    d_s = x_first,s - x_second,s for each of the n common seeds s; the 95 % interval is Student's, for paired samples:

        mean(d) +- t(0.975, n - 1) * sd(d) / sqrt(n),    sd(d) = sqrt(sum_s (d_s - mean(d))^2 / (n - 1)).

    It assumes differences that are normal and independent from seed to seed. `sure` asks the same of t(1 - 0.025 / m, n - 1), m being
    the number of comparisons (Bonferroni).
    """
    left = {run.seed: run.metrics[metric] for run in first.runs if metric in run.metrics}
    right = {run.seed: run.metrics[metric] for run in second.runs if metric in run.metrics}
    seeds = tuple(seed for seed in left if seed in right)
    if not seeds:
        return None
    values = [left[seed] - right[seed] for seed in seeds]
    mean, low, high = mean_interval(values, LEVEL)
    _, lowest, highest = mean_interval(values, 1 - (1 - LEVEL) / comparisons)
    return Paired(first.label, second.label, seeds, mean, low, high, sure=lowest > 0 or highest < 0)


def choose_metric(runs: list[RunData], wanted: str | None) -> str:
    """The figure that configurations are compared by: the wanted one, else that of the claim they carry, else what they were optimised for.

    Raises:
        UserError: no run has it.
    """
    measured = sorted({name for run in runs for name in run.metrics})
    named = (run.config.get(key) for key in ("claim.metric", "optimized_metric") for run in runs)
    metric = wanted or next((str(name) for name in named if name in measured), "val/loss")
    if metric not in measured:
        if wanted:
            raise UserError(f"--metric: {metric!r} was not measured by any run; one of {', '.join(measured)}{nearest(metric, measured)}")
        losses = [name for name in ("val/loss", "train/loss") if name in measured]
        metric = losses[0] if losses else measured[0] if measured else metric
    return metric


def summarise(folders: list[Path], runs: list[RunData], metric: str | None = None, higher: bool = False) -> Summary:
    """Group, average and compare.

    Args:
        folders: what the user named.
        runs: below them.
        metric: figure to compare by; None: what the runs were optimised for.
        higher: is more of it better?

    Raises:
        UserError: nothing can be read, or no run has the metric.
    """
    problems = [run.problem for run in runs if run.problem]
    if runs and len(problems) == len(runs):
        raise UserError("\n".join(str(line) for line in problems))
    chosen = choose_metric([run for run in runs if run.status == "done"], metric)
    higher = higher or (metric is None and any(run.config.get("claim.better") == "higher" for run in runs))
    configurations = group(runs)

    def rank(c: Configuration) -> tuple[bool, float]:
        found = spread(c.runs, chosen)
        return found is None, (-found.mean if higher else found.mean) if found else 0.0

    configurations.sort(key=rank)
    names = dict.fromkeys([chosen, *(n for run in runs for n in run.metrics if n.startswith(("val/", "eval/")))])
    results = [{name: s for name in names if (s := spread(c.runs, name))} for c in configurations]
    all_pairs = len(configurations) <= ALL_PAIRS_UP_TO
    matched = list(itertools.combinations(configurations, 2)) if all_pairs else [(configurations[0], c) for c in configurations[1:]]
    pairs = [p for first, second in matched if (p := paired(first, second, chosen, len(matched)))]
    costs = [costs_of(c.runs) for c in configurations]
    title = folders[0].resolve()
    return Summary(
        f"{title.parent.name}/{title.name}" if len(folders) == 1 else f"{len(folders)} folders",
        folders, chosen, higher, runs, configurations, results, pairs, costs, differences(configurations), {},
    )  # fmt: skip
