"""The least milliseconds that an op can take on a card: bytes, exponentials and FP32 instructions, each by the card's rate.

Pure functions of shapes. Rates of the H200's memory and matrix units are what such cards reach (0.9 and 0.8 of the data sheet); the other
cards' are their data sheets times the same factors, which is an estimate. Nothing here has been compared with a measurement on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_CHECKPOINT_STEPS, _TILE_CHANNELS = 64, 64  # of the scan that the floor is for: steps between kept states, channels of one program
_FORWARD_INSTRUCTIONS, _BACKWARD_INSTRUCTIONS = 5, 14  # FP32 instructions a state number and step


@dataclass(frozen=True)
class Card:
    """bytes_per_second, matmul_flops: reachable. peak_flops: bf16 without sparsity, of the data sheet, for utilisation."""

    name: str
    bytes_per_second: float
    multiprocessors: int
    clock_hz: float
    matmul_flops: float
    peak_flops: float
    fp32_lanes: int = 128  # a clock and multiprocessor
    exps: int = 16  # a clock and multiprocessor


CARDS = (
    Card("H200", 4.3e12, 132, 1.98e9, 790e12, 989e12),
    Card("H100 PCIe", 1.8e12, 114, 1.755e9, 605e12, 756e12),
    Card("H100", 3.0e12, 132, 1.98e9, 790e12, 989e12),
    Card("A100-SXM4-80GB", 1.83e12, 108, 1.41e9, 250e12, 312e12, fp32_lanes=64),
    Card("A100-SXM4-40GB", 1.4e12, 108, 1.41e9, 250e12, 312e12, fp32_lanes=64),
)


@dataclass(frozen=True)
class Floor:
    """Milliseconds by each of the card's limits; the op cannot be faster than the greatest."""

    memory: float
    exp: float = 0.0
    fp32: float = 0.0
    matmul: float = 0.0

    @property
    def ms(self) -> float:
        return max(self.memory, self.exp, self.fp32, self.matmul)


def card_named(name: str) -> Card | None:
    """The card whose name is part of `name` (what torch.cuda.get_device_name returns); None for one that is not listed.

    >>> card_named("NVIDIA H200").multiprocessors
    132
    """
    return next((card for card in CARDS if all(word in name for word in card.name.split())), None)


def card_found(device: torch.device) -> Card | None:
    """The listed card behind `device`; None for the CPU and for others."""
    return card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def scan_bytes(batch: int, length: int, dim: int, states: int, item: int = 2) -> tuple[int, int]:
    """Bytes of the fused scan's forward (u, dt, z in, y out, kept states) and backward (u, dt, z, dy and kept states in, three gradients
    out, dB and dC as one fp32 partial a tile, written and read). item: bytes of an activation."""
    elements = batch * length * dim
    kept = 4 * elements * states // _CHECKPOINT_STEPS
    matrices = 2 * item * batch * length * states  # B and C
    partials = 2 * 2 * 4 * batch * length * states * -(-dim // _TILE_CHANNELS)
    return 4 * item * elements + kept + matrices, 7 * item * elements + kept + matrices + partials


def scan_floor(card: Card, batch: int, length: int, dim: int, states: int, item: int = 2) -> tuple[Floor, Floor]:
    """Floors of the selective scan's forward and backward.

    >>> forward, backward = scan_floor(CARDS[0], 8, 4096, 3072, 16)
    >>> round(forward.ms + backward.ms, 1)
    1.1
    """
    updates = batch * length * dim * states
    clocks = card.multiprocessors * card.clock_hz
    exp = 1e3 * updates / (card.exps * clocks)

    def floor(size: int, instructions: int) -> Floor:
        return Floor(1e3 * size / card.bytes_per_second, exp, 1e3 * instructions * updates / (card.fp32_lanes * clocks))

    forward, backward = scan_bytes(batch, length, dim, states, item)
    return floor(forward, _FORWARD_INSTRUCTIONS), floor(backward, _BACKWARD_INSTRUCTIONS)


def traffic_floor(card: Card, forward: float, backward: float) -> tuple[Floor, Floor]:
    """Floors of an op that only moves bytes."""
    return Floor(1e3 * forward / card.bytes_per_second), Floor(1e3 * backward / card.bytes_per_second)


def conv_bytes(batch: int, length: int, dim: int, item: int = 2) -> tuple[int, int]:
    """x in, y out; x, dy in, dx out."""
    elements = batch * length * dim
    return 2 * item * elements, 3 * item * elements


def add_norm_bytes(rows: int, size: int, item: int = 2) -> tuple[int, int]:
    """Branch and fp32 stream in, normed and stream out; dnormed, stream and its gradient in, the gradients of stream and branch out."""
    elements = rows * size
    return (2 * item + 8) * elements, (2 * item + 12) * elements


def swiglu_bytes(rows: int, size: int, item: int = 2) -> tuple[int, int]:
    """gate, up in, product out; gate, up, gradient in, two gradients out."""
    elements = rows * size
    return 3 * item * elements, 5 * item * elements


def window_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of one row and head.

    >>> window_pairs(4, 2), window_pairs(4, None)
    (7, 10)
    """
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def attention_flops(batch: int, heads: int, length: int, head_dim: int, window: int | None) -> tuple[float, float]:
    """Matmul FLOPs of the forward (two products) and of a backward that computes the scores again (five)."""
    forward = 4.0 * batch * heads * head_dim * window_pairs(length, window)
    return forward, 2.5 * forward


def attention_floor(
    card: Card, batch: int, heads: int, groups: int, length: int, head_dim: int, window: int | None, item: int = 2
) -> tuple[Floor, Floor]:
    """Floors of windowed attention that never writes its scores."""
    flops = attention_flops(batch, heads, length, head_dim, window)
    query, key = (item * batch * n * length * head_dim for n in (heads, groups))
    sizes = (2 * query + 2 * key, 4 * query + 4 * key)  # q, k, v in, o out; q, k, v, o and do in, dq, dk, dv out
    forward, backward = (
        Floor(1e3 * size / card.bytes_per_second, matmul=1e3 * work / card.matmul_flops) for size, work in zip(sizes, flops)
    )
    return forward, backward


def cross_entropy_floor(card: Card, rows: int, size: int, vocabulary: int) -> tuple[Floor, Floor]:
    """Floors of the head with its loss, whose gradients are made along with it: one product forward, two for the gradients."""
    work = 2.0 * rows * size * vocabulary
    return Floor(0.0, matmul=1e3 * work / card.matmul_flops), Floor(0.0, matmul=2e3 * work / card.matmul_flops)


def samba_step_ms(
    card: Card,
    rows: int,
    length: int,
    *,
    parameters: int,
    hidden_size: int,
    intermediate_size: int,
    channels: int,
    state_size: int,
    num_heads: int,
    head_dim: int,
    window: int,
    num_layers: int,
) -> dict[str, float]:
    """Least milliseconds of one training step of Samba by kind of work, in bf16 on a float32 stream; their sum is the floor, since the
    kinds run one after the other. Six FLOPs a parameter and token; half the layers are Mamba, the others attention; no optimizer."""
    tokens, half = rows * length, num_layers // 2
    flops = attention_flops(rows, num_heads, length, head_dim, window)
    per_layer = {
        "scan": sum(floor.ms for floor in scan_floor(card, rows, length, channels, state_size)),
        "conv": 1e3 * sum(conv_bytes(rows, length, channels)) / card.bytes_per_second,
        "attention": 1e3 * sum(flops) / card.matmul_flops,
    }
    return {
        "matmul": 6e3 * parameters * tokens / card.matmul_flops,
        **{name: half * ms for name, ms in per_layer.items()},
        "norm": 2 * num_layers * 1e3 * sum(add_norm_bytes(tokens, hidden_size)) / card.bytes_per_second,
        "swiglu": num_layers * 1e3 * sum(swiglu_bytes(tokens, intermediate_size)) / card.bytes_per_second,
    }
