"""Phi-4-Mini, the text model (arXiv 2503.01743): a dense pre-norm decoder.

Notable: grouped-query attention, rotary positions on 3/4 of each head (the first dims; pairs i and i + R/2), tied head, no bias,
fused qkv and gate-up projections in the row order of the released checkpoints.
"""

from __future__ import annotations

from torch import nn

from components.blocks import MLP, Attention, AttentionBlock, Decoder, check_choice, check_positive, rotary_dims
from components.contracts import RopeRule


class Phi4Mini(Decoder):
    """Phi-4-Mini language model; implements components.contracts.Model.

    Args:
        window: keys an attention query sees, with itself; None (the paper) sees all.
        partial_rotary_factor: int(head_dim * this) dims of each head turn.
        position: "rope" or "none".
        max_length: length in tokens that the model is trained at (L0 of the RoPE rules).
        initializer_range: standard deviation of every matrix at init; norms start at 1.
        rope: an option of the group `rope`.

    Note: the released model's initialisation zeroes the embedding row of its padding id. There is no padding id here, since rows are cut
    from a full stream of tokens, so every row of the embedding is drawn alike.
    """

    def __init__(
        self,
        *,
        vocab_size: int | None,
        hidden_size: int,
        num_layers: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        partial_rotary_factor: float,
        position: str,
        rope_theta: float,
        max_length: int,
        norm_eps: float,
        tie_embeddings: bool,
        initializer_range: float,
        rope: RopeRule,
    ) -> None:
        check_positive(vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, intermediate_size=intermediate_size)
        check_positive(num_heads=num_heads, head_dim=head_dim, max_length=max_length, initializer_range=initializer_range)
        check_choice("model.position", position, ("rope", "none"))
        blocks = [
            AttentionBlock(
                Attention(hidden_size, num_heads, num_kv_heads, head_dim, window),
                MLP(hidden_size, intermediate_size),
                hidden_size,
                norm_eps,
            )
            for _ in range(num_layers)
        ]
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            blocks=list(blocks),
            norm_eps=norm_eps,
            tie_embeddings=tie_embeddings,
            rope=rope,
            rotary_dim=rotary_dims(head_dim, partial_rotary_factor) if position == "rope" else None,
            rope_theta=rope_theta,
            max_length=max_length,
            window=window,
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=initializer_range)
