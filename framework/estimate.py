"""What a run will cost, said before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from components.contracts import Batch
from components.losses.lm import next_token_loss
from framework.callbacks.exact_state import rng_state, set_rng_state
from framework.runtime import compute_dtype, peak_memory_bytes

ASSUMED_UTILISATION = 0.3  # of a GPU's peak, where nothing was timed
SLOW_SECONDS = 5.0  # a trial step slower than this is not repeated


@dataclass(frozen=True)
class Estimate:
    """Cost of a run: seconds of training, bytes of memory, and how they were found."""

    seconds: float | None
    memory_bytes: float
    source: str


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; shared ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def trial(model: nn.Module, vocab_size: int, rows: int, seq_len: int, precision: str) -> float:
    """Seconds of one forward and backward on the CPU; weights, gradients and generators are as before afterwards.

    The tokens are arbitrary: cost does not depend on them.
    """
    state, best = rng_state(), float("inf")
    ids = (torch.arange(rows * (seq_len + 1)).view(rows, -1) * 7919) % vocab_size
    batch = Batch(input_ids=ids[:, :-1], labels=ids[:, 1:].contiguous(), segment_ids=torch.zeros(rows, seq_len, dtype=torch.int32))
    batch.position_ids = torch.arange(seq_len).expand(rows, seq_len)
    dtype = compute_dtype(precision)
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(batch)
            loss = next_token_loss(output.hidden, model.head_weight, batch.labels, rows * seq_len)  # type: ignore[arg-type]
        loss.backward()
        for p in model.parameters():
            p.grad = None
        best = min(best, time.perf_counter() - start)
        if best > SLOW_SECONDS:
            break
    set_rng_state(state)
    return best


def estimate(
    model: nn.Module, device: torch.device, *, vocab_size: int, rows: int, seq_len: int, precision: str, micro_batches: int,
    flops_per_token: float, peak_flops: float | None,
) -> Estimate:  # fmt: skip
    """Estimate a run of `micro_batches` batches of (rows, seq_len) tokens.

    On a CPU from one timed forward and backward; on a GPU from the FLOP count at 30 % of its peak. Memory: what the process reached in
    the trial (on a GPU: nothing of the activations), plus two optimizer moments.
    """
    trainable, total = count_parameters(model)
    if device.type == "cpu":
        seconds: float | None = trial(model, vocab_size, rows, seq_len, precision) * micro_batches
        return Estimate(seconds, peak_memory_bytes() + 8.0 * trainable, "from one timed step")
    tokens = micro_batches * rows * seq_len
    seconds = tokens * flops_per_token / (ASSUMED_UTILISATION * peak_flops) if peak_flops else None
    return Estimate(seconds, 4.0 * total + 12.0 * trainable, "from the FLOP count; memory without activations")
