"""Layers of a decoder over weights that are packed once: a linear layer, a SwiGLU MLP, attention with its cache. Without gradients.

In `cpu` a row of a result has the same bits whatever other rows there are. In `eager` that depends on the shape (oneDNN: not for N=70 and
K=1100).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.checks import expect_dims, expect_shape
from kernels.dispatch import pick

__all__ = ["attention", "linear", "mamba", "mlp", "mlp_block", "pack", "pack_mamba"]


def pack(weight: Tensor, bias: Tensor | None = None) -> Any:
    """Copy a weight (N, K) and a bias (N,) into the layout of the device's fastest product. Only the functions of this module read it.

    Raises: ValueError for shapes that do not fit.
    """
    expect_dims("pack", "weight", weight, 2, "(N, K)")
    expect_shape("pack", "bias", bias, weight.shape[0], letters="(N,)")
    return pick("packed", weight.device).pack(weight, bias)


def linear(x: Tensor, weight: Any) -> Tensor:
    """x (..., K) times the packed weight, plus its bias. Returns (..., N)."""
    return pick("packed", x.device).linear(x, weight)


def mlp(x: Tensor, gate_up: Any, down: Any) -> Tensor:
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6). x: (..., D); gate_up: packed (2F, D), the gate first; down: packed (D, F)."""
    return pick("packed", x.device).mlp(x, gate_up, down)


def mlp_block(branch: Tensor, stream: Tensor, norm: tuple[Tensor, float], gate_up: Any, down: Any) -> Tensor:
    """The second half of a pre-norm block: s + mlp(rms_norm(s)) with s = stream + branch, both (..., D).

    norm: weight (D,) and eps of `kernels.rms_norm`. gate_up, down: as in `mlp`. Raises: ValueError for shapes that differ.
    """
    expect_shape("mlp_block", "stream", stream, *branch.shape, letters="branch's shape")
    return pick("packed", branch.device).mlp_block(branch, stream, norm, gate_up, down)


def attention(
    x: Tensor,
    norm: tuple[Tensor, float] | None,
    qkv: Any,
    o: Any,
    rope: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    heads: int,
    window: int | None = None,
    fresh: bool = False,
) -> Tensor:
    """Causal grouped-query attention of new tokens against a cache, which takes their keys and values, from projection to projection.

    Args:
        x: (B, T, D). norm: weight (D,) and eps of `kernels.rms_norm`, which comes first; None: none does.
        qkv: packed (H*K + 2*G*K, D), head-major. o: packed (D, H*K). heads: H.
        rope: cos, sin (B or 1, T, R/2) float32, which turn queries and keys (see `kernels.rope`); None: no positions.
        keys, values: (B, G, S, K), changed in place: position p lies in slot p mod S. With a window S is the window, else at least as
            many slots as there are tokens.
        positions: (B, T) int64, those of the new tokens.
        fresh: no row has read a token yet. With a window and T > 1 it must be so: written keys would hide those that are still seen.

    Returns: (B, T, D). Raises: ValueError for more than one token a row that has begun, with a window.
    """
    expect_dims("attention", "keys", keys, 4, "(B, G, S, K)")
    expect_shape("attention", "values", values, *keys.shape, letters="keys' shape")
    expect_shape("attention", "positions", positions, *x.shape[:2], letters="(B, T)")
    if window is not None and not fresh and x.shape[1] > 1:
        raise ValueError(f"attention: {x.shape[1]} tokens a row that has begun, with a window of {window}; expected one")
    return pick("packed", x.device).attention(x, norm, qkv, o, rope, keys, values, positions, heads, window, fresh)


def pack_mamba(
    in_proj: Any, conv_weight: Tensor, conv_bias: Tensor, x_proj: Any, dt_proj: Any, dt_bias: Tensor, A: Tensor, D: Tensor, out_proj: Any
) -> Any:
    """The weights of a Mamba-1 mixer (arXiv 2312.00752, Alg. 2) with C channels, N states and W taps, for `mamba`; copies but the packed.

    Args:
        in_proj: packed (2C, E), inputs first, then gates. x_proj: packed (R + 2N, C): dt, B, C. dt_proj: packed (C, R).
            out_proj: packed (E, C).
        conv_weight, conv_bias: (C, W), (C,). dt_bias, D: (C,). A: (C, N), negative.

    Raises: ValueError for shapes that do not fit.
    """
    expect_dims("pack_mamba", "A", A, 2, "(C, N)")
    expect_dims("pack_mamba", "conv_weight", conv_weight, 2, "(C, W)")
    for name, tensor in (("conv_bias", conv_bias), ("dt_bias", dt_bias), ("D", D), ("conv_weight", conv_weight[:, 0])):
        expect_shape("pack_mamba", name, tensor, A.shape[0], letters="(C,)")
    return pick("packed", A.device).pack_mamba(in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj)


def mamba(x: Tensor, norm: tuple[Tensor, float] | None, mixer: Any, taps: Tensor, state: Tensor) -> Tensor:
    """A Mamba-1 mixer over new tokens x (B, L, E), from projection to projection, going on from what the rows have read.

    Args:
        norm: weight (E,) and eps of `kernels.rms_norm`, which comes first; None: none does.
        mixer: of `pack_mamba`.
        taps: (B, W-1, C), the last inputs of the convolution; state: (B, C, N). Both are changed in place.

    Returns: (B, L, E). Raises: ValueError for shapes that do not fit.
    """
    expect_dims("mamba", "x", x, 3, "(B, L, E)")
    expect_dims("mamba", "state", state, 3, "(B, C, N)")
    expect_dims("mamba", "taps", taps, 3, "(B, W-1, C)")
    expect_shape("mamba", "state", state[:, :, 0], x.shape[0], taps.shape[2], letters="(B, C)")
    return pick("packed", x.device).mamba(x, norm, mixer, taps, state)
