"""Option task=compare: runs answer the same problems in several ways of decoding, at their cost; by right candidates, and pairs tested."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from components.contracts import Completion, UserError
from components.decoding.rounds import Traced
from framework import decoding
from framework.answering import MakeEngine, Problem, Reader, Speaker, is_right, own_run, problems_of, speaker
from framework.build import read_config
from framework.parts import Parts
from framework.procedure import Context, Procedure, refuse_unheard
from framework.runs import replace_file
from framework.signatures import nearest
from framework.statistics import mcnemar, paired_bootstrap

COSTS = ("calls", "rounds", "prompt_tokens", "completion_tokens", "processed_tokens", "flops")  # of usage_of, means over the problems


@dataclass
class Way:
    """What one way of answering came to, by problem. candidates: which of those it was made from are right; costs: means of a problem."""

    right: list[bool]
    candidates: list[list[bool]]
    unparsed: int
    cut_off: int
    costs: dict[str, float]
    traces: list[dict[str, Any]]
    n: int | None = None  # samples, where they were chosen

    @property
    def accuracy(self) -> float:
        return share(self.right)


class Compare(Procedure):
    """Lets the run of `ckpt=`, and others, answer the same problems in all `ways`. Equal calls are made once, so ways share their samples.

    An answer that was cut off, or says nothing that can be read, is wrong; both are counted. Of each way WAY/results.jsonl holds every
    problem with all calls, as `python -m framework.decoding_report WAY_DIR ...` reads it.

    Args:
        ways: {NAME: an option of the group decode}. runs: {NAME: RUN_DIR} besides that of `ckpt=`. of: {WAY: name in runs}; a way that is
            left out is the own run's.
        equal_tokens: {WAY: REFERENCE}. WAY has the fewest samples with which it reads and writes at least as many tokens as REFERENCE did,
            counted over all problems (processed_tokens: a prompt that samples share counts once); the n that it says itself is not used.
        by: a way with candidates; problems are put into groups by how many of its candidates are right, and all ways measured in each.
        pairs: [FIRST, SECOND] of ways to be tested against each other.
        problems: JSONL file of {prompt, solution} or {question, answer}; None: those of the data, of `split`. most_problems: the first so
            many. read: how answers are compared. engine: of every run. max_new_tokens: of a call.

    Metrics: WAY/n of `equal_tokens`; WAY/accuracy, WAY/unparsed, WAY/cut_off, WAY/pass (any candidate is right); WAY/COST of a problem for
    each of COSTS; WAY/accuracy@k=K and problems@k=K by the groups of `by`; WAY/fresh@k=K, share of right candidates beyond as many as `by`
    has, which its groups do not depend on; FIRST-SECOND/points (share of problems), /low and /high (paired bootstrap, 95 %), /won, /lost
    and /p (McNemar).
    Raises: UserError for no run or problems, names that are not there, and values out of range.
    """

    def __init__(
        self, ways: dict[str, Any], runs: dict[str, str], of: dict[str, str], equal_tokens: dict[str, str], by: str, pairs: list[list[str]],
        problems: str | None, split: Literal["train", "val"], most_problems: int | None, read: Reader, engine: MakeEngine,
        max_new_tokens: int,
    ) -> None:  # fmt: skip
        for key, value in (("most_problems", most_problems), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise UserError(f"task.{key}: {value}; at least 1 is allowed")
        if not ways:
            raise UserError("task.ways: {}; give at least one: task.ways={NAME: {...}}, an option of the group decode")
        self.ways = {name: way if hasattr(way, "answer") else decoding.OneCall(way.params) for name, way in ways.items()}
        for way, run in of.items():
            known("task.of", way, ways), known(f"task.of.{way}", run, runs)
        for way, reference in equal_tokens.items():
            known("task.equal_tokens", way, ways), known(f"task.equal_tokens.{way}", reference, ways)
            if not (hasattr(ways[way], "with_samples") and "n" in inspect.signature(type(ways[way])).parameters):
                raise UserError(f"task.equal_tokens: {way} has no number of samples (n) that could be chosen")
            if reference in equal_tokens:
                raise UserError(f"task.equal_tokens.{way}: the samples of {reference} are chosen too; name a way that says its own")
        for pair in pairs:
            if len(pair) != 2:
                raise UserError(f"task.pairs: {pair}; two names of ways are allowed in a pair")
            for name in pair:
                known("task.pairs", name, ways)
        self.runs, self.of, self.by, self.pairs = runs, of, known("task.by", by, ways), pairs
        self.equal_tokens = equal_tokens
        self.problems, self.split, self.most_problems = problems, split, most_problems
        self.reader, self.make_engine, self.max_new_tokens = read, engine, max_new_tokens

    def check(self, config: DictConfig, parts: Parts) -> None:
        own_run(config)

    def run(self, context: Context) -> dict[str, float]:
        """Answer, write; returns the metrics."""
        config = read_config(context.run_dir)
        refuse_unheard(config)
        asked = problems_of(context.data, self.problems, self.split, self.most_problems)
        paths = {"": own_run(config), **self.runs}
        speakers = {name: speaker(path, self.make_engine, context, self.max_new_tokens) for name, path in paths.items()}
        found: dict[str, Way] = {}
        for step, name in enumerate(sorted(self.ways, key=lambda name: name in self.equal_tokens)):  # after what they are measured by
            method, who, reference = self.ways[name], speakers[self.of.get(name, "")], self.equal_tokens.get(name)
            if reference is None:
                way = self.answered(method, asked, who, context)
            else:
                way = self.as_many_tokens(method, found[reference].costs["processed_tokens"], asked, who, context)
                context.progress(f"{name}: n={way.n} is the least that reads and writes as many tokens as {reference}")
            found[name] = way
            self.write(name, way, asked, context.run_dir)
            context.log({f"{name}/accuracy": way.accuracy}, step)
            cost = ", ".join(f"{way.costs[key]:,.4g} {key.replace('_', ' ')}" for key in COSTS if key in way.costs)
            context.progress(f"{name}: {100 * way.accuracy:.2f} % of {len(asked)} right; a problem took {cost}")
        metrics = {key: value for name in self.ways for key, value in figures_of(name, found[name]).items()}
        metrics |= by_candidates(found, self.by)
        for first, second in self.pairs:
            metrics |= compared(f"{first}-{second}", found[first].right, found[second].right, context)
        return {"problems": float(len(asked)), **metrics}

    def answered(self, method: Any, asked: Sequence[Problem], who: Speaker, context: Context) -> Way:
        """All problems in one way."""
        answers: list[Traced | None] = [None] * len(asked)
        for index, answer in decoding.traced(method, [prompt for prompt, _ in asked], who.engine, who.render, who.setting, who.cost):  # type: ignore[arg-type]
            answers[index] = answer
            context.progress()
        done = [answer for answer in answers if answer is not None]

        def right(completion: Completion, index: int) -> bool:
            return is_right(self.reader, completion, asked[index][1])

        usages = [answer.trace["usage"] for answer in done]
        return Way(
            [right(answer, i) for i, answer in enumerate(done)],
            [[right(one, i) for one in answer.candidates] for i, answer in enumerate(done)],
            sum(self.reader.read(answer.text) is None for answer in done),
            sum(answer.finish_reason == "length" for answer in done),
            {key: math.fsum(usage[key] for usage in usages) / len(usages) for key in COSTS if all(key in usage for usage in usages)},
            [answer.trace for answer in done],
        )

    def as_many_tokens(self, method: Any, tokens: float, asked: Sequence[Problem], who: Speaker, context: Context) -> Way:
        """The way with the fewest samples that processes at least so many tokens a problem. Samples of a smaller n are not drawn again."""
        tried: dict[int, Way] = {}

        def cost(n: int) -> float:
            if n not in tried:
                tried[n] = replace(self.answered(method.with_samples(n), asked, who, context), n=n)
            return tried[n].costs["processed_tokens"]

        n = method.least
        while (spent := cost(n)) < tokens:
            n += max(1, int((tokens - spent) / (spent / n)))  # a shared prompt is in spent / n, so that this rarely goes too far
        while n > method.least and cost(n - 1) >= tokens:
            n -= 1
        return tried[n]

    def write(self, name: str, way: Way, asked: Sequence[Problem], run_dir: Path) -> None:
        """NAME/results.jsonl and NAME/metrics.json, in the form of task=evaluate."""
        folder = run_dir / name
        folder.mkdir(exist_ok=True)
        lines = []
        for i, ((prompt, solution), right, trace) in enumerate(zip(asked, way.right, way.traces, strict=True)):
            row = {"task": "compare", "score": float(right), "problem": i, "asked": prompt, "expected": solution, "got": trace["text"]}
            if way.candidates[i]:
                row["candidates"] = [{"score": float(one)} for one in way.candidates[i]]
            lines.append(json.dumps({**row, "trace": trace}, ensure_ascii=False) + "\n")
        replace_file(folder / "results.jsonl", "".join(lines))
        costs = {f"decode/{key}": value * len(asked) for key, value in way.costs.items()}
        replace_file(folder / "metrics.json", json.dumps({"accuracy": way.accuracy, **costs}, indent=2) + "\n")


def known(key: str, name: str, names: Mapping[str, Any]) -> str:
    """The name, if it is one. Raises UserError."""
    if name not in names:
        raise UserError(f"{key}: {name!r} is not one of {', '.join(names) or '(none)'}{nearest(name, names)}")
    return name


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def figures_of(name: str, way: Way) -> dict[str, float]:
    """Metrics of one way."""
    found = {"accuracy": way.accuracy, "unparsed": float(way.unparsed), "cut_off": float(way.cut_off), **way.costs}
    if way.n is not None:
        found["n"] = float(way.n)
    if all(way.candidates):
        found["pass"] = share([any(some) for some in way.candidates])
    return {f"{name}/{key}": value for key, value in found.items()}


def by_candidates(ways: Mapping[str, Way], by: str) -> dict[str, float]:
    """Accuracy of all ways in the groups of problems with K right candidates of the way `by`, and of candidates beyond these."""
    groups: dict[int, list[int]] = {}
    for i, some in enumerate(ways[by].candidates):
        groups.setdefault(sum(some), []).append(i)
    shown = max(len(some) for some in ways[by].candidates)
    figures: dict[str, float] = {}
    for k, places in sorted(groups.items()):
        figures[f"problems@k={k}"] = float(len(places))
        for name, way in ways.items():
            figures[f"{name}/accuracy@k={k}"] = share([way.right[i] for i in places])
            if fresh := [one for i in places for one in way.candidates[i][shown:]]:
                figures[f"{name}/fresh@k={k}"] = share(fresh)
    return figures


def compared(name: str, first: Sequence[bool], second: Sequence[bool], context: Context) -> dict[str, float]:
    """Both tests of a pair."""
    difference, low, high = paired_bootstrap(first, second)
    won, lost, p = mcnemar(first, second)
    context.progress(f"{name}: {100 * difference:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}], won {won}, lost {lost}, p {p:.3g}")
    found = {"points": difference, "low": low, "high": high, "won": float(won), "lost": float(lost), "p": p}
    return {f"{name}/{key}": value for key, value in found.items()}
