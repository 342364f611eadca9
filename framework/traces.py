"""Decoding in several calls for tasks of generate.py: texts in, answers with the record of every call out, and what is said of them."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from components.contracts import Completion, Prompt, SamplingParams, UserError
from components.decoding.rounds import Said, Traced
from components.evals.base import Row
from framework import decoding
from framework.engines import fitting
from framework.generate import Answer, Context, Request, measures, new_file, progress_bar, renderer, summary
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


def answer_in_rounds(task: Answer, context: Context) -> dict[str, float]:
    """A single answer goes to stdout; the record of all calls of each into traces.jsonl, or `output`, as they are finished.

    Raises: UserError for n above 1, no question, and a file that has content.
    """
    if task.n > 1:
        raise UserError(f"n: {task.n}; this decoding makes one answer from several calls (decode.n); drop n")
    render, requests = renderer(context), task.requests
    if requests is None:
        if task.prompt is None:
            raise UserError("prompt: null; a decoding of several calls needs a question: prompt='...' or prompts=FILE.jsonl")
        requests = [Request(0, task.prompt, "prompt")]
    for request in requests:
        render(request.given, where=request.where)  # what cannot be read leaves no file
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    path = Path(task.output) if task.output is not None else context.out_dir / "traces.jsonl"
    started, records = time.perf_counter(), list[dict[str, Any]]()
    found = asked(context, [request.given for request in requests], render, context.params.max_new_tokens)
    with new_file(path) as file, progress_bar(notes) as bar:
        job = bar.add_task("answers", total=len(requests), rate="")
        for index, answer in found:
            records.append(answer.trace)
            line = {**answer.trace, "id": requests[index].id, "query": answer.trace["id"], "engine": context.engine.engine_id}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(job, advance=1)
    figures = decoding.totals(records)
    metrics = {**measures(figures["decode/completion_tokens"], time.perf_counter() - started, len(requests)), **figures}
    if task.requests is None:
        sys.stdout.write(records[0]["text"] + "\n")
    if long := fitting.words(fitting.figures(context.engine)):
        notes.print(long, style="bold", markup=False)
    if failures := sum(record["finish_reason"] == "error" for record in records):
        notes.print(f"{failures} answer(s) failed; the reason stands at `error`", markup=False)
    notes.print(f"{len(requests)} answer(s), {figures['decode/calls']:.0f} calls; every call is in {path}", markup=False)
    notes.print(summary(metrics, context), style="dim", markup=False)
    return metrics


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
