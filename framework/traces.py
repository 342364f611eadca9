"""Decoding in several calls for tasks of generate.py: texts in, answers with the record of every call out, and what is said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console

from components.contracts import Completion, Prompt, SamplingParams
from components.decoding.rounds import Said, Traced
from components.evals.base import Row
from framework import decoding
from framework.engines import fitting
from framework.generate import Context
from framework.statistics import k_correct


def asked(
    context: Context, said: Sequence[Said], render: Callable[..., Prompt], max_new_tokens: int, stop: Sequence[str] = ()
) -> Iterator[tuple[int, Traced]]:
    """The context's decoding of texts or conversations: (index, answer with its record) as they are finished.

    A decoding of one call is made one of rounds, so that it draws the first sample of all others. stop: every call ends before these too.
    """
    params = dataclasses.replace(context.params, max_new_tokens=max_new_tokens)

    def drawn(tokens: int, seed: int) -> SamplingParams:
        return dataclasses.replace(params, max_new_tokens=tokens, seed=seed)

    method = context.method or decoding.OneCall(drawn)
    if stop:
        method = decoding.Stopped(method, stop)
    tokenizer, cost = (None, None) if (run := context.source) is None else (run.tokenizer, run.model.forward_flops)
    setting = decoding.setting_of(context.engine, tokenizer, render, params)
    return decoding.traced(method, said, context.engine, render, setting, cost)


def counted(context: Context, found: Iterable[tuple[int, Traced]]) -> Iterator[tuple[int, Completion]]:
    """The completions of answers of one call each, whose cost (see `decoding.usage_of`) is added to `context.spent`."""
    for index, answer in found:
        context.spent.update(answer.trace["usage"])
        yield index, answer.candidates[0] if answer.candidates else fitting.skipped(str(answer.stop_reason))  # nobody was asked


def figures_of(name: str, rows: Sequence[Row], console: Console) -> dict[str, float]:
    """What a decoding in several calls cost (decode/KEY, see `decoding.totals`), and `by_candidates`; {} for another one. Prints both."""
    traced = [row for row in rows if "trace" in row.record]
    if not traced:
        return {}
    figures = decoding.totals([row.record["trace"] for row in traced])
    keys = [key for key in ("calls", "completion_tokens", "processed_tokens", "flops") if f"decode/{key}" in figures]
    each = [f"{figures[f'decode/{key}'] / len(traced):,.4g} {key.replace('_', ' ')}" for key in keys]
    console.print(f"an answer took {', '.join(each)}", markup=False)
    answered = [row for row in traced if row.error is None]
    for measure in answered[0].values if answered else ():
        judged = [[one[measure] for one in row.record["candidates"]] for row in answered]
        final = [row.values[measure] for row in answered]
        if all(judged) and len({len(some) for some in judged}) == 1 and {*final, *(v for some in judged for v in some)} <= {0.0, 1.0}:
            found, words = by_candidates(f"{name}/{measure}", judged, final)
            figures |= found
            console.print(f"right answers by how many candidates were right, {measure.replace('_', ' ')}: {words}", markup=False)
    return figures


def by_candidates(name: str, judged: Sequence[Sequence[float]], final: Sequence[float]) -> tuple[dict[str, float], str]:
    """How often an answer is right, by its right candidates: figures and words.

    judged: for each item, 1 or 0 of each of its candidates; final: of its answer. Figures: NAME@k=K, share of right answers of the items
    with K right candidates; NAME@k=K_items, how many these are; NAME_pass: share of items with any right candidate, which no choice among
    them can exceed.
    """
    table = k_correct([[value == 1 for value in some] for some in judged], [value == 1 for value in final])
    known = [(k, items, right) for k, items, right in table if items]
    figures = {f"{name}@k={k}": right / items for k, items, right in known}
    figures |= {f"{name}@k={k}_items": float(items) for k, items, _ in known}
    return {**figures, f"{name}_pass": 1 - table[0][1] / len(judged)}, ", ".join(f"{k}: {right} of {items}" for k, items, right in known)
