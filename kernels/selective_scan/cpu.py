"""Selective scan on the CPU by a C kernel (scan.c), compiled at first use; float64 runs in `eager`.

Two threads of a Zen 5, fp32, B=4 L=512 D=512 N=16, forward and backward: see `python -m benchmarks.selective_scan`.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compile_c import load_library
from kernels.selective_scan import eager

MAX_STATES = 256  # bounds the kernel's work space; more run in eager


class _Scan(ctypes.Structure):
    """`Scan` of scan.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "dt", "z")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("u", "dt", "z") for axis in ("row", "step")),
        *((name, ctypes.c_void_p) for name in ("A2", "B", "C", "D", "bias", "h0", "start", "y", "final", "saved")),
        *((name, ctypes.c_void_p) for name in ("dy", "dfinal", "du", "ddt", "dz", "dB", "dC", "dA", "dD", "dbias", "dh0")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "dim", "states", "bc_step")),
        *((name, ctypes.c_int32) for name in ("bf16", "softplus", "threads")),
    ]


_library = load_library(Path(__file__).with_name("scan.c"))
for _function in (_library.selective_scan_forward, _library.selective_scan_backward):
    _function.argtypes, _function.restype = [ctypes.POINTER(_Scan)], None
_GROUP_CHANNELS: int = _library.selective_scan_group_channels()  # of a work item: dB and dC come as one partial each
_CHUNK: int = _library.selective_scan_chunk()  # steps between kept states: for N=16 they are as large as u


def _fill(problem: _Scan, **tensors: Tensor | None) -> None:
    """Set pointers; of u, dt and z also the strides."""
    for name, tensor in tensors.items():
        setattr(problem, name, None if tensor is None else tensor.data_ptr())
        if tensor is not None and name in ("u", "dt", "z"):
            setattr(problem, f"{name}_row", tensor.stride(0))
            setattr(problem, f"{name}_step", tensor.stride(1))


def _float(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


class _Problem:
    """One call's tensors as the kernel reads them; holds them alive."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
        softplus: bool, start: Tensor | None,
    ) -> None:  # fmt: skip
        self.batch, self.length, self.dim = u.shape
        self.states = A.shape[1]
        bf16 = u.dtype == torch.bfloat16 and dt.dtype == u.dtype and (z is None or z.dtype == u.dtype)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

        def activation(tensor: Tensor | None) -> Tensor | None:
            """In the kernel's dtype, channels next to each other."""
            if tensor is None:
                return None
            tensor = tensor.to(self.dtype)
            return tensor if tensor.stride(2) == 1 or self.dim == 1 else tensor.contiguous()

        A2 = (A.to(torch.float32) * math.log2(math.e)).t().contiguous()  # (N, D)
        self.tensors = {
            "u": activation(u), "dt": activation(dt), "z": activation(z), "A2": A2, "B": _float(B), "C": _float(C), "D": _float(D),
            "bias": _float(bias), "start": None if start is None else start.contiguous(),
        }  # fmt: skip
        self.raw = _Scan(
            batch=self.batch, length=self.length, dim=self.dim, states=self.states, bc_step=self.states, bf16=bf16, softplus=softplus,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        _fill(self.raw, **self.tensors)

    def activations(self) -> Tensor:
        """Uninitialised (B, L, D)."""
        return torch.empty(self.batch, self.length, self.dim, dtype=self.dtype)


def _forward(p: _Problem, h0: Tensor | None, keep: bool, final: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y (B, L, D), the last state (B, D, N) and, to `keep` for a backward, the states before each chunk.

    final: where the last state is written; h0 itself may be, since each state is read before it is written.
    """
    y, final = p.activations(), torch.empty(p.batch, p.dim, p.states) if final is None else final
    saved = torch.empty(math.ceil(p.length / _CHUNK), p.batch, p.states, p.dim) if keep else None
    before = _float(h0)
    _fill(p.raw, y=y, final=final, saved=saved, h0=before)
    _library.selective_scan_forward(p.raw)
    return y, final, saved


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
        h0: Tensor | None, softplus: bool, start: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        keep = any(ctx.needs_input_grad)
        y, final, saved = _forward(_Problem(u, dt, A, B, C, D, z, bias, softplus, start), h0, keep)
        ctx.softplus = softplus
        ctx.save_for_backward(u, dt, A, B, C, D, z, bias, h0, start, saved)
        return y.to(u.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, bias, h0, start, saved = ctx.saved_tensors
        p = _Problem(u, dt, A, B, C, D, z, bias, ctx.softplus, start)
        groups = math.ceil(p.dim / _GROUP_CHANNELS)
        dB, dC = (torch.empty(groups, p.batch, p.length, p.states) for _ in range(2))
        dA, dD, dbias = torch.empty(p.batch, p.states, p.dim), torch.empty(p.batch, p.dim), torch.empty(p.batch, p.dim)
        dh0 = None if h0 is None else torch.empty(p.batch, p.dim, p.states)
        du, ddt, dz = p.activations(), p.activations(), None if z is None else p.activations()
        dy, dfinal = dy.to(p.dtype).contiguous(), dfinal.to(torch.float32).contiguous()
        _fill(p.raw, saved=saved, dy=dy, dfinal=dfinal, du=du, ddt=ddt, dz=dz, dB=dB, dC=dC, dA=dA, dD=dD, dbias=dbias, dh0=dh0)
        _library.selective_scan_backward(p.raw)
        return (
            du.to(u.dtype),
            ddt.to(dt.dtype),
            dA.sum(dim=0).t().to(A.dtype),
            dB.sum(dim=0).to(B.dtype),
            dC.sum(dim=0).to(C.dtype),
            None if D is None else dD.sum(dim=0).to(D.dtype),
            None if dz is None else dz.to(z.dtype),
            None if bias is None else dbias.sum(dim=0).to(bias.dtype),
            None if dh0 is None else dh0.to(h0.dtype),
            None,
            None,
        )


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.selective_scan.selective_scan`."""
    if u.dtype == torch.float64 or A.shape[1] > MAX_STATES:
        return eager.selective_scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, document_start)
    if torch.is_grad_enabled():
        return _CompiledScan.apply(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, document_start)
    y, final, _ = _forward(_Problem(u, dt, A, B, C, D, z, dt_bias, dt_softplus, document_start), initial_state, keep=False)
    return y.to(u.dtype), final


def selective_state_update(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """See `kernels.selective_scan.selective_state_update`."""
    if u.dtype == torch.float64 or A.shape[1] > MAX_STATES or state.dtype != torch.float32 or not state.is_contiguous():
        return eager.selective_state_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return _forward(_Problem(u, dt, A, B, C, D, z, dt_bias, dt_softplus, None), state, keep=False, final=state)[0].to(u.dtype)
