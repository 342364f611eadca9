"""Option task=rollouts: a run answers problems with known solutions; right and wrong answers become pairs to prefer and to reject."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from components.contracts import Completion, UserError
from framework.build import build_data, read_config, run_folder
from framework.generate import Context, completions, measures, new_file, progress_bar, run_renderer, tokens_of

EVERY_SECONDS = 10.0  # between plain lines where standard error is no terminal
Verify = Callable[[str, str], bool]  # (answer, solution) -> is it right?


@dataclass
class Answered:
    """A problem and what the run said to it."""

    prompt: str
    solution: str
    right: list[str] = field(default_factory=list)  # answers that were verified
    wrong: list[str] = field(default_factory=list)
    unfinished: int = 0  # cut off at max_new_tokens: they count as wrong, and nobody should learn from half an answer
    tokens: int = 0

    @property
    def samples(self) -> int:
        return len(self.right) + len(self.wrong) + self.unfinished

    def pairs(self, most: int) -> list[dict[str, str]]:
        """Rows {prompt, chosen, rejected, source}: each different wrong answer against a right one in turn, or against the solution."""
        right, wrong = list(dict.fromkeys(self.right)), list(dict.fromkeys(self.wrong))[:most]
        source, better = ("rollout", right) if right else ("solution", [self.solution])
        return [
            {"prompt": self.prompt, "chosen": better[i % len(better)], "rejected": text, "source": source} for i, text in enumerate(wrong)
        ]


class Rollouts:
    """Samples `n` answers to every problem, verifies each, writes pairs (split: train) and says how many were right.

    The third stage of a reasoning recipe (Phi-4-Mini, arXiv 2503.01743, and arXiv 2504.21233): wrong answers of the model itself become
    rejected ones, right ones preferred. split: val writes no pairs and only measures; with decode=greedy that is greedy accuracy.

    Args:
        problems: JSONL file of {"prompt", "solution"}, or a run whose data has problems (data=reasoning); None: this run.
        split: of a run's problems, those trained on or those held out.
        most_problems: the first so many; None: all.
        n: answers to every problem.
        most_pairs: of one problem.
        verify: (answer, solution) -> is it right?
        output: JSONL file to write, never one that has content already; None: pairs.jsonl in the output folder.

    Raises: UserError for numbers below 1, and problems that cannot be read.
    """

    def __init__(
        self, problems: str | None, split: Literal["train", "val"], most_problems: int | None, n: int, most_pairs: int, verify: Verify,
        output: str | None,
    ) -> None:  # fmt: skip
        for key, value in (("task.most_problems", most_problems), ("n", n), ("task.most_pairs", most_pairs)):
            if value is not None and value < 1:
                raise UserError(f"{key}: {value}; at least 1 is allowed")
        self.source = None if problems is None else Path(problems)
        self.given = None if self.source is None or self.source.is_dir() else read_problems(self.source)
        self.split, self.most_problems, self.n, self.most_pairs = split, most_problems, n, most_pairs
        self.verify, self.output = verify, output

    def run(self, context: Context) -> dict[str, float]:
        """Answer, verify, write; returns accuracy, its standard error over problems, and counts."""
        found = (self.given or problems_of(self.source or context.run.path, self.split))[: self.most_problems]
        answered = [Answered(prompt, solution) for prompt, solution in found]
        path = Path(self.output) if self.output is not None else context.out_dir / "pairs.jsonl"
        measured_only = self.split == "val" and self.given is None
        before, started = tokens_of(context.engine), time.perf_counter()
        render = run_renderer(context.run)
        prompts = [render(problem.prompt) for problem in answered for _ in range(self.n)]
        rows: list[dict[str, str]] = []
        with contextlib.nullcontext() if measured_only else new_file(path) as file:
            done = 0  # problems, in their order, whose pairs are in the file
            for index, completion in watched(completions(context.engine, prompts, context.params), len(prompts)):
                self.take(answered[index // self.n], completion)
                while file is not None and done < len(answered) and answered[done].samples == self.n:
                    new = answered[done].pairs(self.most_pairs)
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                    file.flush()
                    rows, done = rows + new, done + 1
        metrics = {**accuracy(answered), **measures(tokens_of(context.engine) - before, time.perf_counter() - started, len(prompts))}
        say(
            f"accuracy {metrics['accuracy']:.4f} +- {metrics['accuracy_se']:.4f} (standard error) over {len(answered)} problems, "
            f"{self.n} answer(s) each; {metrics['finished']:.1%} ended by themselves; {metrics['seconds']:.0f} s"
        )
        chosen = f"adapter.task={context.task} " if context.task is not None else ""
        if measured_only:
            whose = "" if self.source is None else f"task.problems={self.source} "
            say(f"next, pairs from training problems: python generate.py task=rollouts n=4 {whose}{chosen}ckpt={context.run.path}")
            return metrics
        written = sum(row["source"] == "solution" for row in rows)
        if rows:
            form = "data.form=chat " if render.chat else ""
            say(f"{len(rows)} pairs in {path}: chosen are {len(rows) - written} of the run's own right answers and {written} solutions")
            start = f"ckpt={context.run.path}"
            if chosen:  # the weights of several tasks cannot be trained as one model
                start = f"ckpt=DIR, with DIR from python generate.py task=export task.to=DIR {chosen}{start}"
            say(f"next: python train.py task=dpo data=preference {form}data.path={path} {start}")
        else:
            path.unlink()
            say("no finished answer was wrong, so that there are no pairs; sample hotter (decode.temperature) or give harder problems")
        return {**metrics, "pairs": float(len(rows)), "pairs_from_solutions": float(written)}

    def take(self, problem: Answered, completion: Completion) -> None:
        """Sort one answer in."""
        problem.tokens += len(completion.token_ids)
        if completion.finish_reason != "stop":
            problem.unfinished += 1
        elif self.verify(completion.text, problem.solution):
            problem.right.append(completion.text)
        else:
            problem.wrong.append(completion.text)


def problems_of(run: Path, split: str) -> list[tuple[str, str]]:
    """(prompt, solution) of a run's data. Raises UserError where it has none."""
    data: Any = build_data(read_config(run_folder(run)))
    if not hasattr(data, "problems"):
        raise UserError(
            f"task.problems: the data of {run} ({type(data).__name__}) has no problems with solutions; give task.problems=FILE.jsonl with "
            "prompt and solution, or the run whose problems they are: task.problems=RUN_DIR"
        )
    return data.problems(split)


def read_problems(path: Path) -> list[tuple[str, str]]:
    """(prompt, solution) of every line of a JSONL file. Raises UserError naming the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.problems: {str(path)!r} cannot be read ({error}); give a JSONL file in UTF-8") from error
    found: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"task.problems: {path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not isinstance(row.get("solution"), str):
            shown = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"task.problems: {path}: line {number} needs prompt and solution, both text; it has {shown or 'nothing'}")
        found.append((row["prompt"], row["solution"]))
    if not found:
        raise UserError(f'task.problems: {path}: empty; give a line {{"prompt": "2+3=", "solution": "#5"}} for each problem')
    return found


def watched(found: Iterable[tuple[int, Completion]], total: int) -> Iterable[tuple[int, Completion]]:
    """The same, with a bar on a terminal and a line now and then elsewhere."""
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    started = spoke = time.monotonic()
    with progress_bar(notes) as bar:
        job = bar.add_task("answers", total=total, rate="")
        for done, item in enumerate(found, start=1):
            yield item
            now = time.monotonic()
            bar.update(job, advance=1, rate=f"{done / max(now - started, 1e-9):.0f}/s")
            if not notes.is_terminal and now - spoke >= EVERY_SECONDS:
                spoke = now
                say(f"answers {done}/{total}  {(total - done) * (now - started) / done:.0f} s left")


def say(line: str) -> None:
    """One line about the answers, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


def accuracy(answered: list[Answered]) -> dict[str, float]:
    """Share of right answers: the mean over problems of each problem's share, with the standard error over problems."""
    shares = [len(problem.right) / problem.samples for problem in answered]
    mean, count = math.fsum(shares) / len(shares), len(shares)
    variance = math.fsum((share - mean) ** 2 for share in shares) / max(1, count - 1)
    samples, unfinished = sum(p.samples for p in answered), sum(p.unfinished for p in answered)
    return {
        "accuracy": mean, "accuracy_se": math.sqrt(variance / count), "problems": float(count), "samples": float(samples),
        "finished": 1 - unfinished / samples, "tokens_per_answer": sum(p.tokens for p in answered) / samples,
    }  # fmt: skip
