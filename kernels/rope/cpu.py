"""Rotary embedding without gradients by a C kernel (rotate.c), compiled at first use; all else runs in `eager`.

One core of a Zen 5, a decoding step of 32 rows with 10 heads of 32, 24 of which turn, eager / this: 29 / 13 microseconds.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.compile_c import load_library
from kernels.rope import eager


class _Rope(ctypes.Structure):
    """`Rope` of rotate.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_head", "x_step", "table_row")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length", "size", "half")),
        ("threads", ctypes.c_int32),
    ]


_library = load_library(Path(__file__).with_name("rotate.c"))
_library.rope_forward.argtypes, _library.rope_forward.restype = [ctypes.POINTER(_Rope)], None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `kernels.rope.apply_rope`."""
    suits = x.dtype == cos.dtype == sin.dtype == torch.float32 and x.stride(3) == 1 and not torch.compiler.is_compiling()
    if not suits or torch.is_grad_enabled():
        return eager.apply_rope(x, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape)
    problem = _Rope(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.stride()[:3], 0 if cos.shape[0] == 1 else cos.stride(0),
        *x.shape, cos.shape[2], torch.get_num_threads(),
    )  # fmt: skip
    _library.rope_forward(problem)
    return out
