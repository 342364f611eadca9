"""`eval=ruler_lite`: what of a long text does a model find? After RULER (Hsieh et al. 2024, arXiv 2404.06654), all of it made on the spot.

Lengths are tokens of the run's own tokenizer and, as in RULER, those of prompt and answer together, so that a text of `length` tokens never
leaves the RoPE regime of its length while it is answered. Parts are tokenised apart: no token spans two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from components.contracts import Tokenizer, UserError
from components.data.errors import at_least, choice
from components.data.errors import lengths as different_lengths
from components.evals.base import Exam, Item, Questions, share_found
from components.evals.ruler_tasks import HAYSTACKS, TASKS, Filler, Question

TIMES_TRAINED = (1, 2, 4)  # lengths where none are given
CACHED = 4096  # sentences whose ids are kept
TEXTS = 8  # as many of the longest text are read, where the run has so many


class RulerLite(Questions):
    """Questions of several tasks about texts of several lengths, their answers at several depths.

    Args:
        tasks: of niah_single, niah_multikey, niah_multivalue, variable_tracking, common_words, qa.
        lengths: tokens; None: 1, 2 and 4 times the trained length.
        depths: 0 (the beginning) to 1. Tasks whose answer lies in several places have as many questions as the others, of no depth.
        samples: questions of a task at a length and a depth; the same ones, but for the filler, at every length.
        haystack: what surrounds the hidden facts of niah_* and variable_tracking: text (the run's held-out text), repeat (five sentences
            over and over), sentences (made-up ones), needles (others than the asked). The other tasks have fillers of their own.
        seed: of the questions and fillers, not of the run.
        max_new_tokens: for an answer, by task.
        answer_loss: measure the likelihood of the right answer as well.

    Scores are RULER's: the share of the expected texts that the answer contains. Raises UserError for a value that is not allowed, lengths
    that a task does not fit into, and answers that do not fit into max_new_tokens.
    """

    name = "ruler_lite"

    def __init__(
        self, tasks: list[str], lengths: list[int] | None, depths: list[float], samples: int, haystack: str, seed: int,
        max_new_tokens: dict[str, int], answer_loss: bool,
    ) -> None:  # fmt: skip
        self.tasks = [choice("eval.tasks", task, TASKS) for task in tasks]
        self.lengths = None if lengths is None else sorted(different_lengths("eval.lengths", lengths))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"eval.tasks: {tasks}; must be a list of different ones of {', '.join(TASKS)}")
        if not depths or any(not 0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
            raise UserError(f"eval.depths: {depths}; must be a list of different numbers from 0 to 1, such as [0, 0.5, 1]")
        self.depths, self.samples, self.seed = depths, at_least("eval.samples", samples, 1), at_least("eval.seed", seed, 0)
        self.haystack = choice("eval.haystack", haystack, HAYSTACKS)
        for task, tokens in max_new_tokens.items():
            at_least(f"eval.max_new_tokens.{choice('eval.max_new_tokens', task, TASKS)}", tokens, 1)
        if missing := [task for task in self.tasks if task not in max_new_tokens]:
            raise UserError(f"eval.max_new_tokens: nothing for {missing[0]}; write eval.max_new_tokens.{missing[0]}=NUMBER")
        self.max_new_tokens, self.answer_loss = max_new_tokens, answer_loss

    def items(self, exam: Exam) -> list[Item]:
        """One item a task, length, depth and sample; prompts of at most length - max_new_tokens tokens."""
        chosen = self.lengths or [times * exam.trained_length for times in TIMES_TRAINED]
        writer = Writer(exam.tokenizer, exam.frame, HAYSTACKS[self.haystack])
        exam.check_length("eval.lengths", chosen[-1])
        keys = [(task, i, k) for task in self.tasks for i in range(len(self.depths)) for k in range(self.samples)]
        questions = {key: self._question(*key) for key in keys}
        self._check_room(questions, writer, chosen)
        if self.haystack == "text" and any(question.filler is None for question in questions.values()):
            writer.text = self._running_text(exam, TEXTS * chosen[-1])
        return [self._item(key, questions[key], length, writer) for length in chosen for key in keys]

    def _running_text(self, exam: Exam, most: int) -> list[int]:
        """Up to so many ids, without the marks that separate documents."""
        try:
            if not (text := [token for token in exam.text(1, most, "eval.haystack") if token != exam.tokenizer.eot_id]):
                raise UserError("data: no text")
            return text
        except UserError as error:
            raise UserError(f"{error}; the haystack needs the run's data; eval.haystack=repeat does without") from error

    def _item(self, key: tuple[str, int, int], question: Question, length: int, writer: Writer) -> Item:
        task, i, _ = key
        tokens = self.max_new_tokens[task]
        return Item(
            task=task,
            prompt=tuple(writer.prompt(question, length - tokens, self._generator(*key, length))),
            asked=(question.question + question.lead).strip(),
            expected=question.expected,
            max_new_tokens=tokens,
            answer=tuple(writer.encode(question.answer)) if self.answer_loss and question.answer else (),
            length=length,
            depth=self.depths[i] if TASKS[task][1] else None,
        )

    def score(self, item: Item, text: str) -> float:
        return share_found(item.expected, text)

    def _question(self, task: str, depth: int, sample: int) -> Question:
        return TASKS[task][0](self._generator(task, depth, sample, 0), self.depths[depth])

    def _generator(self, task: str, depth: int, sample: int, length: int) -> np.random.Generator:
        """The same numbers for a question whatever else is asked. length: of the text; 0 for the question itself."""
        return np.random.Generator(np.random.PCG64([self.seed, list(TASKS).index(task), depth, sample, length]))

    def _check_room(self, questions: Mapping[tuple[str, int, int], Question], writer: Writer, chosen: Sequence[int]) -> None:
        """Raise UserError where an answer does not fit into its tokens, or a question into the shortest length."""
        least: dict[str, int] = {}
        for (task, _, _), question in questions.items():
            tokens = len(writer.encode(question.answer or " " + ", ".join(question.expected)))
            if tokens > self.max_new_tokens[task]:
                given = f"eval.max_new_tokens.{task}: {self.max_new_tokens[task]}"
                raise UserError(f"{given}; with this tokenizer its answers take {tokens} or more; raise it")
            least[task] = max(least.get(task, 0), writer.fixed(question) + self.max_new_tokens[task])
        if wrong := [f"{task} {tokens}" for task, tokens in least.items() if tokens > chosen[0]]:
            raise UserError(
                f"eval.lengths: {chosen[0]} tokens; with this tokenizer all chosen tasks fit into no less than {max(least.values())} "
                f"({', '.join(wrong)}); give longer ones, or take these out of eval.tasks"
            )


class Writer:
    """Puts questions into fillers, in tokens. frame: see Exam; haystack: None for `text`, ids of running text."""

    def __init__(self, tokenizer: Tokenizer, frame: tuple[list[int], list[int]], haystack: Filler | None) -> None:
        self.encode = lru_cache(maxsize=CACHED)(tokenizer.encode)
        self.frame, self.haystack, self.text = frame, haystack, [0]

    def fixed(self, question: Question) -> int:
        """Tokens of the prompt without any filler."""
        start, facts, end = self._parts(question)
        return len(start) + sum(len(ids) for _, ids in facts) + len(end)

    def prompt(self, question: Question, limit: int, rng: np.random.Generator) -> list[int]:
        """At most `limit` ids: exactly so many in running text, as many whole sentences or words as there is room for in other fillers."""
        start, facts, end = self._parts(question)
        room, filler = limit - self.fixed(question), question.filler or self.haystack
        units: list[list[int]] = []
        if filler is None:  # a short text begins anew at its end, as in RULER
            first = int(rng.integers(len(self.text)))
            units = [[self.text[(first + i) % len(self.text)]] for i in range(room)]
        else:
            for unit in filler(rng):
                if any(word in unit for word in question.avoid):
                    continue
                room -= len(self.encode(unit))
                if room < 0:
                    break
                units.append(self.encode(unit))
        return [*start, *woven(units, facts), *end]

    def _parts(self, question: Question) -> tuple[list[int], list[tuple[float, list[int]]], list[int]]:
        """Ids before the filler, facts by depth, ids after the filler. In a conversation the lead begins the assistant's turn."""
        before, after = self.frame
        alone = question.filler is None and self.haystack is None  # in running text each fact is a line of its own
        facts = [(depth, self.encode(f"\n{fact.rstrip()}\n" if alone else fact)) for depth, fact in question.facts]
        lead = question.lead.lstrip() if after else question.lead
        return [*before, *self.encode(question.instruction)], facts, [*self.encode(question.question), *after, *self.encode(lead)]


def woven(units: Sequence[list[int]], facts: Iterable[tuple[float, list[int]]]) -> list[int]:
    """Units with the facts between them, each after that share of the units which its depth says.

    >>> woven([[1], [2, 2], [3], [4]], [(1.0, [9]), (0.5, [7])])
    [1, 2, 2, 7, 3, 4, 9]
    """
    ids: list[int] = []
    done = 0
    for depth, fact in sorted(facts, key=lambda pair: pair[0]):  # stable: of equal depths, in the given order
        place = round(depth * len(units))
        ids += [token for unit in units[done:place] for token in unit] + fact
        done = place
    return ids + [token for unit in units[done:] for token in unit]
