"""What generate.py does once the configuration is composed: load a run, build an engine round it, let the task answer."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from components.adapters.base import by_token, merge, task_ids, tasks_to_say
from components.contracts import Completion, Decoding, Diagnostics, Engine, Prompt, SamplingParams, UserError
from components.decoding.rounds import Method, seed_of
from components.decoding.sampling import check_params
from framework.build import ConfigErrors, Run, build, build_data, load_run
from framework.decoding import query_ids
from framework.engines.building import takes
from framework.engines.fitting import Policy, figures, fitted, words
from framework.inherit import resolve_checkpoint
from framework.kept import adapters_beside, put_on
from framework.prompts import Renderer, Request, held_out_prompt, read_requests
from framework.runtime import prepare_process
from framework.signatures import ALLOWED, describe, fits, locate, nearest_literal

ASKS = {"prompt": None, "prompts": None, "output": None, "n": 1}  # keys of some tasks, and what they are when nothing is asked
ANSWER_TOKENS = 128  # max_new_tokens where nobody says it
KEYS: dict[str, Any] = {"max_new_tokens": int, "device": str, "too_long": Policy, "adapter": dict[str, Any]}
ADAPTER_KEYS: dict[str, Any] = {"task": str | int | None, "merge": bool}


class Executor(Protocol):
    """An option of the group `executor`. in_process: the engine is built round the model that this process holds."""

    in_process: bool

    def engine(self, config: DictConfig, run: Run | None, cache_dir: Path) -> Engine:
        """The engine that a task works with. config: that of generate.py, of which `run` was opened. Raises what `build_engine` raises."""
        ...


@dataclass
class Context:
    """What a task of generate.py works with.

    source: the run, None where a server is asked without one; params: how to decode; out_dir: where files go; another: the same with
    another run; task: of the adapter, None where none was named; method: how to decode in several calls, None for one; how: the node
    `decode` that it was made from; spent: what an evaluation's answers of one call cost.
    """

    source: Run | None
    engine: Engine
    params: SamplingParams
    out_dir: Path
    cache_dir: Path
    another: Callable[[str], Context]
    task: str | int | None = None
    method: Method | None = None
    how: dict[str, Any] = field(default_factory=dict)
    spent: Counter[str] = field(default_factory=Counter)

    @property
    def run(self) -> Run:
        """The run. Raises UserError where there is none."""
        if self.source is None:
            raise UserError("ckpt: null, and the engine answers without a run; what is asked here needs one: ckpt=RUN_DIR")
        return self.source


def generate(config: DictConfig, out_dir: Path) -> dict[str, float]:
    """Run one generation; returns and writes (metrics.json) tokens, seconds, perf/tokens_per_second and the like.

    Raises:
        UserError: no run, an unreadable or unsuitable one, bad prompts, an output that cannot be written.
    """
    check_keys(config)
    prepare_process(config.seed)
    how = build(config.decode)
    params, method = how.params(config.max_new_tokens, config.seed), how if hasattr(how, "answer") else None
    check_params(params)
    task, cache_dir = build(config.task), Path(config.paths.cache_dir)
    if method is not None and not getattr(task, "asks_in_rounds", False):
        raise UserError("decode: this option asks several times for one answer, which this task does not; take decode=sample or greedy")
    if config.too_long != "error" and not getattr(task, "heeds_too_long", False):
        raise UserError(f"too_long: {config.too_long!r}; this task does not look at it; drop it")
    executor, every_task = build(config.executor), getattr(task, "asks_every_task", False)
    if not executor.in_process and (every_task or getattr(task, "endless", False)):
        raise UserError("executor: this task works with a model in its own process; take executor=local")
    place = config.device if executor.in_process else "cpu"
    needless = config.ckpt is None and takes(config.engine, config.allow_targets) == "tokenizer"
    run = None if needless else open_run(config, place, every_task)

    def engine_of(of: DictConfig, source: Run | None) -> Engine:
        engine: Engine = executor.engine(of, source, cache_dir)
        opened.callback(engine.close)
        return fitted(engine, config.too_long, None if source is None else source.tokenizer)

    def another(path: str) -> Context:
        own = copy.deepcopy(config)
        own.ckpt, own.rope, own.adapter.merge = path, {"switch": None}, False  # as it was trained
        other = load_run(resolve_checkpoint(path, Path(config.paths.root), cache_dir))
        if tasks_to_say(other.model):
            choose_task(other, config.adapter.task, False)
        else:
            own.adapter.task = None
        cast(torch.nn.Module, other.model).to(device(place))
        return dataclasses.replace(context, source=other, engine=engine_of(own, other))

    node = cast(dict[str, Any], OmegaConf.to_container(config.decode, resolve=True))
    with ExitStack() as opened:
        context = Context(run, engine_of(config, run), params, out_dir, cache_dir, another, config.adapter.task, method, node)
        metrics = task.run(context)
        metrics = {**figures(context.engine), **metrics}
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "metrics.json").write_text(json.dumps({**metrics, "seed": config.seed, "engine": context.engine.engine_id}, indent=2) + "\n")
    return metrics


def open_run(config: DictConfig, place: str, asks_every_task: bool = False) -> Run:
    """The run of `ckpt=` as the keys of generate.yaml want it. place: a value of the key `device`."""
    path = resolve_checkpoint(config.ckpt, Path(config.paths.root), Path(config.paths.cache_dir))
    another_rule = "_target_" in config.rope
    run = load_run(path, {"rope": config.rope if another_rule else None})
    if beside := adapters_beside(config.ckpt):
        config.adapter.task = put_on(run, config.ckpt, beside, config.adapter.task)
    if not another_rule and config.rope.switch is not None:
        switch_rope(run.model, config.rope.switch)
    choose_task(run, config.adapter.task, asks_every_task)
    if config.adapter.merge and not merge(cast(torch.nn.Module, run.model), config.adapter.task)["modules"]:
        raise UserError(f"adapter.merge: true, but {run.path} was trained without an adapter; drop the override")
    cast(torch.nn.Module, run.model).to(device(place))
    return run


def choose_task(run: Run, task: str | int | None, asks_every_task: bool) -> None:
    """Let the task `adapter.task` of the run's adapter speak; asks_every_task: what is run chooses by itself.

    Raises:
        UserError: a task that the adapter does not have, or none named where there are several.
    """
    holder = task_ids(run.model)
    names = holder.names if holder is not None else ()
    if task is not None:
        if holder is None or not names:
            raise UserError(f"adapter.task: {task!r}, but {run.path} was trained without an adapter that has tasks; drop the override")
        chosen = holder.index(task)
        if chosen >= 0 and by_token(run.model):
            raise UserError(
                f"adapter.task: {task!r}, but the adapter of {run.path} weighs its parts by the token, whatever the task; drop the override"
            )
        holder.set(chosen)
    elif (several := tasks_to_say(run.model)) and not asks_every_task:
        raise UserError(
            f"adapter.task: null, and the adapter of {run.path} has {len(several)} tasks; say which: adapter.task={' | '.join(several)}"
        )


def switch_rope(model: Any, switch: str) -> None:
    """Decode with another `rope.switch` than the run's own. Raises UserError where there is nothing to switch between."""
    spec = getattr(model, "rope_spec", None)
    if spec is None or not spec.bounds:
        raise UserError(f"rope.switch: {switch!r}, but the run's RoPE rule has no second regime; drop the override")
    model.set_rope(spec.switched(switch))


def check_keys(config: DictConfig) -> None:
    """Check the keys that belong to no class; all problems at once."""
    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    lines = [
        f"{key}: {values[key]!r} is not {describe(hint)}{nearest_literal(values[key], hint)}"
        for key, hint in KEYS.items()
        if not fits(values[key], hint)
    ]
    if not lines:
        own, hints = values["adapter"], ADAPTER_KEYS
        lines += [f"adapter.{key}: unknown key; its keys are {' and '.join(hints)}" for key in own if key not in hints]
        lines += [f"adapter.{key}: {own[key]!r} is not {describe(hints[key])}" for key in hints if not fits(own.get(key), hints[key])]
    if values["eval"] is not None and "evaluation" not in values["task"]:
        lines.append("eval: this task measures nothing; add task=evaluate, or drop eval")
    unheard = [key for key, nothing in ASKS.items() if values[key] != nothing and key not in values["task"]]
    lines += [f"{key}: {values[key]!r}; this task does not look at it; drop it" for key in unheard]
    if values["max_new_tokens"] != ANSWER_TOKENS:
        own = [part for part in ("eval", "task") if "max_new_tokens" in (values[part] or {})]
        lines += [f"max_new_tokens: {values['max_new_tokens']}; here {part}.max_new_tokens bounds an answer; set that one" for part in own]
    if lines:
        raise ConfigErrors(lines)


def device(name: str) -> torch.device:
    """The device that the key `device` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r}; auto, cpu, cuda or cuda:NUMBER is allowed") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name!r}, but {torch.cuda.device_count()} CUDA devices were found; use device=cpu")
    return chosen


class Answer:
    """Option task=answer: complete one prompt on the terminal while it is written, or every line of a JSONL file into another.

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
            from framework.traces import answer_in_rounds

            return answer_in_rounds(self, context)
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


def tell(console: Console, line: str) -> None:
    """Say what must not be overlooked, if it is anything."""
    if line:
        console.print(line, style="bold", markup=False)


def as_given(given: str | list[dict[str, str]], where: str = "prompt") -> Prompt:
    """The prompt of an engine without a run: its server knows how to read it."""
    return given


def renderer(context: Context) -> Callable[..., Prompt]:
    """What turns a given prompt into the engine's."""
    return as_given if context.source is None else run_renderer(context.source)


def run_renderer(run: Run) -> Renderer:
    """The renderer of a run's prompts. Its data may be gone: rendering needs the tokenizer only."""
    data = build_data(run.cfg) if hasattr(locate(run.cfg.data._target_, (*ALLOWED, *run.cfg.allow_targets)), "render") else None
    return Renderer(run.tokenizer, data)


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


def completions(engine: Engine, prompts: Sequence[Prompt], params: Decoding) -> Iterator[tuple[int, Completion]]:
    """(index, completion) as they are finished where the engine can say so, else all at the end."""
    if hasattr(engine, "completions"):
        yield from engine.completions(prompts, params)
    else:
        yield from enumerate(engine.generate(prompts, params))


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


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Open a file that does not exist yet, or is empty, for writing.

    Raises:
        UserError: it has content that would be lost, or it cannot be written.
    """
    if path.is_file() and path.stat().st_size:
        raise UserError(f"output: {str(path)!r} has content already; choose another name or remove it")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"output: {str(path)!r} cannot be written ({error.strerror or error})") from error
        yield file


def progress_bar(console: Console) -> Progress:
    """A bar on stderr; nothing where that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def tokens_of(engine: Engine) -> float:
    """Tokens that the engine has generated so far; 0 where it does not say."""
    return engine.diagnostics().get("tokens", 0.0) if isinstance(engine, Diagnostics) else 0.0


def measures(tokens: float, seconds: float, answers: int) -> dict[str, float]:
    return {"answers": float(answers), "tokens": tokens, "seconds": seconds, "perf/tokens_per_second": tokens / max(seconds, 1e-9)}


def summary(metrics: dict[str, float], context: Context) -> str:
    """The last line of a generation: how fast, from what, and what to try next."""
    task = "" if context.task is None else f" adapter.task={context.task}"
    speed = f"{metrics['tokens']:.0f} tokens in {metrics['seconds']:.1f} s ({metrics['perf/tokens_per_second']:.0f} tokens/s)"
    if (run := context.source) is None:
        return f"{speed} from {context.engine.model_id} of {context.engine.engine_id}. Next: prompts=FILE.jsonl for many"
    return (
        f"{speed} from {run.path}, step {run.step}. Next: python generate.py ckpt={run.path}{task} prompt='...', or prompts=FILE.jsonl for "
        "many"
    )
