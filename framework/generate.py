"""What generate.py does once the configuration is composed: load a run, build an engine round it, let the task answer."""

from __future__ import annotations

import copy
import dataclasses
import json
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
from components.decoding.rounds import Method
from components.decoding.sampling import check_params
from framework.build import ConfigErrors, Run, build, build_data, load_run
from framework.engines.building import takes
from framework.engines.fitting import Policy, figures, fitted
from framework.inherit import resolve_checkpoint
from framework.kept import adapters_beside, put_on
from framework.prompts import Renderer
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


def completions(engine: Engine, prompts: Sequence[Prompt], params: Decoding) -> Iterator[tuple[int, Completion]]:
    """(index, completion) as they are finished where the engine can say so, else all at the end."""
    if hasattr(engine, "completions"):
        yield from engine.completions(prompts, params)
    else:
        yield from enumerate(engine.generate(prompts, params))


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
