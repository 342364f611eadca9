"""Option decode=greedy."""

from __future__ import annotations

from components.contracts import SamplingParams


class Greedy:
    """Always the most likely token."""

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams:
        """What an engine needs to know; the seed has no effect on what is chosen."""
        return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, seed=seed)
