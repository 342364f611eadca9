"""Likelihood of held-out text: by position in a long row (`eval=position_loss`), and at the short length beside a base (`eval=retention`).

Scores come from the engine, which gives every row the RoPE regime of its own length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from components.contracts import UserError
from components.data.errors import at_least
from components.evals.base import Exam, Row

TIMES_TRAINED = 4  # length of the rows of position_loss where none is given
AT_ONCE = 8  # rows between two looks at the clock


class PositionLoss:
    """Mean loss of the tokens at each stretch of positions: does it stay low beyond the trained length, or rise?

    rows: rows of `length` tokens, one after the other in the held-out text (then in the training text); length: None for 4 times the
    trained length; buckets: stretches of equal size. Measure: loss, nats a token, under the length where its stretch ends.
    """

    name = "position_loss"
    needs_run = True

    def __init__(self, length: int | None, rows: int, buckets: int) -> None:
        self.length, self.count, self.buckets = length, at_least("eval.rows", rows, 1), at_least("eval.buckets", buckets, 1)
        if length is not None:
            at_least("eval.length", length, buckets)

    def rows(self, exam: Exam) -> Iterator[Row]:
        """One Row for each stretch of each row of text."""
        length = self.length or TIMES_TRAINED * exam.trained_length
        if length < self.buckets:
            raise UserError(f"eval.buckets: {self.buckets} stretches of {length} tokens; at most {length}")
        ends = [round(length * (i + 1) / self.buckets) for i in range(self.buckets)]
        for index, losses in enumerate(row_losses(exam, length, self.count, f"rows of {length:,} tokens", 0, self.count)):
            for start, end in zip([0, *ends], ends, strict=False):
                yield Row(self.name, end, None, {"loss": float(losses[start:end].mean())}, {"row": index})

    def summary(self, rows: Sequence[Row]) -> tuple[dict[str, float], str]:
        return {}, ""


class Retention:
    """Held-out loss at the short length beside that of the run it was extended from: how much of the short-text quality is left?

    base: run directory; None for the run that this one started from. length: tokens of a row; None for the trained length of the base,
    up to which LongRoPE's short regime reaches. rows: of the held-out text (then of the training text), the same for both.

    Measures: loss, and base_loss. Summary: loss_ratio, the one over the other (1: all is kept, above 1: some is lost), and its standard
    error over the rows, which are paired.
    """

    name = "retention"
    needs_run = True

    def __init__(self, base: str | None, length: int | None, rows: int) -> None:
        self.base, self.length, self.count = base, length, at_least("eval.rows", rows, 2)
        if length is not None:
            at_least("eval.length", length, 1)

    def rows(self, exam: Exam) -> Iterator[Row]:
        """One Row for each row of text. Raises UserError where there is no base, or one of other tokens."""
        base = exam.another(self.base)
        length, total = self.length or base.trained_length, 2 * self.count
        of_run = [losses.mean() for losses in row_losses(exam, length, self.count, "rows of text (the run)", 0, total)]
        of_base = row_losses(base, length, self.count, "rows of text (its base)", self.count, total)
        for index, (own, others) in enumerate(zip(of_run, of_base, strict=True)):
            yield Row(self.name, length, None, {"loss": float(own), "base_loss": float(others.mean())}, {"row": index})

    def summary(self, rows: Sequence[Row]) -> tuple[dict[str, float], str]:
        run, base = (np.array([row.values[measure] for row in rows]) for measure in ("loss", "base_loss"))
        ratio = float(run.mean() / base.mean())
        error = float((run - ratio * base).std(ddof=1) / base.mean() / math.sqrt(len(run)))
        line = f"loss is {100 * ratio:.1f} % (standard error {100 * error:.1f}) of that of its base; 100 % or less: all is kept"
        return {"loss_ratio": ratio, "loss_ratio_error": error}, line


def row_losses(exam: Exam, length: int, count: int, what: str, done: int, total: int) -> Iterator[np.ndarray]:
    """Loss (length,) float64, in nats, of each token of `count` rows of running text, after the token before the row."""
    exam.check_length("eval.length", length)
    text = exam.text(count * length + 1, count * length + 1, "eval.rows")
    for first in range(0, count, AT_ONCE):
        places = range(first, min(first + AT_ONCE, count))
        for logprobs in exam.engine.score([text[place * length : (place + 1) * length + 1] for place in places]):
            yield -logprobs.double().numpy()
        exam.progress((done + first + len(places)) * length, total * length, what)
