"""Learning-rate schedules: a factor of each group's own peak rate, as a function of the optimizer step alone.

Optimizer steps are counted t = 1..T. During the warm-up of W steps the factor is t / W, so that the first step already learns and step W is
the first at the full rate; the last step T runs at exactly `final_factor`. The functions are given to torch's LambdaLR as partials: they
pickle, and leave nothing but numbers in its state.
"""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from components.contracts import UserError

DECAYS = ("linear", "one_minus_sqrt")


def constant(optimizer: Optimizer, total_steps: int, warmup_steps: int | None, warmup_fraction: float) -> LambdaLR:
    """Warm up linearly, then keep the peak rate.

    total_steps: T. warmup_steps: W; None takes warmup_fraction of T, rounded. Raises UserError when the warm-up does not fit into T.
    """
    warmup = _steps("warmup", warmup_steps, warmup_fraction, total_steps)
    return LambdaLR(optimizer, partial(_constant, warmup=warmup))


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int | None, warmup_fraction: float, final_factor: float) -> LambdaLR:
    """Warm up linearly, then fall along half a cosine to final_factor at the last step (SGDR, arXiv 1608.03983, without restarts).

    total_steps: T. warmup_steps: W; None takes warmup_fraction of T, rounded. final_factor: in [0, 1].
    Raises UserError when the warm-up does not fit into T or the factor is out of range.
    """
    _check_factor(final_factor)
    warmup = _steps("warmup", warmup_steps, warmup_fraction, total_steps)
    return LambdaLR(optimizer, partial(_cosine, warmup=warmup, total=total_steps, final=final_factor))


def wsd(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int | None,
    warmup_fraction: float,
    decay_steps: int | None,
    decay_fraction: float,
    decay: str,
    final_factor: float,
) -> LambdaLR:
    """Warm up linearly, stay at the peak, then decay over the last steps (MiniCPM, arXiv 2404.06395).

    decay_steps: how many steps decay; None takes decay_fraction of T, rounded. decay: `linear`, or `one_minus_sqrt`
    (1 - sqrt(share of the decay done), arXiv 2405.18392). The rest as in `cosine`.
    Raises UserError when warm-up and decay together exceed T, for an unknown decay, or a factor out of range.
    """
    _check_factor(final_factor)
    if decay not in DECAYS:
        raise UserError(f"schedule.decay: {decay}; allowed: {', '.join(DECAYS)}")
    warmup = _steps("warmup", warmup_steps, warmup_fraction, total_steps)
    decaying = _steps("decay", decay_steps, decay_fraction, total_steps)
    if warmup + decaying > total_steps:
        raise UserError(
            f"schedule.decay_steps: {decaying}; with {warmup} of warm-up more than trainer.max_steps={total_steps}; shorten one of them"
        )
    return LambdaLR(optimizer, partial(_wsd, warmup=warmup, decaying=decaying, total=total_steps, decay=decay, final=final_factor))


def _constant(done: int, warmup: int) -> float:
    """Factor of the step that follows `done` finished ones."""
    return min(1.0, (done + 1) / warmup) if warmup else 1.0


def _cosine(done: int, warmup: int, total: int, final: float) -> float:
    if done + 1 <= warmup:
        return (done + 1) / warmup
    progress = min(1.0, (done + 1 - warmup) / (total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _wsd(done: int, warmup: int, decaying: int, total: int, decay: str, final: float) -> float:
    if done + 1 <= warmup:
        return (done + 1) / warmup
    if done + 1 <= total - decaying or not decaying:
        return 1.0
    progress = min(1.0, (done + 1 - (total - decaying)) / decaying)
    return final + (1 - final) * (1 - (math.sqrt(progress) if decay == "one_minus_sqrt" else progress))


def _steps(what: str, steps: int | None, fraction: float, total: int) -> int:
    """Length of a phase: steps where given, else the rounded share of the run."""
    if total < 1:
        raise UserError(f"trainer.max_steps: {total}; a schedule needs at least 1 step")
    if steps is None:
        if not 0 <= fraction < 1:
            raise UserError(f"schedule.{what}_fraction: {fraction}; must be in [0, 1)")
        return min(round(fraction * total), total - 1)
    if not 0 <= steps < total:
        raise UserError(
            f"schedule.{what}_steps: {steps}; must be from 0 to below trainer.max_steps={total}; or set it to null and {what}_fraction"
        )
    return steps


def _check_factor(final_factor: float) -> None:
    if not 0 <= final_factor <= 1:
        raise UserError(f"schedule.final_factor: {final_factor}; must be in [0, 1]")
