"""Pure functions from logits to tokens. Randomness is counter-based: no generator, no state, nothing shared between rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from components.contracts import SamplingParams, UserError

GOLDEN = 0x9E3779B97F4A7C15  # increment of splitmix64, 2^64 / golden ratio
MASK = (1 << 64) - 1


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


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def mix64(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit counters (Steele, Lea & Flood 2014, the output function of splitmix64). x: uint64 array; returns the same shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, rows: list[int], positions: list[int]) -> Tensor:
    """Random numbers that depend on (seed, row, position) alone, so that what else is in the batch never changes a row.

    rows, positions: B non-negative counters. Returns (B,) float64 on the CPU, multiples of 2^-52 in [0, 1).
    """
    golden = np.uint64(GOLDEN)
    state = mix64(np.array([(seed + GOLDEN) & MASK], dtype=np.uint64))
    state = mix64(state + (np.array(rows, dtype=np.uint64) + np.uint64(1)) * golden)
    state = mix64(state + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * golden)
    # 52 bits, not 53: then u * total < total in float64 for every total, and the search below never runs off the end
    return torch.from_numpy((state >> np.uint64(12)).astype(np.float64) * 2.0**-52)


def sample_token(logits: Tensor, params: SamplingParams, uniform: Tensor, blocked: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose one token a row: the most likely at temperature 0, else by inverse CDF after temperature, top-k, then top-p.

    logits: (B, V) float32. uniform: (B,) float64 in [0, 1), see `uniforms`. blocked: (V,) bool, tokens that are never chosen.
    Returns ids (B,) int64 and logprobs (B,) float32: log-probability under the model's own distribution (all V rows, temperature 1, nothing
    cut off), so that it equals what `Engine.score` gives for the same token.
    Note: tokens that tie with the k-th largest logit are all kept; a cut among equals would depend on the sorting algorithm.
    """
    allowed = logits if blocked is None else logits.masked_fill(blocked, -torch.inf)
    if params.temperature == 0:
        ids = allowed.argmax(dim=-1)
    else:
        ids = _inverse_cdf(allowed, params, uniform.to(logits.device))
    return ids, logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


def _inverse_cdf(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """Sample (B,) ids. logits (B, V) may hold -inf. Subtracting the maximum first keeps tiny temperatures finite."""
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature  # (B, V)
    if params.top_k is not None and params.top_k < scaled.shape[-1]:
        kth = scaled.topk(params.top_k, dim=-1).values[:, -1:]  # (B, 1)
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    probabilities, order = scaled.softmax(dim=-1), None
    if params.top_p is not None and params.top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities  # mass of the more likely tokens
        probabilities = probabilities.masked_fill(before >= params.top_p, 0)  # the first token always stays
    cdf = probabilities.cumsum(dim=-1, dtype=torch.float64)  # (B, V)
    picked = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)  # (B, 1); right: skips tokens of no mass
    return (picked if order is None else order.gather(1, picked)).squeeze(1)
