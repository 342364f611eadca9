"""Causal convolution without gradients by a C kernel (conv.c), compiled at first use; all else runs in `eager`.

One core of a Zen 5, a decoding step of 20 rows of 512 channels, 4 taps and silu, eager / this: 38 / 10 microseconds.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.causal_conv1d import eager
from kernels.compile_c import load_library


class _Conv(ctypes.Structure):
    """`Conv` of conv.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "history", "out", "state")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "dim", "taps", "x_row", "x_step")),
        *((name, ctypes.c_int32) for name in ("silu", "threads")),
    ]


_library = load_library(Path(__file__).with_name("conv.c"))
_library.causal_conv1d_forward.argtypes, _library.causal_conv1d_forward.restype = [ctypes.POINTER(_Conv)], None
_MAX_TAPS: int = _library.causal_conv1d_max_taps()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.causal_conv1d.causal_conv1d`."""
    floats = all(t is None or t.dtype == torch.float32 for t in (x, weight, bias, initial_state))
    suits = floats and document_start is None and weight.shape[1] <= _MAX_TAPS and not torch.compiler.is_compiling()
    if torch.is_grad_enabled() or not suits:
        return eager.causal_conv1d(x, weight, bias, activation, initial_state, document_start)
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    history = None if initial_state is None else initial_state.contiguous()
    batch, length, dim = x.shape
    out, state = torch.empty(batch, length, dim), torch.empty(batch, weight.shape[1] - 1, dim)
    problem = _Conv(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), None if history is None else history.data_ptr(),
        out.data_ptr(), state.data_ptr(), batch, length, dim, weight.shape[1], x.stride(0), x.stride(1), activation == "silu",
        torch.get_num_threads(),
    )  # fmt: skip
    _library.causal_conv1d_forward(problem)
    return out, state
