"""Option task=evaluate of generate.py: measure a run with an option of the group `eval`; a file of results, means, a table, pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from components.adapters.base import OFF, task_ids, tasks_to_say
from components.contracts import Completion, Prompt, Tokenizer, UserError
from components.decoding.rounds import Said
from components.evals.base import Evaluation, Exam, Row
from framework.build import Run, build_data
from framework.engines import fitting
from framework.evaluation_plots import heat_map, is_share, length_curve, unit
from framework.generate import Context, new_file, run_renderer
from framework.overrides import group_options
from framework.procedure import text_ids
from framework.prompts import Renderer
from framework.traces import asked, counted, figures_of

PROGRESS_SECONDS = 10
PROBE = "The quick brown fox, 1 of 20"  # what a tokenizer makes of it tells it from others
OTHER = "?!"  # begins and ends otherwise
RESULTS = "results.jsonl"


class Evaluate:
    """Runs `evaluation`, an option of the group `eval`, on the run, with the chosen engine and decoding.

    Writes results.jsonl (one line an item, as they are finished), PNGs, and metrics. With NAME of the evaluation, a measure M (score, loss,
    ...) of a task T has the means NAME/T/M@LENGTH, over tasks NAME/M@LENGTH, and over lengths NAME/M; figures of its summary are
    NAME/FIGURE. A task of the evaluation's own name is left out of the keys. errors: items without an answer, which no score counts.

    missing: what is done about these: refuse, or skip, the others alone are measured. then: by the name of an evaluation the words that
    are suggested after it; see `next_command`.

    Raises: UserError where no evaluation was chosen, for one that needs a run without any, and for items without an answer.
    """

    asks_in_rounds = True
    heeds_too_long = True

    def __init__(self, evaluation: Evaluation | None, missing: Literal["refuse", "skip"], then: dict[str, list[str]]) -> None:
        if evaluation is None:
            raise UserError(f"eval: none chosen; task=evaluate needs one: eval={' | eval='.join(group_options('eval'))}")
        if missing not in ("refuse", "skip"):
            raise UserError(f"task.missing: {missing!r}; refuse or skip is allowed")
        self.evaluation, self.missing, self.then = evaluation, missing, then
        self.asks_every_task = bool(getattr(evaluation, "by_task", False))

    def run(self, context: Context) -> dict[str, float]:
        """Measure, write, print; returns the metrics."""
        began, rows = time.monotonic(), []
        exam = make_exam(context) if self.evaluation.needs_run or context.source is not None else exam_of_texts(context)
        trained = f", trained at {exam.trained_length:,} tokens{regimes(context.run)}" if context.source is not None else ""
        say(f"{self.evaluation.name} of {subject(context, Path)}{trained}")
        found = self.evaluation.rows(exam)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "up to .* tokens, but the model was trained")  # just that is to be measured
            first = list(itertools.islice(found, 1))  # what cannot be measured leaves no file
            with new_file(context.out_dir / RESULTS) as file:
                for row in itertools.chain(first, found):
                    rows.append(row)
                    file.write(json.dumps(line_of(row), ensure_ascii=False) + "\n")
                    file.flush()
        failed, answered = self.unanswered(rows, context.out_dir / RESULTS), [row for row in rows if row.error is None]
        figures, words = self.evaluation.summary(answered)
        metrics = {**means(self.evaluation.name, answered), **{f"{self.evaluation.name}/{key}": value for key, value in figures.items()}}
        console = Console(highlight=False, soft_wrap=True)
        print_tables(answered, console)
        metrics |= figures_of(self.evaluation.name, rows, console) or {f"decode/{key}": float(n) for key, n in context.spent.items()}
        if words:
            console.print(words, markup=False)
        if long := fitting.words(fitting.figures(context.engine)):
            say(f"{long}; in {RESULTS} they have prompt_cut or error")
        title = f"{self.evaluation.name}: {subject(context, lambda path: path.name)}"
        pictures = draw(self.evaluation.name, answered, exam.trained_length, context.out_dir, title)
        seconds = time.monotonic() - began
        shown = f", {', '.join(path.name for path in pictures)}" if pictures else ""
        without = f", {failed} of them without an answer and in no score" if failed else ""
        say(f"{len(rows)} items{without} in {seconds:.0f} s; {RESULTS}, metrics.json{shown} in {context.out_dir}")
        say(f"next: {next_command(context, self.evaluation.name, self.then.get(self.evaluation.name, []))}")
        return {**metrics, "items": float(len(rows)), "errors": float(failed), "seconds": seconds}

    def unanswered(self, rows: Sequence[Row], file: Path) -> int:
        """How many items have no answer. Raises UserError where that is not allowed, or none has one.

        Those that were passed over (too_long=skip) are allowed: it was asked for.
        """
        missing = [row for row in rows if row.error is not None]
        failed = [row for row in missing if not row.passed_over]
        if missing and ((failed and self.missing == "refuse") or len(missing) == len(rows)):
            skip, some = "" if len(missing) == len(rows) else "; task.missing=skip measures the others alone", failed or missing
            raise UserError(
                f"task.missing: {len(some)} of {len(rows)} items have no answer, the first: {some[0].error}; {file} has them all{skip}"
            )
        return len(missing)


def subject(context: Context, of: Callable[[Path], Any]) -> str:
    """The run, as `of` names its folder, or the server's model."""
    if (run := context.source) is None:
        return f"{context.engine.model_id} of {context.engine.engine_id}"
    return f"{of(run.path)}, step {run.step}"


def say(text: str) -> None:
    """A line on stderr; the tables alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def next_command(context: Context, name: str, then: Sequence[str]) -> str:
    """What to do after the evaluation `name`: the command as it was typed, with the words `then` in place of its own.

    After a decoding in several calls: compare it with another one. Where nothing is suggested, or a value of `then` was typed: a prompt.
    """
    if context.method is not None and (context.out_dir.parent / "multirun.yaml").is_file():
        return f"python -m framework.decoding_report {context.out_dir.parent}   (all jobs of this sweep)"
    if context.method is not None:
        return f"python -m framework.decoding_report {context.out_dir} OTHER_DIR   (OTHER_DIR: the same items with another decode=)"
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ["task=evaluate", f"eval={name}"]
    keys, values = {key_of(word) for word in typed}, {key_of(word) for word in then if "." in key_of(word)}
    run = [] if context.source is None else [f"ckpt={context.run.path}"]
    if run and (not then or values & keys):
        tasks = tasks_to_say(context.run.model)
        whose = f" adapter.task={context.task or tasks[0]}" if tasks else ""
        return f"python generate.py {run[0]}{whose} prompt='...'"
    replaced = ("ckpt", "hydra", "paths.output_dir", *(key_of(word) for word in then))  # and whatever is under one of them
    kept = [word for word in typed if not any(key_of(word) == key or key_of(word).startswith(f"{key}.") for key in replaced)]
    return f"python generate.py {' '.join(map(in_shell, [*kept, *then, *run]))}"


def key_of(word: str) -> str:
    """The key of an override."""
    return word.lstrip("+~").partition("=")[0]


def in_shell(word: str) -> str:
    """A word as a shell takes it; Hydra's own quotes stay readable."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def make_exam(context: Context) -> Exam:
    """What the evaluation works with."""
    run, engine = context.run, context.engine

    def text(least: int, most: int, key: str) -> list[int]:
        data = build_data(run.cfg)
        data.prepare(context.cache_dir, run.tokenizer)
        return text_ids(data, least, context.params.seed, key, most).tolist()

    render, said = run_renderer(run), dict[Any, str]()  # texts by their ids: a decoding of several calls asks again in words

    def rendered(text: str) -> list[int]:
        ids = render(text)
        said[tuple(ids)] = text
        return ids

    def complete(prompts: Sequence[list[int] | str], tokens: int, stop: Sequence[str]) -> Iterator[tuple[int, Completion]]:
        texts: list[Any] = [said.get(tuple(prompt), prompt) for prompt in prompts]  # ids where they are no text's
        if context.method is not None and not all(isinstance(text, str) for text in texts):
            raise UserError("decode: this option asks again in words, and these questions are no texts; take decode=greedy or sample")
        once: Callable[[Any], Prompt] = lambda text: render(text) if isinstance(text, str) else text  # noqa: E731
        return completed(context, texts, once if context.method is None else render, tokens, stop)

    def another(path: str | None) -> Exam:
        path = started_from(run) if path is None else path
        other = make_exam(context.another(path))
        if other.tokenizer.encode(PROBE) != run.tokenizer.encode(PROBE) or other.tokenizer.vocab_size != run.tokenizer.vocab_size:
            raise UserError(
                f"eval.base: {path} has another tokenizer, so that its losses are those of other tokens; give a run with the same"
            )
        return dataclasses.replace(other, text=text, progress=exam.progress)

    holder = task_ids(run.model)
    index = None if context.task is None or holder is None else holder.index(context.task)

    def questions() -> dict[str, Iterable[tuple[str, str]]]:
        data: Any = build_data(run.cfg)
        if not hasattr(data, "held_out_questions"):
            raise UserError(f"eval: {run.path} was trained on data that hold no questions; give a run that was trained on data=multitask")
        found = data.held_out_questions()
        return {name: found[name] for i, name in enumerate(found) if index in (None, OFF, i)}

    def choose(task: str) -> None:
        if holder is not None and len(holder) and index is None:
            holder.set(task)

    # prompts that are too long are somebody else's business under another policy than `error`
    limit = None if fitting.figures(engine) else getattr(engine, "context_length", None)
    exam = Exam(
        engine, run.tokenizer, trained_length(run), limit, turn(render, run), rendered, text, complete, another, Progress(), questions,
        choose,
    )  # fmt: skip
    return exam


def exam_of_texts(context: Context) -> Exam:
    """What an evaluation works with that needs no run: a server, asked in texts, or in conversations where it takes nothing else."""
    talks = "texts" not in context.engine.capabilities

    def spoken(said: Said) -> Prompt:
        return [{"role": "user", "content": said}] if talks and isinstance(said, str) else said

    def complete(prompts: Sequence[list[int] | str], tokens: int, stop: Sequence[str]) -> Iterator[tuple[int, Completion]]:
        return completed(context, cast(Sequence[str], prompts), spoken, tokens, stop)

    def nothing(*_: Any) -> Any:
        return context.run  # says that there is none

    frame: tuple[list[int], list[int]] = ([], [0] if talks else [])  # a turn ends after what is said
    tokenizer = cast(Tokenizer, None)  # no evaluation looks at it that needs no run
    return Exam(context.engine, tokenizer, 0, None, frame, lambda text: text, nothing, complete, nothing, Progress())


def completed(
    context: Context, said: Sequence[Said], render: Callable[[Said], Prompt], tokens: int, stop: Sequence[str]
) -> Iterator[tuple[int, Completion]]:
    """Answers as the user wants them decoded; those of one call are counted into the context."""
    found = asked(context, said, render, tokens, stop)
    return counted(context, found) if context.method is None else found


def trained_length(run: Run) -> int:
    """Tokens of the rows that the model was made for, L0 of its RoPE rule."""
    length = getattr(run.model, "max_length", None)
    return int(OmegaConf.select(run.cfg, "data.seq_len") if length is None else length)


def started_from(run: Run) -> str:
    """The run whose weights this one began with. Raises UserError where there is none."""
    path = OmegaConf.select(run.cfg, "ckpt")
    if path is None:
        raise UserError(f"eval.base: null, but {run.path} did not start from another run (ckpt=); give eval.base=RUN_DIR")
    return str(path)


def turn(render: Renderer, run: Run) -> tuple[list[int], list[int]]:
    """Ids before and after what a user says: a document's start and nothing, the marks of a conversation, or a template."""
    said, ids = run.tokenizer.encode(PROBE), render(PROBE)
    places = [i for i in range(len(ids)) if ids[i : i + len(said)] == said]
    if places:
        return ids[: places[0]], ids[places[0] + len(said) :]
    other = render(OTHER)  # a template's words share tokens with what stands in it: what is common to two texts is the template
    return common_start(ids, other), common_start(ids[::-1], other[::-1])[::-1]


def common_start(a: list[int], b: list[int]) -> list[int]:
    return [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]


def regimes(run: Run) -> str:
    """What a reader must know about the run's RoPE, for the first line."""
    spec = getattr(run.model, "rope_spec", None)
    if spec is None or spec.plain:
        return ""
    bounds = " and ".join(f"{bound:,}" for bound in spec.bounds)
    return f"; RoPE: {spec.rule}" + (f", another regime beyond {bounds} tokens" if bounds else "")


class Progress:
    """A line every few seconds: how many of all tokens are read, and how long the rest will take if it goes on like this."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self.said >= PROGRESS_SECONDS and done < total:
            self.said = now
            left = f"; at least {(now - self.began) * (total - done) / done:.0f} s left" if done else ""
            say(f"{100 * done / total:.0f} % of {total:,} tokens read, now {what}{left}")


def line_of(row: Row) -> dict[str, Any]:
    """A line of results.jsonl."""
    where = {"task": row.task, "length": row.length, "depth": row.depth, "error": row.error}
    return {**{key: value for key, value in where.items() if value is not None}, **row.values, **row.record}


def measures(rows: Sequence[Row]) -> list[str]:
    """Names of what was measured."""
    return list(dict.fromkeys(measure for row in rows for measure in row.values))


def mean(rows: Sequence[Row], measure: str, **where: Any) -> float | None:
    """Mean over the rows of a task, length or depth that have the measure; None for none."""
    found = [
        row.values[measure] for row in rows if measure in row.values and all(getattr(row, key) == value for key, value in where.items())
    ]
    return math.fsum(found) / len(found) if found else None


def mean_of_tasks(rows: Sequence[Row], measure: str, **where: Any) -> float:
    """Mean over tasks, each of equal weight however many rows it has."""
    found = [mean(rows, measure, task=task, **where) for task in distinct(rows, "task")]
    known = [value for value in found if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """Different values of task, length or depth that are not None; numbers in rising order."""
    found = list(dict.fromkeys(getattr(row, key) for row in rows if getattr(row, key) is not None))
    return found if key == "task" else sorted(found)


def means(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """The metrics of `Evaluate` without those of the summary."""
    tasks, lengths = distinct(rows, "task"), distinct(rows, "length")
    metrics: dict[str, float] = {}
    for measure in measures(rows):
        for task in tasks if tasks != [name] else ():
            for length in lengths:
                if (value := mean(rows, measure, task=task, length=length)) is not None:
                    metrics[f"{name}/{task}/{measure}@{length}"] = value
            if not lengths and (value := mean(rows, measure, task=task)) is not None:
                metrics[f"{name}/{task}/{measure}"] = value
        at = {length: mean_of_tasks(rows, measure, length=length) for length in lengths}
        metrics |= {f"{name}/{measure}@{length}": value for length, value in at.items()}
        metrics[f"{name}/{measure}"] = math.fsum(at.values()) / len(at) if at else mean_of_tasks(rows, measure)
    return metrics


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """A table for each measure, tasks and their mean down and lengths across; a single task has one table, its measures across."""
    tasks, lengths = distinct(rows, "task"), distinct(rows, "length") or [None]
    names = ["all" if length is None else f"{length:,}" for length in lengths]
    if len(tasks) == 1:
        found = [[shown(m, mean(rows, m, length=length)) for m in measures(rows)] for length in lengths]
        if lengths == [None]:
            print_table(["items", *map(unit, measures(rows))], [[f"{len(rows):,}", *found[0]]], console)
            return
        print_table(["tokens", *map(unit, measures(rows))], [[name, *cells] for name, cells in zip(names, found, strict=True)], console)
        return
    for m in measures(rows):
        known = [task for task in tasks if mean(rows, m, task=task) is not None]
        cells = [[task, *(shown(m, mean(rows, m, task=task, length=length)) for length in lengths)] for task in known]
        cells.append(["mean", *(shown(m, mean_of_tasks(rows, m, length=length)) for length in lengths)])
        print_table([unit(m), *names], cells, console)


def print_table(header: Sequence[str], cells: Sequence[Sequence[str]], console: Console) -> None:
    """Numbers to the right, an empty line after it."""
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console.print(table)
    console.print()


def shown(measure: str, value: float | None) -> str:
    """A number of a table; shares in per cent."""
    if value is None:
        return ""
    return f"{100 * value:.1f}" if is_share(measure) else f"{value:.3f}"


def draw(name: str, rows: Sequence[Row], trained: int, folder: Path, title: str) -> list[Path]:
    """A heat map (depth down, length across) for each task with depths; one of all tasks over lengths, or the curve of a single one."""
    tasks, lengths, made = distinct(rows, "task"), distinct(rows, "length"), []
    across = [f"{length:,}" for length in lengths]
    for task in tasks:
        own = [row for row in rows if row.task == task]
        if depths := distinct(own, "depth"):
            panels = {m: [[mean(own, m, depth=d, length=n) for n in lengths] for d in depths] for m in measures(own)}
            path = folder / f"{task}.png"
            labels = ("depth of the answer", f"tokens (trained at {trained:,})")
            heat_map(panels, [f"{100 * depth:g} %" for depth in depths], across, labels, path, f"{title}: {task}")
            made.append(path)
    if len(tasks) > 1 and len(lengths) > 1:
        panels = {m: [[mean(rows, m, task=task, length=n) for n in lengths] for task in tasks] for m in measures(rows)}
        heat_map(panels, tasks, across, ("", f"tokens (trained at {trained:,})"), folder / f"{name}.png", title)
        made.append(folder / f"{name}.png")
    elif len(lengths) > 1 and not made:
        (measure, *_) = measures(rows)
        length_curve({n: mean_of_tasks(rows, measure, length=n) for n in lengths}, measure, trained, folder / f"{name}.png", title)
        made.append(folder / f"{name}.png")
    return made
