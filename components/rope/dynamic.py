"""Dynamic NTK: the base grows with the length of a row, from the trained length on. Notation as in `components.rope.rules`."""

from __future__ import annotations

import math

from components.contracts import RopeRegime, RopeSpec, UserError
from components.rope.rules import check_factor, check_model

MOST_REGIMES = 128  # the regime of a row is an int8


class Dynamic:
    """NTK of variant base with s replaced by alpha(T) = f T/L0 - (f - 1) for rows of T > L0 tokens; shorter rows turn as trained.

    Args:
        factor: f. The rule has no ratio of lengths: alpha(f L0) is f^2 - f + 1.
        target_len: longest row in tokens; None: f L0. Longer rows keep its base.

    Note: published code moves all frequencies with every token, which no cache can follow. `spec` moves them in steps of L0 tokens: a row
    turns with alpha at the end of its step, and so exactly as there at L0, 2 L0, ... and target_len. `factors_at` is the unstepped rule.

    >>> [regime.upto for regime in Dynamic(factor=2.5, target_len=None).spec(rotary_dim=4, base=10000.0, original_len=64).regimes]
    [64, 128, None]
    """

    def __init__(self, factor: float, target_len: int | None) -> None:
        check_factor(factor)
        if target_len is not None and (isinstance(target_len, bool) or not isinstance(target_len, int)):
            raise UserError(f"rope.target_len: {target_len!r}; allowed is null or a whole number of tokens")
        self.factor = float(factor)
        self.target_len = target_len

    def alpha(self, original_len: int, length: float) -> float:
        """What stands for s in rows of `length` tokens.

        >>> Dynamic(2.0, None).alpha(64, 64), Dynamic(2.0, None).alpha(64, 128)
        (1.0, 3.0)
        """
        return self.factor * max(length, original_len) / original_len - (self.factor - 1)

    def factors_at(self, rotary_dim: int, original_len: int, length: float) -> tuple[float, ...]:
        """lambda_i = alpha(T)^(2i/(d-2)) of rows of exactly `length` = T tokens; () where nothing is rescaled."""
        alpha = self.alpha(original_len, length)
        return tuple(alpha ** (2 * i / (rotary_dim - 2)) for i in range(rotary_dim // 2)) if alpha > 1 else ()

    def spec(self, rotary_dim: int, base: float, original_len: int) -> RopeSpec:
        """Return a plain regime up to L0 and one for every further L0 tokens up to the target; the last has no end.

        Raises:
            UserError: as NoRescaling; 2 rotary dims; a target below L0, or of more than 128 L0.
        """
        check_model(rotary_dim, base, original_len)
        if rotary_dim == 2:
            raise UserError("rope: dynamic with 2 rotary dims; allowed are 4 or more; did you mean rope=linear?")
        target = round(self.factor * original_len) if self.target_len is None else self.target_len
        if not original_len <= target <= MOST_REGIMES * original_len:
            key = f"rope.factor={self.factor:g} with rope.target_len" if self.target_len is None else "rope.target_len"
            most = MOST_REGIMES * original_len
            raise UserError(f"{key}: {target} tokens; allowed are {original_len} (model.max_length) to {most}, {MOST_REGIMES} times that")
        steps = math.ceil(target / original_len)
        ends = [min(step * original_len, target) for step in range(1, steps + 1)]
        regimes = [RopeRegime(self.factors_at(rotary_dim, original_len, end), upto=end) for end in ends]
        regimes[-1] = RopeRegime(regimes[-1].factors)
        return RopeSpec(rotary_dim, float(base), tuple(regimes), original_len, target, "dynamic")
