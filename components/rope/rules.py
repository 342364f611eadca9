"""Static RoPE rescaling rules: each turns a model's own numbers into a RopeSpec (factors lambda_i and an attention factor), in float64.

Notation: d = rotary_dim, i = 0..d/2-1, theta_i = base^(-2i/d), L0 = original_len, s = factor, L = s * L0.
The rescaled frequency is theta_i / lambda_i.
"""

from __future__ import annotations

import math

from components.contracts import RopeRegime, RopeSpec, UserError


def check_factor(factor: float) -> None:
    """Raise UserError unless s is a finite number >= 1."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 1:
        raise UserError(
            f"rope.factor: {factor!r}; allowed is a finite number >= 1 (how many times longer than model.max_length); use rope.factor=2"
        )


def check_model(rotary_dim: int, base: float, original_len: int) -> None:
    """Raise UserError for numbers of a model that no rule can work with."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise UserError(
            f"rotary dims of a head: {rotary_dim}; allowed is an even number >= 2; change model.head_dim or model.partial_rotary_factor"
        )
    if not base > 1:
        raise UserError(f"model.rope_theta: {base}; allowed is a number > 1; use 10000")
    if not original_len > 2 * math.pi:  # shorter than one radian turn: no frequency completes a period and the logarithms change sign
        raise UserError(f"model.max_length: {original_len}; allowed is at least 7 tokens for rotary positions")


def _extended(rotary_dim: int, base: float, original_len: int, factor: float, regime: RopeRegime, rule: str) -> RopeSpec:
    """The spec of a rule that treats rows of all lengths alike."""
    return RopeSpec(rotary_dim, float(base), (regime,), original_len, round(factor * original_len), rule)


class NoRescaling:
    """Plain RoPE (RoFormer, arXiv 2104.09864): lambda_i = 1.

    >>> NoRescaling().spec(rotary_dim=4, base=10000.0, original_len=64).factors
    ()
    """

    def spec(self, rotary_dim: int, base: float, original_len: int) -> RopeSpec:
        """Return the identity spec; raises UserError on an odd rotary_dim, base <= 1 or original_len < 7."""
        check_model(rotary_dim, base, original_len)
        return RopeSpec(rotary_dim, float(base), original_len=original_len, target_len=original_len)


class Linear:
    """Position interpolation (arXiv 2306.15595, eq. 4): lambda_i = s.

    >>> Linear(factor=2.0).spec(rotary_dim=4, base=10000.0, original_len=64).factors
    (2.0, 2.0)
    """

    def __init__(self, factor: float) -> None:
        check_factor(factor)
        self.factor = float(factor)

    def spec(self, rotary_dim: int, base: float, original_len: int) -> RopeSpec:
        """Return lambda_i = factor; raises UserError as NoRescaling."""
        check_model(rotary_dim, base, original_len)
        factors = (self.factor,) * (rotary_dim // 2)
        return _extended(rotary_dim, base, original_len, self.factor, RopeRegime(factors), "linear")


class NTK:
    """NTK scaling: a larger base instead of shorter positions; lambda_i = (base'/base)^(2i/d).

    variant "base" ("NTK-aware"): base' = base * s^(d/(d-2)), so that lambda_0 = 1 and the last lambda is s.
    variant "critical" (arXiv 2310.05209, sec. 4; the baseline named NTK in arXiv 2502.20082): base' = base^(ln(L/2pi)/ln(L0/2pi)),
    so that lambda = s at the critical dimension and larger above it.

    >>> [round(f, 6) for f in NTK(factor=4.0, variant="base").spec(rotary_dim=6, base=10000.0, original_len=64).factors]
    [1.0, 2.0, 4.0]
    """

    def __init__(self, factor: float, variant: str) -> None:
        check_factor(factor)
        if variant not in ("base", "critical"):
            nearest = "critical" if str(variant).startswith("c") else "base"
            raise UserError(f"rope.variant: {variant!r}; allowed are base, critical; did you mean {nearest}?")
        self.factor = float(factor)
        self.variant = variant

    def spec(self, rotary_dim: int, base: float, original_len: int) -> RopeSpec:
        """Return lambda_i = (base'/base)^(2i/d); raises UserError as NoRescaling, and for variant base when rotary_dim is 2."""
        check_model(rotary_dim, base, original_len)
        if self.variant == "base":
            if rotary_dim == 2:
                raise UserError("rope.variant: 'base' with 2 rotary dims; allowed are 4 or more; did you mean rope=linear?")
            log_ratio = rotary_dim / (rotary_dim - 2) * math.log(self.factor)
        else:
            period = 2 * math.pi
            log_ratio = (math.log(self.factor * original_len / period) / math.log(original_len / period) - 1) * math.log(base)
        factors = tuple(math.exp(log_ratio * 2 * i / rotary_dim) for i in range(rotary_dim // 2))
        return _extended(rotary_dim, base, original_len, self.factor, RopeRegime(factors), "ntk")


class YaRN:
    """YaRN (arXiv 2309.00071, sec. 3.2 and 3.4): 1/lambda_i = r_i/s + (1 - r_i), r_i a ramp between two numbers of turns within L0.

    Args:
        factor: s.
        beta_fast, beta_slow: turns within L0 above which a dimension is kept and below which it is interpolated fully (paper: 32 and 1).
        truncate: round the ends of the ramp to whole dimensions, as the released models do.
        attention_factor: fixed multiplier of cos and sin; None: 0.1 ln s + 1, or m(mscale)/m(mscale_all_dim), m(x) = 0.1 x ln s + 1.
        mscale, mscale_all_dim: see attention_factor.

    >>> round(YaRN(32.0, 32.0, 1.0, True).spec(rotary_dim=96, base=10000.0, original_len=4096).attention_factor, 10)
    1.3465735903
    """

    def __init__(
        self,
        factor: float,
        beta_fast: float,
        beta_slow: float,
        truncate: bool,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
    ) -> None:
        check_factor(factor)
        if not beta_fast > beta_slow > 0:
            raise UserError(f"rope.beta_fast: {beta_fast}, rope.beta_slow: {beta_slow}; allowed is beta_fast > beta_slow > 0; use 32 and 1")
        if attention_factor is not None and not attention_factor > 0:
            raise UserError(f"rope.attention_factor: {attention_factor}; allowed is null or a number > 0")
        if (mscale is None) != (mscale_all_dim is None):
            raise UserError(f"rope.mscale: {mscale}, rope.mscale_all_dim: {mscale_all_dim}; give both or neither")
        self.factor = float(factor)
        self.beta_fast = float(beta_fast)
        self.beta_slow = float(beta_slow)
        self.truncate = truncate
        self.attention_factor = attention_factor
        self.mscale = mscale
        self.mscale_all_dim = mscale_all_dim

    def spec(self, rotary_dim: int, base: float, original_len: int) -> RopeSpec:
        """Return the ramp's lambda_i; raises UserError as NoRescaling, and when L0 holds no full turn at beta_slow."""
        check_model(rotary_dim, base, original_len)
        if original_len <= 2 * math.pi * self.beta_slow:
            raise UserError(f"rope.beta_slow: {self.beta_slow}; allowed is below model.max_length / 2pi = {original_len / 2 / math.pi:.2f}")
        low, high = self._ramp(rotary_dim, base, original_len)
        factors = []
        for i in range(rotary_dim // 2):
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            factors.append(1 / (ramp / self.factor + (1 - ramp)))  # frequencies are interpolated, not lambda
        return _extended(rotary_dim, base, original_len, self.factor, RopeRegime(tuple(factors), self._attention_factor()), "yarn")

    def _ramp(self, rotary_dim: int, base: float, original_len: int) -> tuple[float, float]:
        def index(turns: float) -> float:
            return rotary_dim * math.log(original_len / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)  # d - 1 although the ramp has d/2 entries: as every released implementation does
        return low, high + 0.001 if low == high else high

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale is None or self.mscale_all_dim is None:
            return 0.1 * math.log(self.factor) + 1
        return (0.1 * self.mscale * math.log(self.factor) + 1) / (0.1 * self.mscale_all_dim * math.log(self.factor) + 1)
