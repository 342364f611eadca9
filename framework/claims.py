"""Verdicts on claims: an experiment is arms x seeds with a threshold written before it runs; the run folders alone decide.

`python -m framework.claims SWEEP_DIR` writes SWEEP_DIR/verdict.json and prints it; `--publish` also copies it to docs/verdicts/;
`--results` rewrites the generated part of docs/results.md from what lies there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from components.contracts import UserError
from framework import bounds
from framework.arms import Claim, Job, arm_of, asked_for, claim_hash, declared, first_stage, plain, read_claim, read_jobs, stored_hydra
from framework.entry import report
from framework.runs import replace_file
from framework.statistics import mean_interval, welch_interval

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "SUPPORTED", "NOT SUPPORTED", "INCONCLUSIVE"
VERDICT_FILE = "verdict.json"
DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- verdicts: made by python -m framework.claims --results -->", "<!-- end of verdicts -->"
AMOUNTS = {"end": "at the end of the runs", "tokens": "at equal tokens", "seconds": "at equal wall time",
           "training_seconds": "at equal training time"}  # fmt: skip
# Keys that a command may set without another experiment coming of it: they do not touch the numbers, or name what earlier stages left.
FREE = ("experiment", "stage_one", "stages", "name", "resume", "seed", "hydra", "logger", "tags", "samples", "progress", "traceback",
        "checkpoint", "paths", "optimized_metric")  # fmt: skip

Cells = dict[tuple[str, int], Job]  # (arm, seed) -> its one finished run


def judge(sweep_dir: str | Path) -> dict[str, Any] | None:
    """Compute the verdict on a sweep and write it to verdict.json.

    The first arm is compared with each other one, or arms with their `rivals`, on every axis of the threshold. Gain: how much better the
    first is; for paired_t the interval is that of the mean difference over equal seeds. One comparison is SUPPORTED when its whole interval
    lies at or above the threshold, NOT SUPPORTED when all of it lies below, else INCONCLUSIVE. The claim is SUPPORTED when all are, NOT
    SUPPORTED when any is. `test: bounds` has no interval: each bound holds or does not (framework/bounds.py).
    Missing or failed runs, or runs of different claims, make it INCONCLUSIVE whatever the rest says.

    Returns:
        The verdict; None where the runs carry no claim, or are the first stage of one.

    Raises:
        UserError: no runs there, or the claim in them is malformed.
    """
    folder = Path(sweep_dir)
    jobs = read_jobs(folder)
    nodes = {claim_hash(node): node for job in jobs if (node := plain(job.config.get("claim")))}
    if not nodes:
        return None
    stored = next(node for job in jobs if (node := plain(job.config.get("claim"))))
    claim = read_claim(stored)
    stages = {str(job.config.stage_one) for job in jobs if job.config.get("stage_one")}
    if claim.tunes and not stages:
        return None
    cells, counts, faults = sort_jobs(claim, jobs)
    if foreign := departures(claim, jobs):
        faults.append(f"the runs depart from the experiment by {', '.join(foreign)}")
    if len(nodes) > 1:
        faults.append(f"the runs carry {len(nodes)} different claims")
    stage_one, unfair, notes = check_first_stage(claim, stages, claim_hash(stored), cells)
    faults += unfair
    experiment = next((str(job.choices["experiment"]) for job in jobs if job.choices.get("experiment")), None)
    changed = experiment is not None and claim_hash(declared(experiment)) != claim_hash(stored)
    if changed:
        notes.append(f"conf/experiment/{experiment}.yaml was changed after running: the verdict is on the claim as the runs carry it")
    minutes = sum(job.metrics.get("seconds", 0.0) for job in jobs) / 60 + stage_one.get("minutes", 0.0)
    if minutes > claim.budget_minutes:
        notes.append(f"took {minutes:.1f} minutes of training; the budget was {claim.budget_minutes:g}")
    if claim.test == "bounds":
        compared = [bounded(line, claim, cells) for line in claim.require]
    else:
        compared = [compare(claim, cells, first, other, axis) for first, other in claim.pairs for axis in claim.threshold]
    faults += [sentence({}, c) for c in compared if c.get("fault")]
    verdict = {
        "verdict": INCONCLUSIVE if faults else overall([c["verdict"] for c in compared]), "experiment": experiment,
        "statement": claim.statement, "why": faults, "notes": notes, "metric": claim.metric, "better": claim.better,
        "comparisons": compared, "jobs": counts, "minutes": round(minutes, 2), "command": command(folder), "sweep": shown(folder),
        "figures": shown_figures(claim, cells), "stage_one": stage_one or None, "claim": stored, "claim_hash": claim_hash(stored),
        "claim_changed": changed, **origin(jobs),
    }  # fmt: skip
    replace_file(folder / VERDICT_FILE, json.dumps(finite(verdict), indent=2) + "\n")
    return finite(verdict)


def sort_jobs(claim: Claim, jobs: list[Job]) -> tuple[Cells, dict[str, int], list[str]]:
    """The finished run of each (arm, seed), how many jobs there were of each kind, and what is missing."""
    cells: Cells = {}
    counts = {"planned": len(claim.arms) * len(claim.seeds), "done": 0, "failed": 0, "unfinished": 0, "other": 0}
    faults: list[str] = []
    for job in jobs:
        arm, status = arm_of(claim, job.choices, job.config), str(job.state.get("status"))
        if job.config and (arm is None or job.seed not in claim.seeds):
            counts["other"] += 1
        elif not job.done:
            kind = "unfinished" if status in ("running", "interrupted") else "failed"
            counts[kind] += 1
            faults.append(f"{job.path.name}: {kind} at step {job.state.get('step', 0)}")
        else:
            counts["done"] += 1
            cell = (str(arm), int(job.seed or 0))
            if cell in cells:
                faults.append(f"{job.path.name}: a second run of {arm} with seed {job.seed}")
            cells.setdefault(cell, job)
    lacking = [f"{arm} seed {seed}" for arm in claim.arms for seed in claim.seeds if (arm, seed) not in cells]
    if lacking:
        faults.append(f"no finished run of {', '.join(lacking)}")
    return cells, counts, faults


def departures(claim: Claim, jobs: list[Job]) -> list[str]:
    """Words of the jobs that change what is computed and belong neither to an arm, nor to the seeds, nor to what the first stage chose.

    The statement describes the experiment as its file has it; with such words, other runs would be judged by it. What the file itself asks
    for, such as the folder of a user's texts, is no departure.
    """
    own = {*claim.tunes, *(key for words in claim.arms.values() for key in words), *asked_for(jobs)}
    found = []
    for word in (word for job in jobs for word in job.words):
        key = word.lstrip("+~").partition("=")[0]
        if key not in own and key.replace("/", ".").split(".")[0] not in FREE and word not in found:
            found.append(word)
    return found


def check_first_stage(claim: Claim, stages: set[str], wanted: str, cells: Cells) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the first stage found, for the verdict; what makes it no fair choice; what else to know. ({}, [], []) where there was none."""
    if not stages:
        return {}, [], []
    folder, faults = Path(min(stages)), [] if len(stages) == 1 else [f"the runs name {len(stages)} first stages"]
    try:
        jobs = read_jobs(folder)
        found = first_stage(folder, claim, jobs)
    except UserError as error:
        return {"sweep": shown(folder)}, [*faults, f"the first stage cannot be read: {error}"], []
    if foreign := departures(claim, jobs):
        faults.append(f"the first stage departs from the experiment by {', '.join(foreign)}")
    sizes = {arm: len(row["points"]) for arm, row in found.items()}
    if len(set(sizes.values())) > 1:
        faults.append(f"unequal budgets in the first stage: points {', '.join(f'{arm} {n}' for arm, n in sizes.items())}")
    if {claim_hash(node) for job in jobs if (node := plain(job.config.get("claim")))} - {wanted}:
        faults.append("the first stage ran with another version of the claim")
    for (arm, seed), job in cells.items():
        used = {key: plain(OmegaConf.select(job.config, key)) for key in claim.tunes}
        if used != found[arm]["best"]:
            faults.append(f"{arm} seed {seed} ran with {used}, not with the best of the first stage")
    notes = [f"{arm}: the best {key} of the first stage, {row['best'][key]:g}, is the last one tried; a better one may lie beyond"
             for arm, row in found.items() for key in row["at_edge"]]  # fmt: skip
    minutes = sum(job.metrics.get("seconds", 0.0) for job in jobs) / 60
    return {"sweep": shown(folder), "command": command(folder), "minutes": round(minutes, 2), "arms": found}, faults, notes


def compare(claim: Claim, cells: Cells, first: str, other: str, axis: str) -> dict[str, Any]:
    """An arm against another one on one axis: gain, interval and verdict.

    On an axis, two runs of the same seed are read at the smaller of their two totals, so that neither gets more of it.
    """
    result: dict[str, Any] = {
        "arms": [first, other],
        "axis": axis,
        "threshold": claim.threshold[axis],
        "level": claim.level,
        "test": claim.test,
    }
    values: dict[str, dict[str, float]] = {first: {}, other: {}}
    amounts: dict[str, float] = {}
    for seed in claim.seeds:
        pair = {arm: cells.get((arm, seed)) for arm in (first, other)}
        if None in pair.values():
            continue
        if axis != "end":
            amounts[str(seed)] = min(job.total(axis) for job in pair.values() if job)
        read = {arm: job.value_at(claim.metric, axis, amounts.get(str(seed), math.inf)) for arm, job in pair.items() if job}
        if None in read.values():
            return {**result, "values": values, "verdict": INCONCLUSIVE, "fault": f"{claim.metric} of seed {seed} is not there to compare"}
        for arm, value in read.items():
            values[arm][str(seed)] = float(value or 0.0)
    result |= {"values": values, "amounts": amounts, "n": len(values[first])}
    if not values[first]:
        return {**result, "verdict": INCONCLUSIVE, "fault": "no pair of runs to compare"}
    sign = 1 if claim.better == "lower" else -1
    a, b = ([sign * value for value in values[arm].values()] for arm in (other, first))
    gains = [x - y for x, y in zip(a, b)]
    gain, low, high = mean_interval(gains, claim.level) if claim.test == "paired_t" else welch_interval(a, b, claim.level)
    least = claim.threshold[axis]
    outcome = SUPPORTED if low >= least else NOT_SUPPORTED if high < least else INCONCLUSIVE
    return {**result, "gains": dict(zip(values[first], gains)), "gain": gain, "low": low, "high": high, "verdict": outcome}


def bounded(line: dict[str, Any], claim: Claim, cells: Cells) -> dict[str, Any]:
    """One bound of a claim, with its verdict."""

    def value(arm: str, seed: int, metric: str) -> float | None:
        return cells[(arm, seed)].value(metric) if (arm, seed) in cells else None

    checked = bounds.check(line, claim.seeds, value)
    return {**checked, "verdict": INCONCLUSIVE if "fault" in checked else SUPPORTED if checked["holds"] else NOT_SUPPORTED}


def shown_figures(claim: Claim, cells: Cells) -> dict[str, dict[str, list[float]]]:
    """{arm: {metric: values of the seeds}} of the metrics that `claim.show` names."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in claim.arms:
        for metric in claim.show:
            values = [cells[(arm, seed)].value(metric) for seed in claim.seeds if (arm, seed) in cells]
            found.setdefault(arm, {})[metric] = [value for value in values if value is not None]
    return found


def overall(verdicts: list[str]) -> str:
    """All comparisons must hold; one that fails refutes the claim."""
    return NOT_SUPPORTED if NOT_SUPPORTED in verdicts else SUPPORTED if set(verdicts) == {SUPPORTED} else INCONCLUSIVE


def command(folder: Path) -> str | None:
    """The command that made a sweep: from sweep.json, else from what Hydra stored."""
    try:
        typed = json.loads((folder / "sweep.json").read_text()).get("command")
    except (OSError, ValueError):
        typed = None
    if typed or not (folder / "multirun.yaml").is_file():
        return typed
    words = stored_hydra(folder / "multirun.yaml").get("overrides", {}).get("task", [])
    return " ".join(["python train.py -m", *map(str, words)])


def origin(jobs: list[Job]) -> dict[str, Any]:
    """When, with what versions and at which commit the runs were made, as the first finished one says."""
    state = next((job.state for job in jobs if job.done), {})
    return {key: state.get(key) for key in ("created", "versions", "git")}


def shown(folder: Path) -> str:
    """A folder as seen from where the command was typed, when it lies below."""
    absolute = folder.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(folder)


def finite(node: Any) -> Any:
    """The same containers with null for infinite ends of intervals, which JSON cannot hold."""
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, list):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


# ------------------------------------------------------------------------------------------------------------------- text


def number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:+.4f}"


def sentence(verdict: dict[str, Any], compared: dict[str, Any]) -> str:
    """One comparison in words: means, gain with interval, threshold, outcome; or one bound."""
    if "what" in compared:
        return bounds.sentence(compared)
    first, other = compared["arms"]
    start = f"{first} against {other} {AMOUNTS[compared['axis']]}"
    if "gain" not in compared:
        return f"{start}: {compared['fault']}"
    means = {arm: sum(values.values()) / len(values) for arm, values in compared["values"].items()}
    each = ", ".join(f"{arm} {mean:.4f}" for arm, mean in means.items())
    return (
        f"{start}: {verdict['metric']} {each}; gain {number(compared['gain'])} [{number(compared['low'])}, {number(compared['high'])}] "
        f"({compared['level']:.0%}, n={compared['n']}), at least {compared['threshold']:g} claimed: {compared['verdict']}"
    )


def lines(verdict: dict[str, Any]) -> list[str]:
    """A verdict for the terminal."""
    text = [f"{verdict['verdict']}: {verdict['statement']}", *("  " + sentence(verdict, c) for c in verdict["comparisons"])]
    text += [f"  {kind}: {line}" for kind, key in (("inconclusive", "why"), ("note", "notes")) for line in verdict[key]]
    return text


def section(verdict: dict[str, Any]) -> str:
    """A verdict for docs/results.md."""
    stage, jobs = verdict.get("stage_one"), verdict["jobs"]
    text = [f"### {verdict['experiment']}: {verdict['verdict']}", "", verdict["statement"], ""]
    text += [f"- {sentence(verdict, compared)}" for compared in verdict["comparisons"]]
    text += [f"- inconclusive because: {line}" for line in verdict["why"]] + [f"- note: {line}" for line in verdict["notes"]]
    rows = [
        (c["axis"], arm, seed, value)
        for c in verdict["comparisons"] if "axis" in c
        for arm, values in c["values"].items()
        for seed, value in values.items()
    ]  # fmt: skip
    if rows:
        text += ["", f"| compared | arm | seed | {verdict['metric']} |", "| --- | --- | --- | --- |"]
        text += [f"| {AMOUNTS[axis]} | {arm} | {seed} | {value:.4f} |" for axis, arm, seed, value in dict.fromkeys(rows)]
    text += measured(verdict)
    if stage and stage.get("arms"):
        keys = list(next(iter(stage["arms"].values()))["best"])
        text += ["", f"First stage, one column a key that it chose: {stage['minutes']:.1f} minutes, `{stage['command']}`", ""]
        text += [f"| arm | {' | '.join(keys)} | {verdict['metric']} |", "| --- |" + " --- |" * (len(keys) + 1)]
        for arm, found in stage["arms"].items():
            for point in found["points"]:
                best = " (chosen)" if all(point[key] == found["best"][key] for key in keys) else ""
                value = "failed" if point["value"] is None else f"{point['value']:.4f}{best}"
                text.append(f"| {arm} | {' | '.join(f'{point[key]}' for key in keys)} | {value} |")
    versions, git = verdict.get("versions") or {}, verdict.get("git") or {}
    made = [f"{name} {versions[name]}" for name in ("python", "torch") if name in versions]
    made += [f"commit {git['sha'][:10]}{' with changes' if git.get('dirty') else ''}"] if git.get("sha") else []
    text += [
        "",
        f"{jobs['done']} of {jobs['planned']} runs done, {verdict['minutes']:.1f} minutes of training in all; {', '.join(made)}.",
        "",
    ]
    return "\n".join([*text, f"    {verdict['command']}", ""])


def measured(verdict: dict[str, Any]) -> list[str]:
    """Table of what a claim of bounds also measured: mean and range over the seeds, a row an arm and a column a metric.

    Of a single arm: a row a metric, since it may have many.
    """
    figures: dict[str, dict[str, list[float]]] = verdict.get("figures") or {}
    metrics = list(dict.fromkeys(metric for by_metric in figures.values() for metric in by_metric))
    if not metrics:
        return []

    def cell(values: list[float] | None) -> str:
        return f"{sum(values) / len(values):.4g} [{min(values):.4g}, {max(values):.4g}]" if values else ""

    if len(figures) == 1:
        (arm,) = figures
        return ["", f"| metric | {arm} |", "| --- | --- |", *(f"| {metric} | {cell(figures[arm][metric])} |" for metric in metrics)]
    text = ["", f"| arm | {' | '.join(metrics)} |", "| --- |" + " --- |" * len(metrics)]
    text += [f"| {arm} | {' | '.join(cell(by_metric.get(metric)) for metric in metrics)} |" for arm, by_metric in figures.items()]
    return text


def write_results(docs: Path = DOCS) -> Path:
    """Rewrite the part of docs/results.md between the two markers from docs/verdicts/*.json; the rest of the page is kept.

    Raises:
        UserError: the page lacks its markers, or a verdict cannot be read.
    """
    page, sections = docs / "results.md", []
    for file in sorted((docs / "verdicts").glob("*.json")):
        try:
            sections.append(section(json.loads(file.read_text())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: is not a verdict ({type(error).__name__}: {error}); make it with python -m framework.claims"
            ) from error
    text = page.read_text() if page.is_file() else f"# Results\n\n{BEGIN}\n{END}\n"
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: lacks the lines {BEGIN!r} and {END!r}, between which the verdicts go")
    body = "\n".join(sections) if sections else "No claim has been judged yet.\n"
    replace_file(page, f"{head}{BEGIN}\n\n{body}\n{END}{tail}")
    return page


def main(argv: list[str] | None = None) -> int:
    """Run on `argv` (default: the command line) and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m framework.claims", description="Judge the claim of a sweep from its run folders.")
    parser.add_argument("sweep", nargs="?", type=Path, help="folder of the sweep (of the second stage, where there are two)")
    parser.add_argument("--publish", action="store_true", help="copy the verdict to docs/verdicts/ and rewrite docs/results.md")
    parser.add_argument("--results", action="store_true", help="rewrite the verdicts in docs/results.md from docs/verdicts/*.json")
    words = parser.parse_args(argv)
    if words.sweep is None and not words.results:
        parser.error("name the folder of a sweep, or give --results")
    try:
        if words.sweep is not None:
            say_verdict(words.sweep, words.publish)
        if words.results or words.publish:
            print(f"wrote {write_results()}")
    except UserError as error:
        return report(error)
    return 0


def say_verdict(sweep: Path, publish: bool) -> None:
    """Judge and print; publish: keep the verdict under docs/verdicts/ by the name of its experiment."""
    verdict = judge(sweep)
    if verdict is None:
        claims = [node for job in read_jobs(sweep) if (node := plain(job.config.get("claim")))]
        if not claims:
            raise UserError(f"{str(sweep)!r}: its runs carry no claim; run an experiment that has one (conf/experiment/)")
        for arm, found in first_stage(sweep, read_claim(claims[0])).items():
            edge = f" (at the edge of what was tried: {', '.join(found['at_edge'])})" if found["at_edge"] else ""
            print(f"first stage, {arm}: best of {len(found['points'])}: {found['best']}{edge}")
        print(f"a first stage is not judged; go on with the second one: stage_one={sweep}")
        return
    print("\n".join([*lines(verdict), f"wrote {sweep / VERDICT_FILE}"]))
    if publish:
        (DOCS / "verdicts").mkdir(parents=True, exist_ok=True)
        replace_file(DOCS / "verdicts" / f"{verdict['experiment']}.json", json.dumps(verdict, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
