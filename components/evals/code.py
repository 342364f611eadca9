"""`eval=code`: functions to write from their description, judged by running tests, after HumanEval (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from components.contracts import Completion, UserError
from components.data.errors import at_least
from components.decoding.voting import pass_at_k
from components.evals.base import Exam, Item, Questions, Row
from components.evals.extraction import code_block, cut
from components.evals.problems import read_problems
from components.evals.proportions import standard_error
from components.evals.sandbox import STATUSES, Outcome, run_python

FIELDS = ("prompt", "entry_point", "test", "task_id")
REQUEST = "Complete this Python function. Answer with the whole function in a code block.\n\n```python\n{prompt}\n```"


class Code(Questions):
    """Problems of a file in HumanEval's form; a program passes when its tests run to their end.

    Args:
        path: the problems. execute: must be true, since programs that nobody has read are run. samples: programs for each problem.
        ks: k of pass@k. template: what a run is asked, with {prompt}. stop: a continuation ends before the first of these; the code of a
            fenced block is taken as it is. items: the first so many problems. max_new_tokens: for a program.
        timeout_seconds, memory_mb: for a program and its tests; see `run_python`.

    Measure: score, 1 or 0. Summary: pass@K (unbiased, mean over problems) with its standard error pass@K_se, and how many programs passed,
    failed (an assertion), timeout and error. Raises UserError for a value that is not allowed, and a file that cannot be read.
    """

    name = "code"
    needs_run = False

    def __init__(
        self, path: str | None, execute: bool, samples: int, ks: list[int], template: str | None, stop: list[str], items: int | None,
        max_new_tokens: int, timeout_seconds: float, memory_mb: int,
    ) -> None:  # fmt: skip
        if not execute:
            raise UserError(
                "eval.execute: false; eval=code runs what the model writes, in a sandboxed process; eval.execute=true allows it"
            )
        self.samples, self.ends = at_least("eval.samples", samples, 1), tuple(stop)  # not for all calls: they stand in whole functions
        if not ks or any(not 1 <= k <= samples for k in ks):
            raise UserError(f"eval.ks: {ks}; must be numbers from 1 to eval.samples={samples}")
        if template is not None and template.count("{prompt}") != 1:
            raise UserError(f"eval.template: {template!r}; it needs {{prompt}} once")
        if not all(self.ends):
            raise UserError("eval.stop: holds an empty text, which stands everywhere; drop it")
        if not timeout_seconds > 0:
            raise UserError(f"eval.timeout_seconds: {timeout_seconds}; must be above 0")
        self.ks, self.template, self.timeout_seconds = ks, template, float(timeout_seconds)
        self.memory_mb = at_least("eval.memory_mb", memory_mb, 64)  # the interpreter itself needs some 20
        self.max_new_tokens = at_least("eval.max_new_tokens", max_new_tokens, 1)
        most = None if items is None else at_least("eval.items", items, 1)
        self.problems: dict[str, dict[str, str]] = {}
        for fields, where in read_problems("eval.path", path, (FIELDS,), most):
            if fields["task_id"] in self.problems:
                raise UserError(f"{where}: task_id {fields['task_id']!r} stands there a second time; give every problem its own")
            self.problems[fields["task_id"]] = fields

    def items(self, exam: Exam) -> list[Item]:
        """Every problem `samples` times, one after the other; an engine answers equal prompts of different places independently."""
        template = self.template or (REQUEST if exam.instructed else "{prompt}")
        found = []
        for name, fields in self.problems.items():
            asked = exam.render(template.replace("{prompt}", fields["prompt"]))
            prompt = asked if isinstance(asked, str) else tuple(asked)
            found += [Item(self.name, prompt, name, (fields["entry_point"],), self.max_new_tokens)] * self.samples
        exam.check_length("eval.max_new_tokens", max(item.tokens for item in found))
        return found

    def judge(self, name: str, text: str) -> Outcome:
        """Run an answer to the problem with its tests."""
        fields = self.problems[name]
        whole = f"{program(fields['prompt'], text, fields['entry_point'], self.ends)}\n{fields['test']}\ncheck({fields['entry_point']})\n"
        return run_python(whole, self.timeout_seconds, self.memory_mb)

    def _row(self, item: Item, completion: Completion, losses: list[float]) -> Row:
        found = self.judge(item.asked, completion.text)
        record = {
            "prompt_tokens": item.prompt_tokens, "problem": item.asked, "got": completion.text, "status": found.status,
            "detail": found.detail, "isolation": found.isolation, "program_seconds": round(found.seconds, 3),
            "finish_reason": completion.finish_reason,
        }  # fmt: skip
        return Row(item.task, item.length, item.depth, {"score": float(found.status == "passed")}, record)

    def summary(self, rows: Sequence[Row]) -> tuple[dict[str, float], str]:
        by_problem: dict[str, list[Row]] = {}
        for row in rows:
            by_problem.setdefault(row.record["problem"], []).append(row)
        counts = {status: sum(row.record["status"] == status for row in rows) for status in STATUSES}
        figures: dict[str, float] = {status: float(count) for status, count in counts.items()}
        shares = []
        for k in self.ks:
            whole = [[row.values["score"] for row in some] for some in by_problem.values() if len(some) >= k]  # others lack answers
            if not whole:
                continue
            found = [pass_at_k(len(some), round(math.fsum(some)), k) for some in whole]
            figures[f"pass@{k}"], figures[f"pass@{k}_se"] = math.fsum(found) / len(found), standard_error(found)
            error = f" (standard error {100 * figures[f'pass@{k}_se']:.1f})" if len(found) > 1 else ""
            shares.append(f"pass@{k} {100 * figures[f'pass@{k}']:.1f} %{error}")
        lines = [
            f"{', '.join(shares) or 'no pass@k'} over {len(by_problem)} problem(s), {self.samples} program(s) each",
            f"programs: {', '.join(f'{count} {status}' for status, count in counts.items())}",
            f"sandbox: {'; '.join(dict.fromkeys(row.record['isolation'] for row in rows))}",
        ]
        if self.samples > 1 and all(len({row.record["got"] for row in some}) == 1 for some in by_problem.values()):
            lines.append(f"all {self.samples} programs of every problem are alike; decode=sample makes different ones")
        return figures, "\n".join(lines)


def program(prompt: str, answer: str, entry_point: str, stop: tuple[str, ...]) -> str:
    """The program that an answer makes of a prompt: its code block or the whole answer, up to the first stop, after the prompt.

    Code that defines the function itself comes after the prompt too, whose imports and helpers it may need.

    >>> program("def f(x):\\n", "    return x\\ndef g(): pass", "f", ("\\ndef",))
    'def f(x):\\n    return x'
    """
    block = code_block(answer)
    code = answer if block is None else block
    defines = re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE) is not None
    if block is None and not defines:
        code = cut(code, stop)
    return f"{prompt}\n    pass\n\n{code}" if defines else prompt + code
