"""report.md: the tables of the report, without pictures."""

from __future__ import annotations

from collections.abc import Sequence

from framework.report import text
from framework.report.summary import Summary


def cell(value: object) -> str:
    """Text that cannot break a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell(value) for value in line)} |" for line in lines)


def markdown(summary: Summary) -> str:
    """The whole report."""
    parts = [f"# {summary.title}", f"{text.headline(summary)}", f"{text.counts(summary)}."]
    if command := summary.sweep.get("command"):
        parts.append(f"Made by `{command}`")
    if summary.verdict:
        parts += ["## Claim", *claim(summary)]
    if summary.configurations:
        parts += ["## Results", results(summary), "## Cost (means over seeds)", costs(summary)]
    if summary.pairs:
        parts += ["## Paired differences", PAIRED_NOTE, pairs(summary)]
    if summary.differing:
        parts += ["## Configurations", "Only keys that differ.", differing(summary)]
    if summary.unfinished:
        parts += ["## Not finished", "These take no part in the figures above.", unfinished(summary)]
    if summary.repeated:
        rows = [(run.path.name, run.seed, run.metrics.get(summary.metric, "–")) for run in summary.repeated]
        parts += [
            "## Repeated",
            "A newer run of the same configuration and seed counts instead.",
            table(("run", "seed", summary.metric), rows),
        ]
    parts += ["## Commands", commands(summary)]
    return "\n\n".join(parts) + "\n"


PAIRED_NOTE = (
    "First minus second, seed by seed; the interval is mean(d) ± t(0.975, n − 1) · sd(d) / √n of Student's t. The last column also asks "
    "whether a difference stands when all comparisons are made at once (Bonferroni)."
)


def claim(summary: Summary) -> list[str]:
    """The verdict, then what it rests on."""
    first, *rest = summary.verdict_lines
    return [f"**{first}**", *(["\n".join(f"- {line.strip()}" for line in rest)] if rest else [])]


def results(summary: Summary) -> str:
    """Mean, spread and best of every figure."""
    columns, rows = ["configuration", "n seeds"], []
    for metric in summary.metrics:
        columns += [f"{metric} mean", "spread (std)", "best"]
    for configuration, result in zip(summary.configurations, summary.results):
        row: list[object] = [configuration.label, text.seed_count(configuration)]
        for metric in summary.metrics:
            found = result.get(metric)
            row += ["–", "–", "–"] if found is None else [
                text.number(found.mean), text.spread_text(found), text.number(found.best(summary.higher))
            ]  # fmt: skip
        rows.append(row)
    return table(columns, rows)


def costs(summary: Summary) -> str:
    names = text.cost_columns(summary)
    rows = [[c.label, *(text.cost(n, k.get(n)) for n in names)] for c, k in zip(summary.configurations, summary.costs)]
    return table(["configuration", *names], rows)


def pairs(summary: Summary) -> str:
    rows = [
        (
            f"{p.first} − {p.second}",
            len(p.seeds),
            text.number(p.mean),
            text.interval(p),
            text.reading(p, summary.higher, len(summary.pairs)),
        )
        for p in summary.pairs
    ]
    return table(("difference", "n seeds", f"mean of {summary.metric}", "95 % interval", "reading"), rows)


def differing(summary: Summary) -> str:
    return table(["key", *(c.label for c in summary.configurations)], [[key, *values] for key, values in summary.differing])


def unfinished(summary: Summary) -> str:
    rows = [(run.path.name, run.status, run.seed, run.error, run.command) for run in summary.unfinished]
    return table(("job", "status", "seed", "error", "command"), rows)


def commands(summary: Summary) -> str:
    """The exact line of every configuration, and of every counted run."""
    lines = []
    for configuration in summary.configurations:
        lines += [f"{configuration.label}:", "", "```", configuration.command, "```", ""]
        lines += [f"- seed {run.seed}: `{run.command}` ({run.path})" for run in configuration.runs] + [""]
    return "\n".join(lines)
