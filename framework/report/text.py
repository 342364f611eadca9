"""Numbers and rows of a summary as text, shared by all forms of the report."""

from __future__ import annotations

import csv
import io
import math

from framework.report.curves import quantity
from framework.report.group import Configuration
from framework.report.summary import ONE_SEED, Paired, Spread, Summary


def number(value: float) -> str:
    """Five significant digits, large counts with separators."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e5:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def mean_and_spread(spread: Spread | None) -> str:
    """'4.7374 ± 0.0210'; without ± for one seed."""
    if spread is None:
        return "–"
    return number(spread.mean) if spread.std is None else f"{number(spread.mean)} ± {spread.std:.2g}"


def seed_count(configuration: Configuration) -> str:
    """'3', or '2 of 3' where a seed has no finished run."""
    n = len(configuration.runs)
    return f"{n} of {n + configuration.lost}" if configuration.lost else str(n)


def spread_text(spread: Spread | None) -> str:
    """Standard deviation over seeds, or why there is none."""
    if spread is None:
        return "–"
    return ONE_SEED if spread.std is None else f"{spread.std:.3g}"


def cost(name: str, spread: Spread | None) -> str:
    """Mean cost in a readable unit."""
    if spread is None:
        return "–"
    if name == "memory":
        return f"{spread.mean / 2**30:.2f} GiB" if spread.mean >= 2**30 else f"{spread.mean / 2**20:.0f} MiB"
    if name == "seconds":
        return f"{spread.mean:.3g}" if spread.mean < 100 else f"{spread.mean:,.0f}"
    if name in ("parameters", "trainable"):
        return f"{spread.mean:,.0f}"
    return quantity(spread.mean)


def cost_columns(summary: Summary) -> list[str]:
    """Names of the costs that any configuration has; trainable parameters only where they differ from all parameters."""
    names = dict.fromkeys(name for costs in summary.costs for name in costs)
    same = all(costs.get("trainable") == costs.get("parameters") for costs in summary.costs)
    return [name for name in names if not (same and name == "trainable")]


def interval(pair: Paired) -> str:
    """'[-0.68, 0.04]', or why there is none."""
    return ONE_SEED if math.isinf(pair.low) else f"[{number(pair.low)}, {number(pair.high)}]"


def reading(pair: Paired, higher: bool, comparisons: int) -> str:
    """What a pair says, in words."""
    if math.isinf(pair.low):
        return "no interval from one seed"
    if not pair.clear:
        return "no difference shown"
    better = f"{pair.first if (pair.mean > 0) == higher else pair.second} is better"
    return better if pair.sure else f"{better} in this comparison alone, not among all {comparisons}"


def headline(summary: Summary) -> str:
    """One sentence: the best configuration and how sure that is."""
    if not summary.configurations:
        return "No run finished: there is nothing to compare."
    best = summary.results[0].get(summary.metric)
    if best is None:
        return f"No configuration has {summary.metric} for all its seeds."
    seeds = f"{best.n} seeds" if best.n > 1 else ONE_SEED
    name = summary.configurations[0].label
    if summary.configurations[0].lost:
        seeds += f", {summary.configurations[0].lost} more not finished"
    if len(summary.configurations) == 1:
        return f"{name}: {summary.metric} {mean_and_spread(best)} ({seeds})."
    against = [pair for pair in summary.pairs if name in (pair.first, pair.second)]
    sure = len(against) == len(summary.configurations) - 1 and all(pair.sure for pair in against)
    doubt = "clearly ahead of every other one" if sure else "not clearly ahead of every other one (see the paired differences)"
    return f"Best mean {summary.metric}: {mean_and_spread(best)} by {name} ({seeds}), {doubt}."


def counts(summary: Summary) -> str:
    """How many configurations, runs and failures."""
    done = sum(run.status == "done" for run in summary.runs)
    sizes = ((len(summary.configurations), "configuration"), (len(summary.runs), "run"))
    parts = [*(f"{n} {name}{'s' if n != 1 else ''}" for n, name in sizes), f"{done} done"]
    states = dict.fromkeys(run.status for run in summary.unfinished)
    return ", ".join([*parts, *(f"{sum(run.status == s for run in summary.unfinished)} {s}" for s in states)])


def table_csv(summary: Summary) -> str:
    """table.csv: one row a configuration, all digits: figures (mean, std, min, max), costs (means), keys that differ, command."""
    rows = []
    for i, configuration in enumerate(summary.configurations):
        row: dict[str, object] = {
            "configuration": configuration.label,
            "n_seeds": len(configuration.runs),
            "lost_seeds": configuration.lost,
        }
        row["seeds"] = " ".join(str(seed) for seed in configuration.seeds)
        for metric in summary.metrics:
            if found := summary.results[i].get(metric):
                row |= {f"{metric} mean": found.mean, f"{metric} std": "" if found.std is None else found.std}
                row |= {f"{metric} min": min(found.values), f"{metric} max": max(found.values)}
        row |= {f"{name} mean": found.mean for name, found in summary.costs[i].items()}
        row |= {key: values[i] for key, values in summary.differing}
        row["command"] = configuration.command
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row if name != "command")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*columns, "command"] if rows else ["configuration"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
