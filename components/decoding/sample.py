"""Option decode=sample."""

from __future__ import annotations

from components.contracts import SamplingParams
from components.decoding.constraints import constraint
from components.decoding.params import check_params


class Sample:
    """Draw from the model's distribution, after what cuts it: penalty, temperature, top-k, top-p, min-p, in this order.

    temperature: 0 is greedy, 1 the model's own distribution. top_k: keep the k most likely tokens, None keeps all.
    top_p: keep the smallest set of most likely tokens with at least this mass (Holtzman et al. 2020), None keeps all.
    min_p: keep tokens with at least this share of the most likely one's probability (Nguyen et al. 2024), None keeps all.
    repetition_penalty: logits of tokens in the prompt or the answer are divided by it where positive, else multiplied (Keskar et al. 2019).
    stop: texts that end an answer and are no part of it. regex, choice: hold answers to a pattern or to one of some texts; None: free.
    Raises UserError for values that are not allowed.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        repetition_penalty: float,
        stop: list[str],
        regex: str | None,
        choice: list[str] | None,
    ) -> None:
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty, self.stop, self.constraint = repetition_penalty, tuple(stop), constraint(regex, choice)
        check_params(self.params(max_new_tokens=1, seed=0))

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams:
        """What an engine needs to know."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            constraint=self.constraint,
        )
