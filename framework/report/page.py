"""report.html: one file with everything inside it, readable without network, in light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence

from framework.report import text
from framework.report.curves import SERIES, curve_figures, interval_figure
from framework.report.markdown import PAIRED_NOTE
from framework.report.summary import ONE_SEED, Paired, Summary

LIGHT = ("#2563a8", "#c8502d", "#2f8f5b", "#8a4fb0", "#b8860b", "#0f8b8d", "#c2407a", "#5f6b7a")
DARK = ("#6aaef0", "#f08a66", "#63c78f", "#c091e6", "#e0b64a", "#4fc9cb", "#f07fb2", "#a9b4c2")
FOLD_ABOVE = 20  # rows of the list of differing keys

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #ffffff; --ink: #23282f; --soft: #626b76; --grid: #e4e6e9; --accent: #2563a8;
  --good: #2f8f5b; --bad: #b3361f; --mark: #eef4fb; LIGHT }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --card: #1c2026; --ink: #e3e6ea; --soft: #9aa4b0; --grid: #333a43;
  --accent: #6aaef0; --good: #63c78f; --bad: #f0826a; --mark: #202c3a; DARK } }
* { box-sizing: border-box; stroke-linejoin: round; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 6px 0; max-width: 85ch; } .soft { color: var(--soft); font-size: 13.5px; }
.lead { font-size: 17px; margin: 14px 0 6px; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
th { font-weight: 600; font-size: 13px; color: var(--soft); white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.best td { background: var(--mark); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; vertical-align: -1px; }
.swatch.dashed { background: repeating-linear-gradient(90deg, var(--c) 0 4px, transparent 4px 6px); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; font-size: 14px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 10px; } svg { display: block; width: 100%; height: auto; }
.wide svg { min-width: 620px; } svg text { font-family: inherit; }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 4px 0 12px; padding: 9px 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
td code { overflow-wrap: anywhere; } td:first-child { min-width: 170px; } td:first-child code { overflow-wrap: normal; }
td:nth-last-child(n+2) code { white-space: nowrap; }
details > summary { cursor: pointer; color: var(--accent); margin: 6px 0; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.verdict { padding: 14px 18px; margin: 14px 0; border-left: 5px solid var(--accent); }
.verdict.SUPPORTED { border-left-color: var(--good); } .verdict.NOT { border-left-color: var(--bad); }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""


def esc(value: object) -> str:
    return html.escape(str(value))


def style() -> str:
    """The style sheet with the series' colours."""
    light, dark = (" ".join(f"--series-{i}: {color};" for i, color in enumerate(palette)) for palette in (LIGHT, DARK))
    return STYLE.replace("LIGHT", light).replace("DARK", dark)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), best: int | None = None) -> str:
    """An HTML table in a card. Cells of `rows` are HTML already; numeric: columns set to the right; best: row to mark."""

    def line(tag: str, cells: Sequence[str], mark: bool = False) -> str:
        inner = "".join(f"<{tag}{' class=n' if i in numeric else ''}>{value}</{tag}>" for i, value in enumerate(cells))
        return f"<tr{' class=best' if mark else ''}>{inner}</tr>"

    body = "".join(line("td", row, i == best) for i, row in enumerate(rows))
    return f'<div class="card scroll"><table>{line("th", [esc(c) for c in columns])}{body}</table></div>'


def name(summary: Summary, i: int) -> str:
    """A configuration's name with its colour."""
    color, dashed = f"var(--series-{i % SERIES})", " dashed" if i >= SERIES else ""
    paint = f"--c: {color}" if dashed else f"background: {color}"
    return f'<span class="swatch{dashed}" style="{paint}"></span>{esc(summary.configurations[i].label)}'


def page(summary: Summary) -> str:
    """The whole report as one HTML document."""
    parts = [f"<h1>{esc(summary.title)}</h1>", f'<p class="soft">{esc(text.counts(summary))} · {esc(when(summary))}</p>']
    parts.append(f'<p class="lead">{esc(text.headline(summary))}</p>')
    if summary.verdict:
        parts.append(verdict(summary))
    if summary.configurations:
        parts += ["<h2>Results</h2>", results(summary), pairs(summary), curves(summary), "<h2>Cost</h2>", costs(summary)]
    if summary.unfinished:
        parts += ["<h2>Not finished</h2>", unfinished(summary)]
    if summary.differing:
        columns = ["key", *(c.label for c in summary.configurations)]
        rows = [[f"<code>{esc(key)}</code>", *(f"<code>{esc(v)}</code>" for v in values)] for key, values in summary.differing]
        listed = table(columns, rows)
        if len(rows) > FOLD_ABOVE:
            listed = f"<details><summary>{len(rows)} keys differ</summary>{listed}</details>"
        parts += ["<h2>Configurations</h2>", '<p class="soft">Only keys that differ.</p>', listed]
    parts += ["<h2>Commands</h2>", commands(summary), runs(summary)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{esc(summary.title)}</title>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{style()}</style></head>\n<body><main>\n{body}\n</main></body></html>\n'


def when(summary: Summary) -> str:
    """First and last day of the runs."""
    days = sorted(run.created[:16].replace("T", " ") for run in summary.runs if run.created)
    if not days:
        return "no dates"
    return f"{days[0]} to {days[-1]} UTC" if days[0] != days[-1] else f"{days[0]} UTC"


def verdict(summary: Summary) -> str:
    """The claim's verdict as a box."""
    first, *rest = summary.verdict_lines
    word, _, statement = first.partition(":")
    items = "".join(f"<li>{esc(line.strip())}</li>" for line in rest)
    inner = f"<p><strong>{esc(word)}</strong>: {esc(statement.strip())}</p>" + (f"<ul>{items}</ul>" if items else "")
    return f'<div class="card verdict {esc(word.split()[0])}">{inner}</div>'


def results(summary: Summary) -> str:
    """Mean, spread and best of every figure; the best mean of the metric judged by is marked."""
    columns, rows = ["configuration", "seeds"], []
    for metric in summary.metrics:
        columns += [metric, "spread (std)", "best"]
    for i, result in enumerate(summary.results):
        row = [name(summary, i), text.seed_count(summary.configurations[i])]
        for metric in summary.metrics:
            found = result.get(metric)
            if found is None:
                row += ["–"] * 3
            else:
                row += [text.number(found.mean), text.spread_text(found), text.number(found.best(summary.higher))]
        rows.append(row)
    best = 0 if len(rows) > 1 and summary.metric in summary.results[0] else None
    return table(columns, rows, range(1, len(columns)), best) + '<p class="soft">Means over seeds; best: the best single seed.</p>'


def pairs(summary: Summary) -> str:
    """Paired differences as a picture and a table."""
    if not summary.pairs:
        return ""
    figure = interval_figure(summary.pairs, summary.metric)
    picture = f'<figure class="card scroll wide">{figure}</figure><br>' if figure else ""
    m = len(summary.pairs)
    rows = [
        [f"{esc(p.first)} − {esc(p.second)}", str(len(p.seeds)), text.number(p.mean), esc(text.interval(p)), reading(p, summary.higher, m)]
        for p in summary.pairs
    ]
    columns = ("difference", "seeds", f"mean of {summary.metric}", "95 % interval", "reading")
    return f'<h2>Paired differences</h2>{picture}{table(columns, rows, (1, 2, 3))}<p class="soft">{esc(PAIRED_NOTE)}</p>'


def reading(pair: Paired, higher: bool, comparisons: int) -> str:
    words = esc(text.reading(pair, higher, comparisons))
    return f'<span class="good">{words}</span>' if pair.sure else words


def curves(summary: Summary) -> str:
    """One picture a metric and axis, with one legend for all."""
    figures = curve_figures(summary)
    if not figures:
        return ""
    legend = "".join(f"<span>{name(summary, i)}</span>" for i in range(len(summary.configurations)))
    plots = "".join(f'<figure class="card">{svg}</figure>' for _, _, svg in figures)
    several = any(len(c.runs) > 1 for c in summary.configurations)
    note = "Line: mean over seeds; band: from the lowest to the highest seed." if several else f"{ONE_SEED[0].upper()}{ONE_SEED[1:]}."
    return f'<h2>Curves</h2><div class="legend">{legend}</div><div class="plots">{plots}</div><p class="soft">{note}</p>'


def costs(summary: Summary) -> str:
    names = text.cost_columns(summary)
    rows = [[name(summary, i), *(text.cost(n, found.get(n)) for n in names)] for i, found in enumerate(summary.costs)]
    note = '<p class="soft">Means over seeds. FLOPs: tokens times the FLOPs counted for one training token.</p>'
    return table(["configuration", *names], rows, range(1, len(names) + 1)) + note


def unfinished(summary: Summary) -> str:
    """Runs that failed, stopped or cannot be read, with their error and command."""
    rows = [
        [esc(run.path.name), f'<span class="bad">{esc(run.status)}</span>', esc("–" if run.seed is None else run.seed),
         f"{esc(run.error)}<details><summary>command</summary><code>{esc(run.command)}</code></details>"]
        for run in summary.unfinished
    ]  # fmt: skip
    return table(("job", "status", "seed", "error"), rows) + '<p class="soft">These take no part in the figures.</p>'


def commands(summary: Summary) -> str:
    """The line that made the sweep, then that of every configuration."""
    made = summary.sweep.get("command")
    parts = [f'<p>All of it:</p><pre class="card">{esc(made)}</pre>'] if made else []
    for i, configuration in enumerate(summary.configurations):
        parts.append(f'<p>{name(summary, i)}</p><pre class="card">{esc(configuration.command)}</pre>')
    return "".join(parts)


def runs(summary: Summary) -> str:
    """Every counted run with its figure, folder and command, folded away."""
    names = [summary.metric, *(m for m in summary.metrics if m != summary.metric)][:3]
    rows = []
    for i, configuration in enumerate(summary.configurations):
        for run in configuration.runs:
            figures = [text.number(run.metrics[m]) if m in run.metrics else "–" for m in names]
            rows.append([name(summary, i), esc(run.seed), *figures, esc(run.path.name), f"<code>{esc(run.command)}</code>"])
    for run in summary.repeated:
        figures = [text.number(run.metrics[m]) if m in run.metrics else "–" for m in names]
        rows.append(["repeated: a newer run counts", esc(run.seed), *figures, esc(run.path.name), f"<code>{esc(run.command)}</code>"])
    if not rows:
        return ""
    columns = ["configuration", "seed", *names, "folder", "command"]
    return f"<details><summary>every run ({len(rows)})</summary>{table(columns, rows, range(1, 2 + len(names)))}</details>"
