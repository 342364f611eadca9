"""Option task=candidates: a run's own samples become training rows, the last call of a decoding with the known solution as its answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from components.contracts import Completion, UserError
from components.decoding.rounds import Answer, Method, Query, Rounds, Said, Setting, with_others
from framework import decoding
from framework.answering import MakeEngine, Problem, Reader, is_right, learned, own_run, problems_of, speaker
from framework.build import read_config
from framework.parts import Parts
from framework.procedure import Context, Procedure, refuse_unheard
from framework.runs import replace_file

CHUNK = 500  # problems between two looks at what a signal asks for
Lesson = tuple[int, dict[str, str]]  # right candidates, and the row


class StoppedShort:
    """A decoding that stops before its last call, the first that is no sample. Its answer is what that call would be asked, in the notes.

    Raises UserError for one that makes no such call, and for one that draws samples again.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def answer(self, query: Query, setting: Setting) -> Rounds:
        rounds = self.method.answer(query, setting)
        candidates = yield next(rounds)
        try:
            asks = rounds.send(candidates)
        except StopIteration as end:
            if end.value.completion.finish_reason == "error":  # no room for the candidates
                return end.value
            raise UserError("task.method: makes no call after its samples, so that there is none to learn; take one that does") from None
        if len(asks) != 1 or asks[0].role == "sample":
            raise UserError("task.method: draws samples again, and only the first ones are shown here; leave decode.redraw empty")
        return Answer(Completion([], "", [], "stop"), candidates, None, {"said": asks[0].said})


class Candidates(Procedure):
    """Lets the run of `ckpt=` answer problems that it was not trained on, and writes two files of {prompt, completion} for data=multitask.

    solve.jsonl: all problems of the split with their solutions. aggregate.jsonl: for the first `most_problems` of them what the last call
    of `method` is asked, its samples drawn as `method` draws them, with the known solution. Both prompts are what decoding asks, word for
    word. Groups with no right candidate are kept: without them, copying would be all that is to be learnt.

    Args:
        method: a decoding of two rounds, samples and a call with them. groups: of samples for each problem, all of them different draws.
        k_most: no number k of right candidates has more than this share of the rows; what is too much is left out. 1 keeps all.
        problems: JSONL file of {prompt, solution} or {question, answer}; None: those of the data, of `split`.
        read: how answers are compared. engine: of the run. max_new_tokens: of a sample.

    Metrics: candidates/right, share of right samples; candidates/k=K and candidates/kept@k=K, groups with K right ones; rows/solve and
    rows/aggregate; candidates/known, problems left out since the run was trained on them; candidates/no_room, groups too long to show.
    Raises: UserError for no run, values out of range, and no problems.
    """

    def __init__(
        self, method: Any, groups: int, k_most: float, problems: str | None, split: Literal["train", "val"], most_problems: int | None,
        read: Reader, engine: MakeEngine, max_new_tokens: int,
    ) -> None:  # fmt: skip
        for key, value in (("groups", groups), ("most_problems", most_problems), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise UserError(f"task.{key}: {value}; at least 1 is allowed")
        if not hasattr(method, "answer"):
            raise UserError("task.method: answers in one call; take a decoding of several calls")
        if not 1 / (method.n + 1) <= k_most <= 1:
            raise UserError(f"task.k_most: {k_most}; from 1/{method.n + 1}, equally many of each k, to 1 is allowed")
        self.method, self.groups, self.k_most, self.max_new_tokens = method, groups, k_most, max_new_tokens
        self.problems, self.split, self.most_problems, self.reader, self.make_engine = problems, split, most_problems, read, engine

    def check(self, config: DictConfig, parts: Parts) -> None:
        own_run(config)

    def run(self, context: Context) -> dict[str, float]:
        """Sample, write; returns the metrics."""
        config = read_config(context.run_dir)
        refuse_unheard(config)
        path = own_run(config)
        asked, known = problems_of(context.data, self.problems, self.split, None), learned(path)
        fresh = [one for one in asked if one[0] not in known]
        if not fresh:
            raise UserError(f"task.problems: the run {path} was trained on all {len(asked)}; give others (data.seed)")
        lessons, figures = self.lessons(fresh[: self.most_problems], path, context)
        kept = balanced(lessons, self.k_most)
        solve = [{"prompt": prompt, "completion": solution} for prompt, solution in fresh]
        for name, rows in (("solve", solve), ("aggregate", [row for _, row in kept])):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            replace_file(context.run_dir / f"{name}.jsonl", "".join(lines))  # a run that was interrupted makes them anew
        before, after = (Counter(k for k, _ in some) for some in (lessons, kept))
        for k in range(self.method.n + 1):
            figures |= {f"candidates/k={k}": before[k], f"candidates/kept@k={k}": after[k]}
        context.progress("right candidates: " + ", ".join(f"{k} in {before[k]} groups ({after[k]} kept)" for k in sorted(before)))
        figures |= {"rows/solve": len(solve), "rows/aggregate": len(kept), "candidates/known": len(asked) - len(fresh)}
        context.log(figures, 0)
        context.closing.append(f"next: python train.py task=sft data=multitask {tasks_word(context.run_dir)} ckpt={path}")
        return figures

    def lessons(self, problems: Sequence[Problem], path: str, context: Context) -> tuple[list[Lesson], dict[str, float]]:
        """A row a group that there is room for, and figures about all samples."""
        asked = speaker(path, self.make_engine, context, self.max_new_tokens)
        found, right, samples, no_room = list[Lesson](), 0, 0, 0
        for first in range(0, len(problems), CHUNK):
            some = [problem for problem in problems[first : first + CHUNK] for _ in range(self.groups)]
            names = decoding.query_ids([prompt for prompt, _ in some])  # equal prompts have names of their own, so other samples
            queries = with_others([Query(name, prompt) for name, (prompt, _) in zip(names, some, strict=True)])
            traces = decoding.run_queries(StoppedShort(self.method), queries, asked.engine, asked.render, asked.setting)  # type: ignore[arg-type]
            for trace in sorted(traces, key=lambda trace: trace.index):
                solution = some[trace.index][1]
                k = sum(is_right(self.reader, one, solution) for one in trace.answer.candidates)
                right, samples = right + k, samples + len(trace.answer.candidates)
                if "said" in trace.answer.notes:
                    found.append((k, {"prompt": words_of(trace.answer.notes["said"]), "completion": solution}))
                else:
                    no_room += 1
            asked.engine.known.clear()
            context.progress(
                f"{min(first + CHUNK, len(problems))} of {len(problems)} problems; {right / samples:.1%} of the samples are right"
            )
        return found, {"candidates/right": right / samples, "candidates/samples": samples, "candidates/no_room": no_room}


def words_of(said: Said) -> str:
    """A text; the data of a run of several tasks knows no conversations."""
    assert isinstance(said, str)
    return said


def balanced(lessons: Sequence[Lesson], k_most: float) -> list[Lesson]:
    """The first rows of each k, so many that none has more than `k_most` of all that are kept, in their order.

    Where too few different k are there for that, equally many of each.
    """
    counts = Counter(k for k, _ in lessons)
    k_most = max(k_most, 1 / max(1, len(counts)))

    def too_many(cap: int) -> bool:
        return min(cap, max(counts.values())) > k_most * sum(min(cap, count) for count in counts.values()) + 1e-9

    cap = max(counts.values(), default=0)
    while cap > 1 and too_many(cap):
        cap -= 1
    kept, taken = list[Lesson](), Counter[int]()
    for k, row in lessons:
        if taken[k] < cap:
            kept.append((k, row))
            taken[k] += 1
    return kept


def tasks_word(folder: Path) -> str:
    return f"data.tasks='{{solve: {folder / 'solve.jsonl'}, aggregate: {folder / 'aggregate.jsonl'}}}'"
