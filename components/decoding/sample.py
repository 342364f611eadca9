"""Option decode=sample."""

from __future__ import annotations

from components.contracts import SamplingParams
from components.decoding.sampling import check_params


class Sample:
    """Draw from the model's distribution after temperature, top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

    temperature: 0 is greedy, 1 the model's own distribution. top_k: keep the k most likely tokens, None keeps all.
    top_p: keep the smallest set of most likely tokens with at least this mass, None keeps all. Raises UserError for values out of range.
    """

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        check_params(self.params(max_new_tokens=1, seed=0))

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams:
        """What an engine needs to know."""
        return SamplingParams(max_new_tokens, self.temperature, self.top_k, self.top_p, seed)
