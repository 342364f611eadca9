"""Claims that bound figures instead of comparing arms by an interval: `test: bounds`, with a line of `require` for each bound.

A line {arm, metric, statistic, at_least | at_most} takes the metric of every seed of the arm and bounds their min, max, mean or median.
`minus: METRIC` subtracts another metric of the same run; `over: ARM` divides by the same seed's run of the arm: metric(over) / metric(arm).
A list of arms in place of one stands for the spread of the metric over them, largest less smallest, with the same seed.
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
        several = [name for name in ("arm", "over") if isinstance(line.get(name), list) and len(line[name]) > 1]
        if wrong := [name for name, word in words.items() if not isinstance(word, str) and name not in several]:
            yield from (f"{key}.{name}: {words[name]!r} is not a word" for name in wrong)
            continue
        yield from (f"{key}.{name}: no value given" for name in ("arm", "metric", "statistic") if not line.get(name))
        for name, allowed in (("arm", arms), ("over", arms), ("statistic", STATISTICS)):
            for word in line[name] if name in several else [line[name]] if line.get(name) else []:
                if word not in allowed:
                    yield f"{key}.{name}: {word!r} is not one of {', '.join(allowed)}{nearest(str(word), allowed)}"
        bounds = [line[name] for name in ("at_least", "at_most") if name in line]
        if len(bounds) != 1 or isinstance(bounds[0], bool) or not isinstance(bounds[0], int | float) or not math.isfinite(bounds[0]):
            yield f"{key}: needs one of at_least and at_most, a number"
        if "minus" in line and ("over" in line or "arm" in several):
            yield f"{key}: minus excludes over, and a list of arms"


def subject(line: Mapping[str, Any]) -> str:
    """What a line bounds, in words: 'max of A - B, arm'."""
    what = f"{line['metric']} - {line['minus']}" if "minus" in line else line["metric"]
    arm, over = (f"spread over {', '.join(names)}" if isinstance(names, list) else names for names in (line["arm"], line.get("over")))
    whose = f"({over}) / ({arm})" if isinstance(line.get("over"), list) else f"{over} / {arm}" if over else arm
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
        first = _of_arms(line["arm"], seed, line["metric"], value)
        other = (
            _of_arms(line["over"], seed, line["metric"], value)
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


def _of_arms(arms: str | list[str], seed: int, metric: str, value: Callable[[str, int, str], float | None]) -> float | None:
    """The metric of an arm, or its spread over several."""
    if isinstance(arms, str):
        return value(arms, seed, metric)
    values = [value(arm, seed, metric) for arm in arms]
    return None if None in values else max(values) - min(values)  # type: ignore[type-var, operator]


def sentence(checked: Mapping[str, Any]) -> str:
    """One line in words."""
    if "fault" in checked:
        return f"{checked['what']}: {checked['fault']}"
    side = "at least" if checked["at_least"] else "at most"
    outcome = "holds" if checked["holds"] else "does not hold"
    each = ", ".join(f"{value:.4g}" for value in checked["values"].values())
    return f"{checked['what']}: {checked['figure']:.4g} (by seed {each}), {side} {checked['bound']:g} claimed: {outcome}"
