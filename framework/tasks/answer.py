"""Option task=answer: prompts on the terminal, or a file of them into another."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from rich.console import Console

from components.adapters.base import task_ids
from components.contracts import Completion, Prompt, UserError
from components.decoding.rounds import seed_of
from framework import decoding
from framework.build import build_data
from framework.decoding import query_ids
from framework.engines.fitting import figures, words
from framework.generate import Context, completions, measures, new_file, progress_bar, renderer, summary, tell, tokens_of
from framework.prompts import Request, held_out_prompt, read_requests
from framework.traces import asked


class Answer:
    """Complete one prompt on the terminal while it is written, or every line of a JSONL file into another.

    Args:
        prompt: text to go on with; None with no `prompts`: the beginning of a held-out document of the run's own data.
        prompts: a JSONL file; see `read_requests`.
        output: JSONL file to write, never one that has content already; None: generations.jsonl in the output folder.
        n: answers to every prompt.

    A run that was trained on conversations gets every prompt as the user's turn. With a decoding of several calls an answer is shown or
    written when it is complete: each with all its calls, in traces.jsonl.
    """

    asks_in_rounds = True
    heeds_too_long = True

    def __init__(self, prompt: str | int | float | bool | None, prompts: str | None, output: str | None, n: int) -> None:
        if n < 1:
            raise UserError(f"n: {n}; at least 1 is allowed")
        if prompt is not None and prompts is not None:
            raise UserError(f"prompt: {prompt!r} and prompts={prompts!r} exclude each other; drop one")
        if output is not None and prompts is None:
            raise UserError(f"output: {output!r} needs prompts=FILE.jsonl; a single prompt is answered on the terminal")
        self.prompt = None if prompt is None else str(prompt)
        self.requests = None if prompts is None else read_requests(Path(prompts))
        self.output, self.n = output, n

    def run(self, context: Context) -> dict[str, float]:
        """Answer and return the measures."""
        if context.method is not None:
            return self._in_rounds(context)
        if self.requests is None:
            return self._on_terminal(context)
        return self._into_file(self.requests, context)

    def _on_terminal(self, context: Context) -> dict[str, float]:
        """Text goes to stdout, everything said about it to stderr."""
        notes = Console(stderr=True, highlight=False, soft_wrap=True)
        render, asked = renderer(context), self.prompt
        if asked is None:
            ids, source = default_prompt(context, render)
            shown = context.run.tokenizer.decode(cast(list[int], ids))
            notes.print(f"no prompt given (prompt='...' takes yours); going on with {source}", style="dim", markup=False)
        else:
            ids = render(asked)
            shown = "" if getattr(render, "chat", False) else asked
        before, started = tokens_of(context.engine), time.perf_counter()
        for sample in range(self.n):
            if self.n > 1:
                notes.print(f"--- {sample + 1} of {self.n}", style="dim")
            Console(highlight=False, soft_wrap=True).print(shown, style="bold", end="", markup=False)
            for piece in context.engine.pieces(ids, dataclasses.replace(context.params, seed=context.params.seed + sample)):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
        metrics = measures(tokens_of(context.engine) - before, time.perf_counter() - started, self.n)
        tell(notes, words(figures(context.engine)))
        notes.print(summary(metrics, context), style="dim", markup=False)
        return metrics

    def _into_file(self, requests: list[Request], context: Context) -> dict[str, float]:
        """Answers in the order of the requests, each written as soon as those before it are."""
        render = renderer(context)
        prompts = [render(request.given, where=request.where) for request in requests for _ in range(self.n)]
        names = query_ids([request.given for request in requests])  # so the first sample is that of decodings in several calls
        seeds = [seed_of(context.params.seed, name, "sample", sample) for name in names for sample in range(self.n)]
        params = [dataclasses.replace(context.params, seed=seed) for seed in seeds]
        path = Path(self.output) if self.output is not None else context.out_dir / "generations.jsonl"
        tokens, started = 0, time.perf_counter()
        notes, errors = Console(stderr=True, highlight=False, soft_wrap=True), list[str]()
        with new_file(path) as file, progress_bar(notes) as bar:
            job = bar.add_task("answers", total=len(prompts), rate="")
            waiting: dict[int, str] = {}
            written = 0
            for index, completion in completions(context.engine, prompts, params):
                tokens += len(completion.token_ids)
                errors += [str(completion.stop_reason)] if completion.finish_reason == "error" else []
                seconds = time.perf_counter() - started
                waiting[index] = json.dumps(record(requests[index // self.n], index % self.n, completion, seconds), ensure_ascii=False)
                while written in waiting:
                    file.write(waiting.pop(written) + "\n")
                    written += 1
                file.flush()
                bar.update(job, advance=1, rate=f"{tokens / seconds:.0f} tokens/s")
        metrics = measures(tokens, time.perf_counter() - started, len(prompts)) | {"errors": float(len(errors))}
        done = figures(context.engine)
        notes.print(f"{len(prompts) - len(errors) - done.get('prompts_skipped', 0):.0f} answers in {path}", markup=False)
        if errors:
            told = f"{len(errors)} of {len(prompts)} could not be had and are in the file with their error; the first: {errors[0]}"
            if len(errors) == len(prompts):
                raise UserError(f"engine: {told}")
            notes.print(told, style="bold", markup=False)
        tell(notes, words(done))
        notes.print(summary(metrics, context), style="dim", markup=False)
        return metrics

    def _in_rounds(self, context: Context) -> dict[str, float]:
        """A single answer goes to stdout; the record of all calls of each into traces.jsonl, or `output`, as they are finished.

        Raises: UserError for n above 1, no question, and a file that has content.
        """
        if self.n > 1:
            raise UserError(f"n: {self.n}; this decoding makes one answer from several calls (decode.n); drop n")
        render, requests = renderer(context), self.requests
        if requests is None:
            if self.prompt is None:
                raise UserError("prompt: null; a decoding of several calls needs a question: prompt='...' or prompts=FILE.jsonl")
            requests = [Request(0, self.prompt, "prompt")]
        for request in requests:
            render(request.given, where=request.where)  # what cannot be read leaves no file
        notes = Console(stderr=True, highlight=False, soft_wrap=True)
        path = Path(self.output) if self.output is not None else context.out_dir / "traces.jsonl"
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
        sums = decoding.totals(records)
        metrics = {**measures(sums["decode/completion_tokens"], time.perf_counter() - started, len(requests)), **sums}
        if self.requests is None:
            sys.stdout.write(records[0]["text"] + "\n")
        tell(notes, words(figures(context.engine)))
        if failures := sum(one["finish_reason"] == "error" for one in records):
            notes.print(f"{failures} answer(s) failed; the reason stands at `error`", markup=False)
        notes.print(f"{len(requests)} answer(s), {sums['decode/calls']:.0f} calls; every call is in {path}", markup=False)
        notes.print(summary(metrics, context), style="dim", markup=False)
        return metrics


def default_prompt(context: Context, render: Callable[..., Prompt]) -> tuple[Prompt, str]:
    """Prompt ids that suit the run, and where they are from: its own sample prompt, else the beginning of its held-out data."""
    run = context.run
    own = OmegaConf.select(run.cfg, "samples.prompt")
    if own is not None:
        return render(str(own)), "the run's own samples.prompt"
    try:
        data = build_data(run.cfg)
        data.prepare(context.cache_dir, run.tokenizer)
        holder = task_ids(run.model)
        name = holder.names[holder.index(context.task)] if holder is not None and context.task is not None else None
        return held_out_prompt(data, name), "the beginning of its held-out text"
    except UserError as error:
        return [run.tokenizer.eot_id], f"nothing but a document start, since the run's data cannot be read ({error})"


def record(request: Request, sample: int, completion: Completion, seconds: float) -> dict[str, Any]:
    """One line of the output. logprob: of the whole answer, stop token included; None where the engine says none.

    seconds: since generation began. error: why there is no answer, where there is none. prompt_cut: tokens that the prompt lost.
    """
    return {
        "id": request.id,
        "sample": sample,
        "prompt": request.given,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "logprob": sum(completion.logprobs) if completion.logprobs else None,
        "finish_reason": completion.finish_reason,
        **({"error": completion.stop_reason} if completion.finish_reason in ("error", "skipped") else {}),
        "prompt_cut": completion.prompt_cut,
        "tokens": len(completion.token_ids),
        "seconds": round(seconds, 3),
    }
