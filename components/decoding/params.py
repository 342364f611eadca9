"""Whether sampling parameters are ones that can be decoded with."""

from __future__ import annotations

import math

from components.contracts import Constraint, SamplingParams, UserError
from components.decoding.constraints import automaton


def check_params(params: SamplingParams) -> None:
    """Raise UserError naming the key under `decode` (or the run-level key) whose value is not allowed."""
    if not _whole(params.max_new_tokens):
        raise UserError(f"max_new_tokens: {params.max_new_tokens}; a whole number of at least 1 is allowed")
    if not _number(params.temperature) or params.temperature < 0:
        raise UserError(f"decode.temperature: {params.temperature}; a finite number >= 0 is allowed, 0 is greedy")
    if params.top_k is not None and not _whole(params.top_k):
        raise UserError(f"decode.top_k: {params.top_k}; null (off) or a whole number of at least 1 is allowed")
    if params.top_p is not None and (not _number(params.top_p) or not 0 < params.top_p <= 1):
        raise UserError(f"decode.top_p: {params.top_p}; null (off) or a number above 0 and up to 1 is allowed")
    if params.min_p is not None and (not _number(params.min_p) or not 0 <= params.min_p <= 1):
        raise UserError(f"decode.min_p: {params.min_p}; null (off) or a number from 0 to 1 is allowed")
    if not _number(params.repetition_penalty) or params.repetition_penalty <= 0:
        raise UserError(f"decode.repetition_penalty: {params.repetition_penalty}; a finite number above 0 is allowed, 1 is off")
    if not _whole(params.min_new_tokens, 0) or params.min_new_tokens > params.max_new_tokens:
        raise UserError(f"decode.min_new_tokens: {params.min_new_tokens}; a whole number from 0 to {params.max_new_tokens} is allowed")
    if not isinstance(params.seed, int) or isinstance(params.seed, bool):
        raise UserError(f"seed: {params.seed!r}; a whole number is allowed")
    if isinstance(params.stop, str) or not all(isinstance(text, str) and text for text in params.stop):
        raise UserError(f"decode.stop: {params.stop!r}; a list of texts is allowed, none of them empty")
    if not all(_whole(i, 0) for i in params.stop_ids):
        raise UserError(f"decode.stop_ids: {params.stop_ids!r}; a list of token ids is allowed")
    if params.constraint is not None:
        _check_constraint(params, params.constraint)
    if params.logprobs is not None and not _whole(params.logprobs, 0):
        raise UserError(f"decode.logprobs: {params.logprobs}; null (off) or a whole number of at least 0 is allowed")


def _check_constraint(params: SamplingParams, constraint: Constraint) -> None:
    """A constraint says what an answer is and when it ends: nothing else may cut it short or draw it out."""
    key = "choice" if constraint.regex is None else "regex"
    others = {"stop": list(params.stop), "min_new_tokens": params.min_new_tokens, "ignore_eos": params.ignore_eos}
    for name, value in others.items():
        if value:
            raise UserError(f"decode.{name}: {value!r} is not allowed with decode.{key}, which says when an answer ends; drop one of them")
    automaton(constraint)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
