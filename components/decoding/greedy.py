"""Option decode=greedy."""

from __future__ import annotations

from components.contracts import SamplingParams
from components.decoding.constraints import constraint
from components.decoding.params import check_params


class Greedy:
    """Always the most likely token.

    stop: texts that end an answer and are no part of it. regex, choice: hold answers to a pattern or to one of some texts; None: free.
    Raises UserError for values that are not allowed.
    """

    def __init__(self, stop: list[str], regex: str | None, choice: list[str] | None) -> None:
        self.stop, self.constraint = tuple(stop), constraint(regex, choice)
        check_params(self.params(max_new_tokens=1, seed=0))

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams:
        """What an engine needs to know; the seed has no effect on what is chosen."""
        return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, seed=seed, stop=self.stop, constraint=self.constraint)
