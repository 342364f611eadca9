"""Orthonormal basis of the span of a matrix's columns: the Q of a QR decomposition, for stacks of tall matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import pick

__all__ = ["orthonormal"]

METHODS = ("auto", "qr", "cholesky")


def orthonormal(x: Tensor, method: str = "auto") -> Tensor:
    """Q with orthonormal columns, of which the first k span the first k columns of x, for every k (Gram-Schmidt's order). Signs are free.

    x: (..., n, r) float32 or float64, r <= n. A stack is one batched call; a matrix's result does not depend on its neighbours.
    method: `qr` is Householder's. `cholesky` is CholeskyQR2, with QR for every single matrix that it leaves with max |Q'Q - I| above 1e-5
        (float64: 1e-13). `auto` is qr on the CPU, where it is faster, and cholesky on CUDA, where many small QRs wait for one
        column after the other; that is reasoned, not measured: no GPU has run it.
    Returns Q: shape and dtype of x. Columns that depend on earlier ones, or are zero, get some orthonormal complement. NaN stays in its
        matrix. Meant for no_grad, as optimizers run.
    Raises ValueError for another dtype, r > n, fewer than two dimensions or an unknown method.

    >>> orthonormal(torch.tensor([[3.0, 1.0], [4.0, 1.0]])).abs()
    tensor([[0.6000, 0.8000],
            [0.8000, 0.6000]])
    """
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64) or x.shape[-1] > x.shape[-2]:
        raise ValueError(f"orthonormal: x is {x.dtype} of shape {tuple(x.shape)}; it needs float32 or float64 (..., n, r) with r <= n")
    if method not in METHODS:
        raise ValueError(f"orthonormal: method is {method!r}; allowed are {', '.join(METHODS)}")
    return pick("orthonormal", x.device).orthonormal(x, method)
