"""Option task=decode_cost: what one more token costs after 128, 1024, ... tokens, in time and in memory. Trains nothing."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from components.contracts import Batch, UserError
from components.decode_state import DecodeState
from components.decoding.graph_step import StaticStep
from framework.build import read_config
from framework.parts import Parts
from framework.procedure import Context, Procedure, autocast, refuse_several_tasks, refuse_unheard, text_ids

WARM_UP = 2  # tokens of each turn that are not counted: the first meets caches full of another position's state


@dataclass
class Place:
    """A position on the way: a copy of the state there, its size, the token that comes next, and what was measured."""

    state: DecodeState
    state_bytes: int
    token: Tensor  # (1, 1) int64
    prefill_seconds: float  # from the first token on
    step: Callable[[Tensor], Tensor] | None = None  # token (1, 1) -> logits (1, V)
    milliseconds: list[float] = field(default_factory=list)


class DecodeCost(Procedure):
    """Reads the data's held-out text (then its training text) in chunks, stops at each position, and decodes greedily from there.

    The weights are those of the run, random without `ckpt=`: cost does not depend on them, the text it would say does. Positions take
    turns, so that a change of the machine's load meets all of them. One row, so that nothing hides behind a batch.

    Args:
        positions: tokens read before the timed ones.
        tokens: decoded and timed at each position in its turn, after 2 that are not counted.
        repeats: turns of every position; a figure is the median over tokens * repeats.
        prefill_chunk: prompt tokens a forward.

    Metrics: decode/ms_per_token@P; decode/slowdown@P, that over the one at the smallest position, and decode/slowdown for the largest;
    decode/state_bytes@P; prefill/seconds@P, from the first token to P; decode/rss_growth_bytes: by how much the process is larger at the
    largest position than at the smallest (Linux; copies kept for the timing are not counted); decode/state_growth_bytes: the state itself.

    Keys about how a run trains (optimizer, schedule, trainer.max_steps, ...) have a value in every run and mean nothing here. One that asks
    for something which is off by default, and would not happen, is refused.

    Raises: UserError for a number below 1, fewer than two positions, data with too few tokens, or a key of ASKS that is set.
    """

    def __init__(self, positions: list[int], tokens: int, repeats: int, prefill_chunk: int) -> None:
        for key, value in (
            ("tokens", tokens),
            ("repeats", repeats),
            ("prefill_chunk", prefill_chunk),
            *(("positions", p) for p in positions),
        ):
            if value < 1:
                raise UserError(f"task.{key}: {value}; at least 1 is allowed")
        if len(set(positions)) < 2:
            raise UserError(f"task.positions: {positions}; at least two different positions are allowed, to compare them")
        self.positions = sorted(set(positions))
        self.tokens, self.repeats, self.prefill_chunk = tokens, repeats, prefill_chunk

    def check(self, config: DictConfig, parts: Parts) -> None:
        """Refuse what is several models."""
        refuse_several_tasks(parts)

    def run(self, context: Context) -> dict[str, float]:
        """Measure; rows of metrics.csv are one a position."""
        refuse_unheard(read_config(context.run_dir))
        ids = text_ids(context.data, self.positions[-1] + 1, context.seed, "task.positions")[None].to(context.device)
        with torch.inference_mode(), autocast(context):
            self._warm_up(context, ids)
            places, rss_growth = self._prefill(context, ids)
            for place in places.values():
                place.step = stepper(context, place.state)
            for turn in range(self.repeats):
                context.progress(f"timing, turn {turn + 1} of {self.repeats}" if turn % 10 == 0 else None)
                for place in places.values():
                    self._decode(context, place)
        least = statistics.median(places[self.positions[0]].milliseconds)
        metrics: dict[str, float] = {}
        for step, (position, place) in enumerate(places.items()):
            cost = statistics.median(place.milliseconds)
            row = {
                "decode/ms_per_token": cost, "decode/slowdown": cost / least, "decode/state_bytes": place.state_bytes,
                "prefill/seconds": place.prefill_seconds,
            }  # fmt: skip
            context.log({"tokens": position, **row}, step)
            context.progress(
                f"position {position:,}: {cost:.2f} ms a token ({cost / least:.2f} of the first), state {place.state_bytes:,} bytes, "
                f"read in {place.prefill_seconds:.1f} s"
            )
            metrics |= {f"{key}@{position}": value for key, value in row.items()}
        first, last = places[self.positions[0]], places[self.positions[-1]]
        metrics["decode/slowdown"] = metrics[f"decode/slowdown@{self.positions[-1]}"]
        metrics["decode/state_growth_bytes"] = last.state_bytes - first.state_bytes
        return metrics | ({} if rss_growth is None else {"decode/rss_growth_bytes": rss_growth})

    def _warm_up(self, context: Context, ids: Tensor) -> None:
        """Two chunks and two steps for nothing: what is made when it is first used is neither timed nor counted as growth."""
        state = context.model.new_state(1, 2 * self.prefill_chunk + WARM_UP, context.dtype)
        token = ids[:, :1]
        for piece in (*ids[:, : 2 * self.prefill_chunk].split(self.prefill_chunk, dim=1), *[token] * WARM_UP):
            context.model.logits(context.model(Batch(piece), state).hidden[:, -1])

    def _prefill(self, context: Context, ids: Tensor) -> tuple[dict[int, Place], int | None]:
        """Read ids (1, T) once, leaving a copy of the state at every position. Also the growth of the process between first and last."""
        model = context.model
        state = model.new_state(1, self.positions[-1] + self._decoded(), context.dtype)
        places: dict[int, Place] = {}
        read, seconds, copied, resident = 0, 0.0, 0, []
        for position in self.positions:
            while read < position:
                chunk = ids[:, read : min(read + self.prefill_chunk, position)]
                began = time.perf_counter()
                model(Batch(chunk), state)
                synchronize(context.device)
                seconds += time.perf_counter() - began
                read += chunk.shape[1]
                context.progress()
            if position in (self.positions[0], self.positions[-1]):
                resident.append((resident_bytes() or 0) - copied)
            places[position] = Place(state.fork(1), state.size_bytes, ids[:, position : position + 1], seconds)
            copied += places[position].state.size_bytes
            context.progress(f"read {position:,} tokens in {seconds:.1f} s")
        return places, None if resident_bytes() is None else resident[-1] - resident[0]

    def _decode(self, context: Context, place: Place) -> None:
        """One turn: greedy steps, timed one by one."""
        assert place.step is not None
        for count in range(WARM_UP + self.tokens):
            began = time.perf_counter()
            place.token = place.step(place.token).argmax(-1, keepdim=True)
            synchronize(context.device)
            if count >= WARM_UP:
                place.milliseconds.append(1e3 * (time.perf_counter() - began))
        context.progress()

    def _decoded(self) -> int:
        """Tokens that a copy of the state takes in all its turns."""
        return self.repeats * (WARM_UP + self.tokens)


def stepper(context: Context, state: DecodeState) -> Callable[[Tensor], Tensor]:
    """token (1, 1) -> logits (1, V), from the state on: as a CUDA graph on a GPU where the state is of constant size."""
    model = context.model
    if context.device.type == "cuda" and state.constant_size:
        static = StaticStep(model, state, 1, context.dtype)
        static.load(state)
        return static
    return lambda token: model.logits(model(Batch(token), state).hidden[:, -1])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is done when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes() -> int | None:
    """Resident size of this process once what is free was given back to the system; None where /proc does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return None
