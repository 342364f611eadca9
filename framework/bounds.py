"""Claims that bound figures instead of comparing arms by an interval: `test: bounds`, with a line of `require` for each bound.

A line {arm, metric, statistic, at_least | at_most} takes the metric of every seed of the arm and bounds their min, max, mean or median.
`minus: METRIC` subtracts another metric of the same run; `over: ARM` divides by the same seed's run of the arm: metric(over) / metric(arm).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from framework.signatures import nearest

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min, "max": max, "mean": statistics.fmean, "median": statistics.median,
}  # fmt: skip
KEYS = ("arm", "metric", "statistic", "at_least", "at_most", "minus", "over")


def problems(require: Any, arms: Any) -> Iterator[str]:
    """What is wrong with the list `claim.require`, one line each."""
    if not isinstance(require, list) or not require:
        yield f"claim.require: {require!r}; a list of {{arm, metric, statistic, at_least or at_most}}"
        return
    for index, line in enumerate(require):
        key = f"claim.require[{index}]"
        if not isinstance(line, dict):
            yield f"{key}: {line!r} is not a mapping with some of {', '.join(KEYS)}"
            continue
        yield from (f"{key}.{name}: unknown key{nearest(str(name), KEYS)}" for name in line if name not in KEYS)
        words = {name: line[name] for name in ("arm", "metric", "statistic", "minus", "over") if name in line}
        if wrong := [name for name, word in words.items() if not isinstance(word, str)]:
            yield from (f"{key}.{name}: {words[name]!r} is not a word" for name in wrong)
            continue
        yield from (f"{key}.{name}: no value given" for name in ("arm", "metric", "statistic") if not line.get(name))
        for name, allowed in (("arm", arms), ("over", arms), ("statistic", STATISTICS)):
            if line.get(name) and line[name] not in allowed:
                yield f"{key}.{name}: {line[name]!r} is not one of {', '.join(allowed)}{nearest(str(line[name]), allowed)}"
        bounds = [line[name] for name in ("at_least", "at_most") if name in line]
        if len(bounds) != 1 or isinstance(bounds[0], bool) or not isinstance(bounds[0], int | float) or not math.isfinite(bounds[0]):
            yield f"{key}: needs one of at_least and at_most, a number"
        if "minus" in line and "over" in line:
            yield f"{key}: minus and over exclude each other"


def subject(line: Mapping[str, Any]) -> str:
    """What a line bounds, in words: 'max of A - B, arm'."""
    what = f"{line['metric']} - {line['minus']}" if "minus" in line else line["metric"]
    whose = f"{line['over']} / {line['arm']}" if "over" in line else line["arm"]
    return f"{line['statistic']} of {what}, {whose}"


def check(line: Mapping[str, Any], seeds: Sequence[int], value: Callable[[str, int, str], float | None]) -> dict[str, Any]:
    """Take one line's figure and hold it against its bound.

    Args:
        value: (arm, seed, metric) -> final value, None where there is none.

    Returns:
        {what, values: {seed: x}, figure, bound, at_least, holds}; `fault` where a value is missing.
    """
    result: dict[str, Any] = {"what": subject(line), "arm": line["arm"], "metric": line["metric"], "values": {}}
    result |= {"at_least": "at_least" in line, "bound": line.get("at_least", line.get("at_most"))}
    for seed in seeds:
        first = value(line["arm"], seed, line["metric"])
        other = (
            value(line["over"], seed, line["metric"])
            if "over" in line
            else value(line["arm"], seed, line["minus"])
            if "minus" in line
            else 0.0
        )
        if first is None or other is None or ("over" in line and first == 0):
            return {**result, "fault": f"{line['metric']} of {line['arm']} seed {seed} is not there to take"}
        result["values"][str(seed)] = other / first if "over" in line else first - other
    figure = STATISTICS[line["statistic"]](list(result["values"].values()))
    holds = figure >= result["bound"] if result["at_least"] else figure <= result["bound"]
    return {**result, "figure": figure, "holds": holds}


def sentence(checked: Mapping[str, Any]) -> str:
    """One line in words."""
    if "fault" in checked:
        return f"{checked['what']}: {checked['fault']}"
    side = "at least" if checked["at_least"] else "at most"
    outcome = "holds" if checked["holds"] else "does not hold"
    each = ", ".join(f"{value:.4g}" for value in checked["values"].values())
    return f"{checked['what']}: {checked['figure']:.4g} (by seed {each}), {side} {checked['bound']:g} claimed: {outcome}"
