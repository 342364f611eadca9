"""`eval=choice`: multiple-choice questions of several tasks, asked with the prompt of their training and answered in words.

The families of labels, and the two ways to read an answer, are those of the commonsense benchmark of LLM-Adapters (Hu et al. 2023,
arXiv 2304.01933): their public code, and that of MTL-LoRA (arXiv 2410.09437) for `lenient`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from components.contracts import Completion, UserError
from components.data.errors import at_least, choice
from components.evals.base import Exam, Item, Questions, Row
from components.evals.extraction import family_of, label_of, picked

MATCHERS = ("strict", "lenient")


class Choice(Questions):
    """Every task's held-out questions of a run on data=multitask, each task under its own id where the run's adapter has tasks.

    Args:
        matcher: strict, the first label in the answer must be the right one; lenient, the number of an answerN alone will do.
        items: the first so many questions of a task; None: all.
        max_new_tokens: for an answer.

    Measure: score, 1 or 0, so that its means are accuracies, of each task and of all tasks in equal parts. Summary: TASK/unparsable and
    unparsable, how many answers name no label: they count as wrong; TASK/commonest_label and commonest_label, what the commonest label of
    the questions asked would score if it were always given, which says how much of an accuracy can be had without reading.
    Raises UserError for a value that is not allowed, data that have no questions, and a right answer that is no label.
    """

    name = "choice"
    by_task = True

    def __init__(self, matcher: str, items: int | None, max_new_tokens: int) -> None:
        self.matcher = choice("eval.matcher", matcher, MATCHERS)
        self.most = None if items is None else at_least("eval.items", items, 1)
        self.max_new_tokens = at_least("eval.max_new_tokens", max_new_tokens, 1)

    def items(self, exam: Exam) -> list[Item]:
        """The questions in the order of the tasks and of their files."""
        found = []
        for task, questions in exam.questions().items():
            for prompt, answer in islice(questions, self.most):
                if (label := label_of(answer)) is None:
                    raise UserError(
                        f"eval: choice cannot ask task {task}, where a right answer is {answer!r:.60}; labels are true, false, solutionN, "
                        "answerN, endingN or optionN"
                    )
                ids = (exam.tokenizer.eot_id, *exam.tokenizer.encode(prompt))
                found.append(Item(task, ids, prompt[-200:], (label,), self.max_new_tokens))
        exam.check_length("eval.max_new_tokens", max((item.tokens for item in found), default=0))
        return found

    def score(self, item: Item, text: str) -> float:
        label = item.expected[0]
        found = picked(text, family_of(label) or "", self.matcher)
        return float(found == label or (self.matcher == "lenient" and found != "" and found in label))

    def _row(self, item: Item, completion: Completion, losses: list[float]) -> Row:
        row = super()._row(item, completion, losses)
        row.record["picked"] = picked(completion.text, family_of(item.expected[0]) or "", self.matcher)
        return row

    def summary(self, rows: Sequence[Row]) -> tuple[dict[str, float], str]:
        by_task = {task: [row.record for row in rows if row.task == task] for task in dict.fromkeys(row.task for row in rows)}
        missed = {task: sum(not record["picked"] for record in some) for task, some in by_task.items()}
        shares = {task: commonest(record["expected"][0] for record in some)[1] for task, some in by_task.items()}
        total, mean = sum(missed.values()), sum(shares.values()) / max(len(shares), 1)
        figures = {**{f"{task}/unparsable": float(count) for task, count in missed.items()}, "unparsable": float(total)}
        figures |= {**{f"{task}/commonest_label": share for task, share in shares.items()}, "commonest_label": mean}
        each = f" ({', '.join(f'{task} {count}' for task, count in missed.items() if count)})" if total else ""
        line = f"matcher {self.matcher}; {total} of {len(rows)} answers name no label{each}; always the commonest label: {mean:.1%}"
        return figures, line


def commonest(labels: Iterable[str]) -> tuple[str, float]:
    """The commonest label, of several the first by name, and its share.

    >>> commonest(["true", "false", "true"])
    ('true', 0.6666666666666666)
    """
    counts = Counter(labels)
    label = min(counts, key=lambda one: (-counts[one], one))
    return label, counts[label] / counts.total()
