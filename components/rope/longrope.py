"""LongRoPE (arXiv 2402.13753) and LongRoPE2 (arXiv 2502.20082): rows up to the trained length turn as before, longer ones by a table.

Notation as in `components.rope.rules`; r is the real critical dimension d_rcd, a pair index.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contracts import RopeRegime, RopeSpec, UserError
from components.rope.rules import check_factor, check_model

log = logging.getLogger(__name__)

POLICIES = ("none", "long_only", "both")


def critical_index(rotary_dim: int, base: float, original_len: int, periods: float = 1.0) -> int:
    """First pair that does not turn `periods` times within L0: ceil(d/2 ln(L0 / (2 pi periods)) / ln base), clipped to 0..d/2 (eq. 7).

    >>> critical_index(96, 1e4, 2048), critical_index(96, 1e4, 2048, periods=10)
    (31, 19)
    """
    exact = rotary_dim / 2 * math.log(original_len / (2 * math.pi * periods)) / math.log(base)
    return min(max(math.ceil(exact), 0), rotary_dim // 2)


def longrope_attention_factor(factor: float, original_len: int) -> float:
    """sqrt(1 + ln s / ln L0), and 1 for s <= 1 (arXiv 2402.13753).

    >>> round(longrope_attention_factor(32.0, 4096), 10)
    1.1902380714
    """
    return math.sqrt(1 + math.log(factor) / math.log(original_len)) if factor > 1 else 1.0


def below_critical(r: int, value: float) -> tuple[float, ...]:
    """lambda_i = lambda_r^(i/r) for i < r: NTK scaling whose base makes it meet lambda_r = `value` at r.

    >>> below_critical(2, 4.0)
    (1.0, 2.0)
    """
    return tuple(value ** (i / r) for i in range(r))


@dataclass(frozen=True)
class AttentionFactor:
    """policy: none (1 everywhere) | long_only (1 up to L0, `value` beyond) | both, as published models have it.

    value: None for that of the file of factors, else LongRoPE's.
    """

    policy: str
    value: float | None

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> AttentionFactor:
        """From the node `rope.attention_factor`. Raises UserError."""
        if set(node) != {"policy", "value"} or node["policy"] not in POLICIES:
            raise UserError(f"rope.attention_factor: {dict(node)}; allowed are {{policy: {' | '.join(POLICIES)}, value: null or a number}}")
        value = node["value"]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf):
            raise UserError(f"rope.attention_factor.value: {value!r}; allowed is null or a number > 0")
        return cls(node["policy"], value)

    def pair(self, default: float) -> tuple[float, float]:
        """Those of rows up to L0, and of longer ones. default: for `value` None."""
        value = default if self.value is None else float(self.value)
        return value if self.policy == "both" else 1.0, 1.0 if self.policy == "none" else value


class LongRope:
    """Two tables of factors: `short_factors` (null: all 1) for rows of up to L0 tokens, `factors` for longer ones.

    Args:
        factor: s, target length / L0.
        factors: lambda_i, rotary_dim/2 numbers >= 1; or a JSON file with `long_factor` and perhaps `short_factor`, such as a search writes
            or a config.json's rope_scaling holds. What else the file says of lengths and base must agree with the model.
        short_factors: as factors.
        attention_factor: {policy, value}, see `AttentionFactor`.
        switch: recompute (a decoded row that outgrows L0 is read anew) | upfront (a row is planned from its prompt and the most tokens it
            may get) | always_long | always_short.

    Raises:
        UserError: values out of range, an unreadable file, or one that contradicts the model.
    """

    rule = "longrope"

    def __init__(
        self, factor: float, factors: str | Sequence[float] | None, short_factors: Sequence[float] | None,
        attention_factor: Mapping[str, Any], switch: str,
    ) -> None:  # fmt: skip
        check_factor(factor)
        self.factor = float(factor)
        self.attention = AttentionFactor.of(attention_factor)
        self.switch = switch
        self._file = read_factors(factors) if isinstance(factors, str) else {}
        self._long = self._file.get("long_factor") if isinstance(factors, str) else factors
        self._short = short_factors if short_factors is not None else self._file.get("short_factor")

    def spec(self, rotary_dim: int, base: float, original_len: int) -> RopeSpec:
        """Return two regimes, or one where `switch` is always_*. Raises UserError as `NoRescaling`, and for tables that do not fit."""
        check_model(rotary_dim, base, original_len)
        self._agree(base, original_len)
        long = check_table("rope.factors", self._table(rotary_dim, base, original_len), rotary_dim, self.rule == "longrope2")
        short = () if self._short is None else check_table("rope.short_factors", self._short, rotary_dim, self.rule == "longrope2")
        found = self._file.get("attention_factor")  # what the table was found with
        attention = self.attention.pair(longrope_attention_factor(self.factor, original_len) if found is None else found)
        regimes = (RopeRegime(() if set(short) == {1.0} else short, attention[0], original_len), RopeRegime(long, attention[1]))
        spec = RopeSpec(rotary_dim, float(base), regimes, original_len, round(self.factor * original_len), self.rule)
        return spec.switched(self.switch)

    def _table(self, rotary_dim: int, base: float, original_len: int) -> Sequence[float]:
        if self._long is None:
            raise UserError("rope.factors: null; give rotary_dim/2 numbers, or a JSON file with a long_factor")
        return self._long

    def _agree(self, base: float, original_len: int) -> None:
        """Raise UserError where the file was made for another model or length."""
        mine = {"rope_theta": base, "original_max_position_embeddings": original_len, "factor": self.factor}
        for key, value in mine.items():
            if (theirs := self._file.get(key)) is not None and not math.isclose(theirs, value, rel_tol=1e-9):
                name = {"rope_theta": "model.rope_theta", "factor": "rope.factor"}.get(key, "model.max_length")
                raise UserError(f"{name}: {value:g} contradicts {key}={theirs:g} of the file in rope.factors; give {name}={theirs:g}")


class LongRope2(LongRope):
    """LongRoPE2: from pair r on searched factors that do not fall, below r NTK's: lambda_i = lambda_r^(i/r).

    rcd: r. `factors` may then hold lambda_r and those after it alone, and be null: s for all, which is no search's result. "auto" is the
    theoretical critical index. null: `factors` are complete. See `LongRope` for the other arguments.
    """

    rule = "longrope2"

    def __init__(
        self, factor: float, factors: str | Sequence[float] | None, short_factors: Sequence[float] | None, rcd: int | str | None,
        attention_factor: Mapping[str, Any], switch: str,
    ) -> None:  # fmt: skip
        super().__init__(factor, factors, short_factors, attention_factor, switch)
        if rcd is not None and rcd != "auto" and (isinstance(rcd, bool) or not isinstance(rcd, int) or rcd < 1):
            raise UserError(f"rope.rcd: {rcd!r}; allowed are null, auto and a pair index from 1")
        self.rcd = rcd

    def _table(self, rotary_dim: int, base: float, original_len: int) -> Sequence[float]:
        pairs = rotary_dim // 2
        if self.rcd is None:
            if self._long is None:
                raise UserError("rope.factors: null; give a table, a search's result file, or rope.rcd=auto for unsearched factors")
            return self._long
        r = self.rcd if isinstance(self.rcd, int) else max(1, min(critical_index(rotary_dim, base, original_len), pairs - 1))
        if r >= pairs:
            raise UserError(f"rope.rcd: {r}; allowed is a pair index from 1 to {pairs - 1}")
        above = [self.factor] * (pairs - r) if self._long is None else list(self._long)
        if len(above) == pairs:
            above = above[r:]
        if len(above) != pairs - r:
            raise UserError(f"rope.factors: {len(above)} values; with rope.rcd={r} allowed are {pairs - r}, from there on, or all {pairs}")
        return (*below_critical(r, above[0]), *above)


NUMBERS = ("factor", "rope_theta", "original_max_position_embeddings", "attention_factor")  # of a file, where it says them


def read_factors(path: str) -> dict[str, Any]:
    """The table in a JSON file: of a search's result, or of a config.json (rope_parameters or rope_scaling in it). Raises UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"rope.factors: {path!r} does not exist; give a JSON file with a long_factor, or a list") from error
    except (OSError, ValueError) as error:
        raise UserError(f"rope.factors: {path!r} cannot be read as JSON ({error})") from error
    nested = [content, *(content.get(key) for key in ("rope_parameters", "rope_scaling"))] if isinstance(content, dict) else []
    table = next((node for node in nested if isinstance(node, dict) and "long_factor" in node), None)
    if table is None:
        raise UserError(f"rope.factors: {path!r} holds no long_factor")
    whole = {**{key: content[key] for key in NUMBERS if key in content}, **table}
    for key in NUMBERS:
        value = whole.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf):
            raise UserError(f"rope.factors: {path!r} has {key}={value!r}; allowed is a number > 0")
    return whole


def check_table(key: str, values: Sequence[float], rotary_dim: int, rising: bool) -> tuple[float, ...]:
    """The factors as floats. rising: refuse ones that fall; else warn. Raises UserError for a wrong number of them, or one below 1."""
    pairs = rotary_dim // 2
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != pairs:
        count = f"{len(values)} values" if isinstance(values, Sequence) else repr(values)
        raise UserError(f"{key}: {count}; allowed are {pairs}, one a rotary pair (rotary dims / 2)")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
            raise UserError(f"{key}[{i}]: {value!r}; allowed is a finite number >= 1")
    falls = [i for i in range(1, pairs) if values[i] < values[i - 1]]
    if falls and rising:
        raise UserError(f"{key}[{falls[0]}]: {values[falls[0]]} is below the one before it, {values[falls[0] - 1]}; they must not fall")
    if falls:
        log.warning("%s: falls at %s; kept as given", key, ", ".join(map(str, falls)))
    return tuple(map(float, values))
