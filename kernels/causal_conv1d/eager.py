"""Causal convolution as W shifted multiply-adds; the backward recomputes the pre-activation instead of keeping it.

Against F.conv1d with groups on one AVX-512 core, B=8 L=256 D=384 W=4, forward and backward:
4.4 against 10.4 ms (fp32), 4.7 against 14.8 ms (bf16).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _tap_masks(start: Tensor | None, width: int) -> list[Tensor | None]:
    """For each distance j = 0..W-1: (B, L, 1) bool, True where x_{t-j} lies before the document of position t; None where nowhere."""
    if start is None or (start.device.type == "cpu" and not bool(start.any())):
        return [None] * width
    same = ~start  # position t continues the document of t-1
    masks: list[Tensor | None] = [None]
    alive = torch.ones_like(start)
    for _ in range(1, width):
        alive = same & F.pad(alive[:, :-1], (1, 0), value=True)
        masks.append(~alive.unsqueeze(2))
    return masks


def _own(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros where `mask`: not a product, which would carry infinity and NaN across a document's start."""
    return x if mask is None else x.masked_fill(mask, 0)


def _with_history(x: Tensor, history: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    """(B, W-1+L, D): the state, then x."""
    batch, length, dim = x.shape
    extended = x.new_empty(batch, width - 1 + length, dim, dtype=dtype)
    if history is None:
        extended[:, : width - 1].zero_()
    else:
        extended[:, : width - 1].copy_(history)
    extended[:, width - 1 :].copy_(x)
    return extended


def _convolve(extended: Tensor, taps: Tensor, bias: Tensor | None, masks: list[Tensor | None]) -> Tensor:
    """Pre-activation (B, L, D). taps: (W, D)."""
    width = len(taps)
    length = extended.shape[1] - width + 1
    y = extended[:, width - 1 :] * taps[-1]
    if bias is not None:
        y.add_(bias)
    for back in range(1, width):
        source, mask = extended[:, width - 1 - back : width - 1 - back + length], masks[back]
        y.addcmul_(_own(source, mask), taps[width - 1 - back])
    return y


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    width, length = weight.shape[1], x.shape[1]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    extended = _with_history(x, history, width, acc)
    masks = _tap_masks(start, width)
    y = _convolve(extended, weight.t().to(acc).contiguous(), None if bias is None else bias.to(acc), masks)
    if silu:
        y = F.silu(y, inplace=True)
    state = extended[:, length:].clone()
    for back in range(1, width - 1):  # the state's column W-2-j lies j before the last position
        mask = masks[back]
        if mask is not None:
            state[:, width - 2 - back].masked_fill_(mask[:, -1], 0)
    return y.to(x.dtype), state.to(x.dtype)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, history, start)
        ctx.silu = silu
        return _forward(x, weight, bias, silu, history, start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, history, start = ctx.saved_tensors
        width, length = weight.shape[1], x.shape[1]
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        extended = _with_history(x, history, width, acc)
        masks = _tap_masks(start, width)
        taps = weight.t().to(acc).contiguous()  # (W, D)
        dpre = dy.to(acc)
        if ctx.silu:
            pre = _convolve(extended, taps, None if bias is None else bias.to(acc), masks)
            dpre = torch.ops.aten.silu_backward(dpre, pre)
        dextended = torch.zeros_like(extended)
        dextended[:, length:] += dstate
        for back in range(1, width - 1):
            mask = masks[back]
            if mask is not None:
                dextended[:, length + width - 2 - back].masked_fill_(mask[:, -1], 0)
        dtaps = torch.empty_like(taps)
        for back in range(width):
            tap, mask = width - 1 - back, masks[back]
            dextended[:, tap : tap + length].addcmul_(_own(dpre, mask), taps[tap])
            dtaps[tap] = (dpre * _own(extended[:, tap : tap + length], mask)).sum(dim=(0, 1))
        return (
            dextended[:, width - 1 :].to(x.dtype),
            dtaps.t().to(weight.dtype),
            None if bias is None else dpre.sum(dim=(0, 1)).to(bias.dtype),
            None,
            None if history is None else dextended[:, : width - 1].to(history.dtype),
            None,
        )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.causal_conv1d.causal_conv1d`."""
    if not torch.is_grad_enabled():  # a decoding step is short enough that a Function's own cost would show
        return _forward(x, weight, bias, activation == "silu", initial_state, document_start)
    return _CausalConv.apply(x, weight, bias, activation == "silu", initial_state, document_start)
