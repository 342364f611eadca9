"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) in the half-split layout: dimension i turns with dimension i + R/2."""

from __future__ import annotations

from torch import Tensor

from kernels.checks import expect_dims
from kernels.dispatch import pick

__all__ = ["apply_rope", "rope_tables"]


def rope_tables(position_ids: Tensor, inv_freq: Tensor, attention_factor: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inv_freq, both times `attention_factor`.

    Angles are float64: at position 1e6 a float32 angle has a spacing of 0.06 rad.
    Args: position_ids (B or 1, T) integer. inv_freq (R/2,), any float dtype; or (B, R/2) for frequencies that differ between rows.
        attention_factor: a number, or (B, 1, 1) float64.
    Returns: cos, sin (B, T, R/2) float32.
    """
    if position_ids.dim() != 2 or position_ids.is_floating_point():
        raise ValueError(f"rope_tables: position_ids is {position_ids.dtype} {tuple(position_ids.shape)}; expected integer (B, T)")
    frequencies = inv_freq.double() if inv_freq.dim() == 1 else inv_freq.double().unsqueeze(1)
    angles = position_ids.double().unsqueeze(2) * frequencies  # (B, T, R/2)
    cos, sin = angles.cos(), angles.sin()
    if not isinstance(attention_factor, float) or attention_factor != 1:
        cos, sin = cos * attention_factor, sin * attention_factor
    return cos.float(), sin.float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2) of the first R dimensions of every head; the other K - R pass through.

    Args: x (B, H, T, K). cos, sin (B or 1, T, R/2), constants (no gradient), R <= K.
    Returns: (B, H, T, K) in x's dtype, computed in float32 (float64).
    Raises: ValueError for shapes that do not fit.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    >>> apply_rope(x, torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).flatten().tolist()
    [-2.0, 1.0, 3.0]
    """
    expect_dims("apply_rope", "x", x, 4, "(B, H, T, K)")
    batch, _, length, head_dim = x.shape
    fits = cos.dim() == 3 and cos.shape == sin.shape and cos.shape[0] in (1, batch) and cos.shape[1] == length
    if not fits or 2 * cos.shape[2] > head_dim:
        raise ValueError(
            f"apply_rope: cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit x {tuple(x.shape)}; "
            f"expected ({batch} or 1, {length}, at most {head_dim // 2})"
        )
    return pick("rope", x.device).apply_rope(x, cos, sin)
