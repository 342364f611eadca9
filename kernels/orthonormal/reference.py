"""Specification of the orthonormal basis: Householder QR written out, one matrix at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(x: Tensor, method: str) -> Tensor:
    """See `kernels.orthonormal.orthonormal`. One method for all: `method` is not looked at."""
    flat = x.reshape(-1, *x.shape[-2:]).double()
    return torch.stack([_householder(matrix) for matrix in flat]).to(x.dtype).reshape(x.shape) if len(flat) else x.clone()


def _householder(matrix: Tensor) -> Tensor:
    """Q (n, r) = H_1 ... H_r I, with H_k = I - 2 v v' the reflection that clears column k below the diagonal of H_{k-1} ... H_1 x."""
    n, r = matrix.shape
    work, reflectors = matrix.clone(), []
    for k in range(r):
        v = torch.zeros_like(work[:, k])
        v[k:] = work[k:, k]
        v[k] += torch.linalg.norm(v) * (1 if v[k] >= 0 else -1)  # away from cancellation
        if v.any():
            v /= torch.linalg.norm(v)
        work -= 2 * torch.outer(v, v @ work)
        reflectors.append(v)
    q = torch.eye(n, r, dtype=matrix.dtype, device=matrix.device)
    for v in reversed(reflectors):
        q -= 2 * torch.outer(v, v @ q)
    return q
