"""What tasks of train.py share that let trained runs answer problems with known solutions: the problems, and a run that is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from omegaconf import DictConfig

from components.contracts import Completion, Engine, SamplingParams, UserError
from components.decoding.rounds import Setting
from components.evals.problems import read_problems
from framework import decoding
from framework.build import build_data, load_run, read_config, run_folder
from framework.generate import run_renderer
from framework.procedure import Context

FORMS = (("prompt", "solution"), ("prompt", "completion"), ("question", "answer"))  # of the rows of a file of problems
MakeEngine = Callable[..., Engine]  # (model, tokenizer) -> engine
Problem = tuple[str, str]  # (prompt, solution)


class Reader(Protocol):
    """What a text answers, None for nothing, and whether two answers are one: an option of the group decode/read."""

    def read(self, text: str) -> str | None: ...
    def same(self, answer: str, other: str) -> bool: ...


class Remembering:
    """An engine that makes no completion twice. Its random numbers are counted: equal prompts and parameters give equal completions.

    So methods that begin with the same samples share them; what each of them costs is counted from its calls, not from the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.known = engine, dict[tuple[Any, ...], Completion]()
        self.context_length = getattr(engine, "context_length", None)

    def completions(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Iterator[tuple[int, Completion]]:
        keys = [(tuple(prompt), one) for prompt, one in zip(prompts, params, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        asked = [(list(prompt), one) for prompt, one in new]
        for place, completion in decoding.completions(self.engine, [prompt for prompt, _ in asked], [one for _, one in asked]):
            self.known[new[place]] = completion
        yield from ((i, self.known[key]) for i, key in enumerate(keys))


@dataclass(frozen=True)
class Speaker:
    """A run that can be asked. render: a text as the run reads it; cost: FLOPs of a token in a row of so many."""

    engine: Remembering
    render: decoding.Render
    setting: Setting
    cost: decoding.Cost


def speaker(path: str, make: MakeEngine, context: Context, max_new_tokens: int) -> Speaker:
    """The run at `path`, loaded onto the procedure's device. Raises UserError for what is no run."""
    run = load_run(path)
    cast(torch.nn.Module, run.model).to(context.device).eval()
    engine = Remembering(make(run.model, run.tokenizer))
    params, render = SamplingParams(max_new_tokens, seed=context.seed), run_renderer(run)
    return Speaker(engine, render, decoding.setting_of(cast(Engine, engine), run.tokenizer, render, params), run.model.forward_flops)


def own_run(config: DictConfig) -> str:
    """The run of `ckpt=`. Raises UserError where there is none."""
    if config.ckpt is None:
        raise UserError("ckpt: null; random weights answer nothing: ckpt=RUN_DIR")
    return str(config.ckpt)


def problems_of(source: Any, path: str | None, split: str, most: int | None) -> list[Problem]:
    """The first `most` (prompt, solution) of a file, else of a data option. Raises UserError where there are none."""
    if path is not None:
        found = read_problems("task.problems", path, FORMS, most)
        return [(one.fields["prompt"], one.fields["solution"]) for one in found]
    if not hasattr(source, "problems"):
        name = type(source).__name__
        raise UserError(f"data: {name} has no problems with solutions; take data=reasoning, or give task.problems=FILE.jsonl")
    return source.problems(split)[:most]


def learned(path: str) -> set[str]:
    """Prompts that the run at `path` was trained on; none where its data cannot say so."""
    data = build_data(read_config(run_folder(Path(path))))
    return {prompt for prompt, _ in data.problems("train")} if hasattr(data, "problems") else set()


def is_right(reader: Reader, completion: Completion, solution: str) -> bool:
    """Did the answer end by itself, and say what the solution says?"""
    said, known = reader.read(completion.text), reader.read(solution)
    return completion.finish_reason == "stop" and said is not None and known is not None and reader.same(said, known)
