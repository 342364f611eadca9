"""What the options of the group `eval` share: what they work with (`Exam`), what they give back (`Row`), and questions with known answers.

An evaluation is a class with `name`, `rows(exam)` and `summary(rows)`. Most subclass `Questions` and say what is asked (`items`) and how an
answer is scored (`score`); one that measures likelihoods alone writes its own `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

from components.contracts import Completion, Engine, Tokenizer, UserError
from components.decoding.rounds import FAILED, Traced

SKIPPED = "skipped"  # finish reason of a prompt that went nowhere
PORTION = 1 << 15  # tokens scored in one call


@dataclass
class Exam:
    """A run under test and what goes with it. Without one there are `engine`, `render`, which keeps a text, and `complete` alone.

    trained_length: tokens. limit: most tokens of prompt and answer that the engine takes, None for no end. frame: ids before and after what
    a user says, as the run's training texts have them; render: all ids, of what a user says. text(least, most, key): ids of its held-out
    text in reading order, then of its training text; key: of the configuration, to name where there are fewer than `least`.
    complete(prompts, max_new_tokens, stop): (index, completion) as they are finished, decoded as the user chose; every call ends before the
    first of `stop`. another(path): the same exam,
    text included, for another run, as it was trained; None is the run that this one started from. progress(done, total, what): how many of
    all tokens are read. questions(): (prompt as in training, right answer) of what each task of the data holds out, by task; choose(task):
    which task is asked next.
    """

    engine: Engine
    tokenizer: Tokenizer
    trained_length: int
    limit: int | None
    frame: tuple[list[int], list[int]]
    render: Callable[[str], list[int] | str]
    text: Callable[[int, int, str], list[int]]
    complete: Callable[[Sequence[list[int] | str], int, Sequence[str]], Iterator[tuple[int, Completion]]]
    another: Callable[[str | None], Exam]
    progress: Callable[[int, int, str], None]
    questions: Callable[[], Mapping[str, Iterable[tuple[str, str]]]] = dict
    choose: Callable[[str], None] = lambda task: None

    @property
    def instructed(self) -> bool:
        """Whether the run's training texts have marks or a template round what a user says."""
        return bool(self.frame[1])

    def check_length(self, key: str, length: int) -> None:
        """Raise UserError, naming `key`, for a length beyond the limit."""
        if self.limit is not None and length > self.limit:
            raise UserError(f"{key}: {length} tokens; this engine takes at most {self.limit}; choose shorter ones, or another engine")


@dataclass(frozen=True)
class Row:
    """What was measured on one item. values: by measure, e.g. score (0 to 1) or loss (nats a token); record: what else is worth keeping.

    error: why there is no answer to score; None where there is one. passed_over: it was not asked, as the user wants it (too_long=skip).
    """

    task: str
    length: int | None  # tokens of prompt and answer; None where length is no matter
    depth: float | None  # where in the text the answer lies: 0 at the beginning, 1 at the end; None where it lies in no one place
    values: dict[str, float]
    record: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    passed_over: bool = False


class Evaluation(Protocol):
    """An option of the group `eval`."""

    name: str  # first part of its metrics
    needs_run: bool  # False: it asks texts, so that a server alone can be measured

    def rows(self, exam: Exam) -> Iterator[Row]:
        """Measure; rows come as they are finished."""
        ...

    def summary(self, rows: Sequence[Row]) -> tuple[dict[str, float], str]:
        """Figures of the whole besides the means that every evaluation gets, by name; and a line for the reader, or ''. rows: without those
        that have an error, at least one."""
        ...


@dataclass(frozen=True)
class Item:
    """One question. prompt: token ids, or a text where there is no run; asked: its last words, for the reader of the results; expected:
    texts that a full answer holds; answer: ids of the right answer, whose likelihood is measured too, () for none."""

    task: str
    prompt: tuple[int, ...] | str
    asked: str
    expected: tuple[str, ...]
    max_new_tokens: int
    answer: tuple[int, ...] = ()
    length: int | None = None
    depth: float | None = None

    @property
    def tokens(self) -> int:
        """Of prompt and answer at most; of a text at most its bytes."""
        return len(self.prompt.encode() if isinstance(self.prompt, str) else self.prompt) + self.max_new_tokens

    @property
    def prompt_tokens(self) -> int | None:
        """None for a text."""
        return None if isinstance(self.prompt, str) else len(self.prompt)


class Questions:
    """Base of evaluations that ask and compare the answer. Measures: score, and answer_loss: nats a token of the right answer.

    by_task: an item's task is one of the run's data, and is chosen before it is asked. stop: texts that end an answer; all calls end there,
    so that samples are read and voted on as they are scored.
    """

    name = ""
    needs_run = True
    by_task = False
    stop: tuple[str, ...] = ()

    def items(self, exam: Exam) -> list[Item]:
        """Everything that is asked."""
        raise NotImplementedError

    def score(self, item: Item, text: str) -> float:
        """0 to 1: how good the answer `text` is."""
        raise NotImplementedError

    def summary(self, rows: Sequence[Row]) -> tuple[dict[str, float], str]:
        return {}, ""

    def rows(self, exam: Exam) -> Iterator[Row]:
        """Shorter questions come first; neighbours of one length and as long an answer are answered together."""
        items = sorted(self.items(exam), key=lambda item: item.length or 0)
        total, done = sum(item.tokens + item.tokens * bool(item.answer) for item in items), 0
        for (length, tokens, task), group in groupby(items, key=lambda i: (i.length, i.max_new_tokens, i.task if self.by_task else "")):
            some, losses = list(group), []
            what = f"questions of {task}" if task else "questions" if length is None else f"questions at {length:,} tokens"
            if task:
                exam.choose(task)
            for part in portions(some):
                losses += answer_losses(exam, part)
                done += sum(item.tokens for item in part if item.answer)
                exam.progress(done, total, what)
            prompts = [item.prompt if isinstance(item.prompt, str) else list(item.prompt) for item in some]
            for index, completion in exam.complete(prompts, tokens, self.stop):
                done += some[index].tokens
                exam.progress(done, total, what)
                error = failure(completion)
                row = self._row(some[index], completion, losses[index]) if error is None else unanswered(some[index], completion, error)
                if completion.prompt_cut:
                    row.record["prompt_cut"] = completion.prompt_cut
                if isinstance(completion, Traced):  # decoded in several calls
                    judged = completion.candidates if error is None else ()
                    row.record["candidates"] = [self._row(some[index], one, []).values for one in judged]
                    row.record["trace"] = completion.trace
                yield row

    def _row(self, item: Item, completion: Completion, losses: list[float]) -> Row:
        values = {"score": self.score(item, completion.text)}
        if losses:
            values["answer_loss"] = sum(losses) / len(losses)
        record = {
            "prompt_tokens": item.prompt_tokens, "asked": item.asked, "expected": list(item.expected), "got": completion.text,
            "finish_reason": completion.finish_reason, "answer_losses": [round(loss, 4) for loss in losses],
        }  # fmt: skip
        return Row(item.task, item.length, item.depth, values, record)


def failure(completion: Completion) -> str | None:
    """Why a completion is no answer: it failed, one of the calls that it was made from did, or it was passed over. None where it is one."""
    calls = completion.trace.get("calls", ()) if isinstance(completion, Traced) else ()
    ends = [(completion.finish_reason, completion.stop_reason), *((call["finish_reason"], call.get("error")) for call in calls)]
    return next((str(why or reason) for reason, why in ends if reason in (*FAILED, SKIPPED)), None)


def unanswered(item: Item, completion: Completion, error: str) -> Row:
    """The row of an item that has no answer: it has no score either, so that it is not taken for a wrong one."""
    record = {"prompt_tokens": item.prompt_tokens, "asked": item.asked, "expected": list(item.expected)}
    passed_over = completion.finish_reason == SKIPPED
    return Row(item.task, item.length, item.depth, {}, {**record, "finish_reason": SKIPPED} if passed_over else record, error, passed_over)


def portions(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Parts of about PORTION tokens: between two of them the clock is looked at."""
    count = max(1, PORTION // max(item.tokens for item in items))
    return (items[first : first + count] for first in range(0, len(items), count))


def answer_losses(exam: Exam, items: Sequence[Item]) -> list[list[float]]:
    """Negative log-likelihood of each token of every item's right answer, in nats; [] where an item has none."""
    wanted = [item for item in items if item.answer]
    if not wanted:
        return [[] for _ in items]  # a server need not be able to
    scores = iter(exam.engine.score([[*item.prompt, *item.answer] for item in wanted]))
    return [(-next(scores)[-len(item.answer) :]).tolist() if item.answer else [] for item in items]


def share_found(expected: Iterable[str], text: str) -> float:
    """RULER's string_match_all: the share of `expected` that `text` contains, upper and lower case alike.

    >>> share_found(["12", "34"], "It is 34.")
    0.5
    """
    wanted = list(expected)
    return sum(one.lower() in text.lower() for one in wanted) / len(wanted)


def any_found(expected: Iterable[str], text: str) -> float:
    """RULER's string_match_part: 1 where `text` contains any of `expected`, upper and lower case alike.

    >>> any_found(["Oslo", "Kristiania"], "in oslo")
    1.0
    """
    return float(any(one.lower() in text.lower() for one in expected))
