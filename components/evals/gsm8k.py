"""`eval=gsm8k`: problems whose answers end in a number or an expression, after GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

Answers are read in the two ways of lm-evaluation-harness: strict, where the form counts as well, and flexible, the last number of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from components.contracts import Completion, UserError
from components.data.errors import at_least, choice
from components.data.progress import note
from components.evals.base import Exam, Item, Questions, Row
from components.evals.extraction import boxed, cut, flexible_number, same_expression, same_number, strict_number
from components.evals.problems import Problem, read_problems
from components.evals.proportions import standard_error, wilson

FORMS = (("question", "answer"), ("problem", "solution"))
ANSWERS = ("number", "boxed")
READINGS = ("strict", "flexible")
TEMPLATE = "Question: {question}\nAnswer: {answer}"
SHOTS = 5  # where a file of them is given and no number


class Gsm8k(Questions):
    """Problems of a file, each asked once, perhaps after some others that are answered.

    Args:
        path: the problems. answers: number or boxed. mark: before the number of a strict answer.
        shots: problems to show with their answers, never the one that is asked; n_shot: how many.
        template: of one problem, {question} and then {answer}. A run that knows conversations or instructions gets it from its user.
        stop: an answer ends before the first of these. items: the first so many problems. max_new_tokens: for an answer.

    Measures: strict_score and flexible_score, 1 or 0. Summary, for each reading: _se, _low and _high (Wilson, 95 %), _parsed (the share of
    right ones among answers that could be read), and _unparsable, how many could not, which count as wrong; cut_off: answers that came
    to max_new_tokens.
    Raises UserError for a value that is not allowed, and a file or a right answer that cannot be read.
    """

    name = "gsm8k"
    needs_run = False

    def __init__(
        self, path: str | None, answers: str, mark: str, shots: str | None, n_shot: int | None, template: str | None, stop: list[str],
        items: int | None, max_new_tokens: int,
    ) -> None:  # fmt: skip
        self.boxed = choice("eval.answers", answers, ANSWERS) == "boxed"
        self.mark, self.stop = mark, tuple(stop)
        if not mark or not all(self.stop):
            raise UserError(f"eval.{'stop' if mark else 'mark'}: holds an empty text, which stands everywhere; give another")
        if template is not None and (template.count("{question}"), template.count("{answer}")) != (1, 1):
            raise UserError(f"eval.template: {template!r}; it needs {{question}} and {{answer}}, each once")
        if template is not None and not template.endswith("{answer}"):
            raise UserError(f"eval.template: {template!r}; it must end with {{answer}}, which the model is to write")
        self.template = template
        self.max_new_tokens = at_least("eval.max_new_tokens", max_new_tokens, 1)
        most = None if items is None else at_least("eval.items", items, 1)
        self.problems = read_problems("eval.path", path, FORMS, most)
        if n_shot is not None and at_least("eval.n_shot", n_shot, 0) and shots is None:
            raise UserError(f"eval.n_shot: {n_shot}, but eval.shots is null; give the file with the problems to show")
        self.n_shot = n_shot if n_shot is not None else SHOTS if shots is not None else 0
        self.shots = read_problems("eval.shots", shots, FORMS, self.n_shot + 1) if self.n_shot else []  # one may be the question itself
        if len(self.shots) < self.n_shot:
            raise UserError(f"eval.n_shot: {self.n_shot}, but {shots} holds {len(self.shots)} problem(s); lower it")

    def strict(self, text: str) -> str | None:
        """The answer where the text has the right form."""
        return boxed(text) if self.boxed else strict_number(text, self.mark)

    def flexible(self, text: str) -> str | None:
        """The answer in whatever form."""
        return (boxed(text) if self.boxed else None) or flexible_number(text)

    def same(self, answer: str, right: str) -> bool:
        return same_expression(answer, right) if self.boxed else same_number(answer, right)

    def items(self, exam: Exam) -> list[Item]:
        """The problems in the order of the file."""
        found = []
        for problem in self.problems:
            if (right := self.strict(problem.fields["answer"])) is None:
                form = "\\boxed{...}" if self.boxed else f"{self.mark!r} before a number"
                raise UserError(f"eval: {problem.where}: its answer has no {form}; see eval.answers and eval.mark")
            asked = exam.render(self.prompt(problem, exam.instructed))
            prompt = asked if isinstance(asked, str) else tuple(asked)
            found.append(Item(self.name, prompt, problem.fields["question"], (right,), self.max_new_tokens))
        longest = max(item.tokens for item in found)
        exam.check_length("eval.max_new_tokens", longest)
        if (most := max(item.prompt_tokens or 0 for item in found)) > exam.trained_length:
            note(f"questions have up to {most:,} tokens, but the run was trained at {exam.trained_length:,}: it may not follow them")
        return found

    def prompt(self, problem: Problem, instructed: bool) -> str:
        """What the run is asked; the answer follows it."""
        question = problem.fields["question"]
        template = self.template or ("{question}{answer}" if instructed and not self.n_shot else TEMPLATE)
        shots = [shot for shot in self.shots if shot.fields["question"] != question][: self.n_shot]
        before = "".join(filled(template, shot.fields) + "\n\n" for shot in shots)
        return before + filled(template.removesuffix("{answer}").rstrip(" "), {"question": question})

    def _row(self, item: Item, completion: Completion, losses: list[float]) -> Row:
        text, (right,) = cut(completion.text, self.stop), item.expected
        read = {"strict": self.strict(text), "flexible": self.flexible(text)}
        values = {f"{how}_score": float(answer is not None and self.same(answer, right)) for how, answer in read.items()}
        record = {
            "prompt_tokens": item.prompt_tokens, "asked": item.asked, "expected": right, "got": text, **read,
            "finish_reason": completion.finish_reason if text == completion.text else "stop",
        }  # fmt: skip
        return Row(item.task, item.length, item.depth, values, record)

    def summary(self, rows: Sequence[Row]) -> tuple[dict[str, float], str]:
        figures: dict[str, float] = {}
        lines = []
        for how in READINGS:
            scores = [row.values[f"{how}_score"] for row in rows]
            right, unread = math.fsum(scores), sum(row.record[how] is None for row in rows)
            low, high = wilson(right, len(rows))
            figures |= {
                f"{how}_score_se": standard_error(scores), f"{how}_score_low": low, f"{how}_score_high": high,
                f"{how}_unparsable": float(unread),
            }  # fmt: skip
            if unread < len(rows):
                figures[f"{how}_score_parsed"] = right / (len(rows) - unread)
            interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
            lines.append(f"{how}: {right:.0f} of {len(rows)} right ({interval}); {unread} name no answer, which counts as wrong")
        figures["cut_off"] = float(sum(row.record["finish_reason"] == "length" for row in rows))
        lines.append(f"{figures['cut_off']:.0f} came to the end of eval.max_new_tokens={self.max_new_tokens}")
        return figures, "\n".join(lines)


def filled(template: str, fields: dict[str, str]) -> str:
    """The template with its fields. Braces inside them stay as they are.

    >>> filled("Q: {question} A: {answer}", {"question": "{answer}?", "answer": "{}"})
    'Q: {answer}? A: {}'
    """
    before, _, after = template.partition("{question}")
    return before + fields["question"] + after.replace("{answer}", fields.get("answer", ""))
