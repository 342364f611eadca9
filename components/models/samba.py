"""Samba (arXiv 2406.07522): Mamba-1 -> SwiGLU -> sliding-window attention -> SwiGLU, repeated; and the models that its paper compares.

Notable: every sublayer pre-norm with its own residual; no attention beyond the window, so decoding needs constant memory; tied head;
no bias but those of the convolution and of dt; rotary on whole heads. A layer here is one mixer with or without its MLP: two of the paper's
sublayers, or one. Which mixers and MLPs there are is two patterns, so that the paper's ablations are options (conf/model/variant).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from components.blocks import MLP, Attention, AttentionBlock, Block, Context, Decoder, check_choice, check_positive
from components.contracts import RopeRule, UserError
from components.layer_state import LayerState, RecurrentState, may_overwrite
from kernels.causal_conv1d import causal_conv1d
from kernels.packed import mamba, pack_mamba
from kernels.selective_scan import selective_scan, selective_state_update

_MIXERS = ("mamba", "attention", "full_attention", "mlp")
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of the step size dt at init, in tokens; the paper finds it insensitive


class MambaMixer(nn.Module):
    """Mamba-1 (arXiv 2312.00752, Alg. 2), D = expand * hidden_size channels with N = state_size numbers each.

    u, z = in_proj(x); u = silu(conv(u)); dt_low, B, C = x_proj(u); dt = softplus(dt_proj(dt_low) + dt_bias);
    h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t; y_t = h_t C_t + D u_t; out_proj(y * silu(z)), with A = -exp(A_log).

    Note: dt's bias is the parameter `dt_bias`, not a bias of dt_proj, so that it is added in fp32 under autocast and a wrapper round
    dt_proj keeps working. Keep A_log, D and dt_bias in fp32 (autocast, not a cast of the module). conv_weight is (D, W); its last tap
    multiplies the current token.

    >>> MambaMixer(hidden_size=8, state_size=4, conv_kernel=4, expand=2, dt_rank=None)(torch.zeros(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, hidden_size: int, state_size: int, conv_kernel: int, expand: int, dt_rank: int | None) -> None:
        super().__init__()
        check_positive(state_size=state_size, conv_kernel=conv_kernel, expand=expand, dt_rank=dt_rank)
        channels = expand * hidden_size
        self.dt_rank = math.ceil(hidden_size / 16) if dt_rank is None else dt_rank
        self.state_size = state_size
        self.in_proj = nn.Linear(hidden_size, 2 * channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.x_proj = nn.Linear(channels, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, channels, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, hidden_size, bias=False)
        self.reset_ssm()

    @torch.no_grad()
    def reset_ssm(self) -> None:
        """Initialise all but the projections: conv U(+-1/sqrt W), A_log = ln 1..N, D = 1, softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
        bound = self.conv_weight.shape[1] ** -0.5
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        dt = torch.rand_like(self.dt_bias).mul_(math.log(_DT_MAX / _DT_MIN)).add_(math.log(_DT_MIN)).exp_().clamp_min_(_DT_FLOOR)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.arange(1, self.state_size + 1, dtype=self.A_log.dtype, device=self.A_log.device).log())
        self.D.fill_(1.0)

    def forward(self, x: Tensor, document_start: Tensor | None = None, state: RecurrentState | None = None) -> Tensor:
        """x: (B, L, hidden); document_start: (B, L) bool, where conv and state start anew. Returns (B, L, hidden); updates `state`."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, D) each
        taps = None if state is None else state.conv.to(u.dtype)
        u, taps = causal_conv1d(u, self.conv_weight, self.conv_bias, activation="silu", initial_state=taps, document_start=document_start)
        dt, b, c = self.x_proj(u).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        a = self.decay()  # (D, N)
        inputs = {"D": self.D, "z": z, "dt_bias": self.dt_bias, "dt_softplus": True}
        if state is not None and document_start is None and may_overwrite(state.ssm):
            state.conv.copy_(taps)
            return self.out_proj(selective_state_update(state.ssm, u, self.dt_proj(dt), a, b, c, **inputs))
        before = None if state is None else state.ssm
        y, after = selective_scan(u, self.dt_proj(dt), a, b, c, **inputs, initial_state=before, document_start=document_start)
        if state is not None:
            state.update(taps, after)
        return self.out_proj(y)

    def decay(self) -> Tensor:
        """A (D, N), at least float32."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def fused_splits(self) -> dict[str, list[int]]:
        channels = self.out_proj.in_features
        return {"in_proj.weight": [channels] * 2, "x_proj.weight": [self.dt_rank, self.state_size, self.state_size]}

    def mixing_flops(self) -> float:
        """FLOPs a token of convolution (2 a tap) and scan (7 a state number: dt*A, exp, (dt u)*B, multiply-add of h, multiply-add of y)."""
        return 2.0 * self.conv_weight.numel() + 7.0 * self.A_log.numel()


class MambaBlock(Block):
    """Block whose mixer is MambaMixer."""

    mixer: MambaMixer

    def mix(self, x: Tensor, context: Context, state: LayerState | None) -> Tensor:
        return self.mixer(x, context.document_start, state)

    def packed_branch(self, packed: Callable[[nn.Module], Any]) -> Callable[..., Tensor] | None:
        """`branch` as one call of kernels.packed; None for another mixer, or a projection without a packed
        weight. See components/decoding/forward.py."""
        m = self.mixer
        projections = [packed(layer) for layer in (m.in_proj, m.x_proj, m.dt_proj, m.out_proj)]
        if type(m) is not MambaMixer or any(weight is None for weight in projections):
            return None
        norm, (into, low, dt, out) = (self.mixer_norm.weight.detach(), self.mixer_norm.eps), projections
        mixer = pack_mamba(into, m.conv_weight, m.conv_bias, low, dt, m.dt_bias, m.decay(), m.D, out)

        def branch(x: Tensor, context: Context, state: LayerState | None) -> Tensor:
            if not isinstance(state, RecurrentState) or context.document_start is not None or not may_overwrite(state.ssm):
                return MambaBlock.branch(self, x, context, state)
            return mamba(x, norm, mixer, state.conv, state.ssm)

        return branch

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        channels, taps = self.mixer.conv_weight.shape
        return RecurrentState.empty(batch_size, taps - 1, channels, self.mixer.state_size, dtype, device)

    def mixing_flops(self, seq_len: int) -> float:
        return self.mixer.mixing_flops()


class MLPBlock(Block):
    """Block whose mixer is a SwiGLU: it mixes no tokens, so it remembers nothing (the paper's MLP2)."""

    mixer: MLP

    def mix(self, x: Tensor, context: Context, state: LayerState | None) -> Tensor:
        return self.mixer(x)

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        return RecurrentState.empty(batch_size, 0, 0, 0, dtype, device)  # of no bytes; keeps one state a layer

    def mixing_flops(self, seq_len: int) -> float:
        return 0.0


class Samba(Decoder):
    """Samba language model; implements components.contracts.Model.

    Args:
        num_layers: mixers, each with or without an MLP; half the paper's sublayers where all have one.
        layer_pattern: mixer of layer i is layer_pattern[i % len]: mamba | attention (within the window) | full_attention (whatever the
            window) | mlp (a SwiGLU of mixer_intermediate_size).
        mlp_pattern: does layer i have an MLP sublayer: mlp_pattern[i % len].
        mixer_intermediate_size: None for 2 * hidden_size, about as many parameters as a Mamba mixer has.
        window: keys a query of an `attention` layer sees, with itself; None sees all.
        position: "rope", or "none" for the paper's NoPE ablation.
        max_length: length in tokens of the training rows (L0 of the RoPE rules).
        dt_rank: None for ceil(hidden_size / 16).
        rope: an option of the group `rope`.
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
        state_size: int,
        conv_kernel: int,
        expand: int,
        dt_rank: int | None,
        layer_pattern: list[str],
        mlp_pattern: list[bool],
        mixer_intermediate_size: int | None,
        position: str,
        rope_theta: float,
        max_length: int,
        norm_eps: float,
        tie_embeddings: bool,
        rope: RopeRule,
    ) -> None:
        check_positive(vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, intermediate_size=intermediate_size)
        check_positive(num_heads=num_heads, head_dim=head_dim, max_length=max_length, mixer_intermediate_size=mixer_intermediate_size)
        check_choice("model.position", position, ("rope", "none"))
        if not layer_pattern:
            raise UserError(f"model.layer_pattern: []; allowed is a list of {', '.join(_MIXERS)}; try [mamba, attention]")
        for kind in layer_pattern:
            check_choice("model.layer_pattern", kind, _MIXERS)
        if not mlp_pattern:
            raise UserError("model.mlp_pattern: []; allowed is a list of true and false; try [true]")

        def block(kind: str, with_mlp: bool) -> Block:
            mlp = MLP(hidden_size, intermediate_size) if with_mlp else None
            if kind == "mamba":
                return MambaBlock(MambaMixer(hidden_size, state_size, conv_kernel, expand, dt_rank), mlp, hidden_size, norm_eps)
            if kind == "mlp":
                return MLPBlock(MLP(hidden_size, mixer_intermediate_size or 2 * hidden_size), mlp, hidden_size, norm_eps)
            keys = window if kind == "attention" else None
            return AttentionBlock(Attention(hidden_size, num_heads, num_kv_heads, head_dim, keys), mlp, hidden_size, norm_eps)

        kinds = [layer_pattern[i % len(layer_pattern)] for i in range(num_layers)]
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            blocks=[block(kind, mlp_pattern[i % len(mlp_pattern)]) for i, kind in enumerate(kinds)],
            norm_eps=norm_eps,
            tie_embeddings=tie_embeddings,
            rope=rope,
            rotary_dim=head_dim if position == "rope" else None,
            rope_theta=rope_theta,
            max_length=max_length,
            window=None if "full_attention" in kinds else window if "attention" in kinds else 0,
        )
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Embedding (and an untied head) N(0, 0.02); projections keep nn.Linear's U(+-1/sqrt fan_in), which is also right for fused parts.

        Projections that write to the residual stream are divided by sqrt(number of sublayers): 2 a layer, 1 where it has no MLP.
        """
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=0.02)
        scale = sum(block.sublayers for block in self.blocks) ** -0.5
        for module in self.modules():
            if isinstance(module, MambaMixer):
                module.out_proj.weight.mul_(scale)
            elif isinstance(module, Attention):
                module.o_proj.weight.mul_(scale)
            elif isinstance(module, MLP):
                module.down_proj.weight.mul_(scale)
