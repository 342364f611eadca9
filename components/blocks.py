"""What the models share: RMSNorm, SwiGLU, grouped-query attention (window, partial rotary positions), and the pre-norm decoder round them.

Projections are fused (qkv, gate and up) and always called as modules, so that a wrapper round any of them takes effect.
"""

from __future__ import annotations

import difflib
import logging
import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from components.contracts import Batch, ModelOutput, Role, RopeRegime, RopeRule, RopeSpec, UserError
from components.decode_state import DecodeState
from components.layer_state import KVCache, LayerState, Step
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope, rope_tables
from kernels.sliding_window import attention, cached_attention
from kernels.swiglu import swiglu

log = logging.getLogger(__name__)

# Role by the name of a module or of a bare parameter; looked up from the end of a parameter's path.
_ROLES: dict[str, Role] = {
    "embed_tokens": "embedding", "lm_head": "head", "norm": "norm", "mixer_norm": "norm", "mlp_norm": "norm",
    "qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down",
    "in_proj": "in_proj", "out_proj": "out_proj", "x_proj": "x_proj", "dt_proj": "dt", "dt_bias": "dt",
    "conv_weight": "conv", "conv_bias": "conv", "A_log": "ssm", "D": "ssm",
}  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What one forward computes once for all its layers."""

    rope: tuple[Tensor, Tensor] | None = None  # cos, sin: (B or 1, T, R/2) fp32
    segment_ids: Tensor | None = None  # (B, T)
    document_start: Tensor | None = None  # (B, T) bool: the segment differs from that of the position before; index 0 is False
    step: Step | None = None  # set when a decode state is given


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """(regimes, rotary_dim/2) float64: 1 / (lambda_i * base^(2i/rotary_dim))."""
    pairs = spec.rotary_dim // 2
    exponent = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float64, device="cpu") / spec.rotary_dim
    factors = torch.tensor([regime.factors or (1.0,) * pairs for regime in spec.regimes], dtype=torch.float64, device="cpu")
    return 1.0 / (factors * torch.tensor(spec.base, dtype=torch.float64, device="cpu") ** exponent)


def check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise UserError naming `key` and the nearest allowed word unless value is one of them."""
    if value not in allowed:
        nearest = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
        raise UserError(f"{key}: {value!r}; allowed are {', '.join(allowed)}; did you mean {nearest}?")


def check_positive(**values: int | float | None) -> None:
    """Raise UserError naming model.<key> when a value is not above zero; None is passed over."""
    for key, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"model.{key}: {value}; allowed is a number above 0")


def rotary_dims(head_dim: int, partial_rotary_factor: float) -> int:
    """int(head_dim * partial_rotary_factor), the dims of a head that turn. Raises UserError when that is odd or none."""
    size = int(head_dim * partial_rotary_factor)
    if size < 2 or size % 2 or size > head_dim:
        raise UserError(
            f"model.partial_rotary_factor: {partial_rotary_factor} of model.head_dim={head_dim} gives {size} rotary dims; "
            f"allowed is an even number from 2 to {head_dim}; try model.partial_rotary_factor={max(2, size // 2 * 2) / head_dim:g}"
        )
    return size


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in fp32. x: (..., D), returned in its dtype."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after(self, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual stream (..., D) and normalise the sum, in one pass where a kernel can. Returns (normed, sum)."""
        return add_rms_norm(branch, stream, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); the first half of gate_up_proj's rows is the gate (Samba's w1, then w2; down_proj is its w3)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down_proj(swiglu(gate, up))

    def fused_splits(self) -> dict[str, list[int]]:
        return {"gate_up_proj.weight": [self.down_proj.in_features] * 2}


class Attention(nn.Module):
    """Causal grouped-query attention; kv head j serves query heads j*H/G .. (j+1)*H/G-1.

    qkv_proj rows are [H*K q | G*K k | G*K v], head-major (the Samba reference interleaves them by kv group instead).
    Query i sees keys j with i - window < j <= i (window keys with itself); window None sees all.
    The first R dims of q and k turn, pairs (i, i + R/2). Softmax scale 1/sqrt(head_dim).
    Raises UserError when num_kv_heads does not divide num_heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - num_kv_heads))
            raise UserError(f"model.num_kv_heads: {num_kv_heads}; allowed are the divisors of model.num_heads={num_heads}; try {nearest}")
        if window is not None and window < 1:
            raise UserError(f"model.window: {window}; allowed is null or at least 1 token")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """x: (B, T, D). Returns (B, T, D); with a cache, appends to it."""
        batch, time, _ = x.shape
        heads, turning = self.num_heads, self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x).view(batch, time, turning + self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, H+2G, T, K)
        qk, v = qkv[:, :turning], qkv[:, turning:]
        if context.rope is not None:
            qk = apply_rope(qk, *context.rope)
        q, k = qk[:, :heads], qk[:, heads:]
        if cache is None or context.step is None or context.step.fresh:
            o = attention(q, k, v, window=self.window, segment_ids=context.segment_ids)  # (B, H, T, K)
            if cache is not None and context.step is not None:
                cache.write(k, v, context.step)
        else:
            keys, values, positions = cache.append(k, v, context.step)
            o = cached_attention(q, keys.to(q.dtype), values.to(q.dtype), positions, context.step.positions, window=self.window)
        return self.o_proj(o.transpose(1, 2).reshape(batch, time, heads * self.head_dim))

    def fused_splits(self) -> dict[str, list[int]]:
        return {"qkv_proj.weight": [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim]}

    def mixing_flops(self, seq_len: int) -> float:
        """FLOPs a token of scores and weighted values, averaged over a row of seq_len tokens; projections are counted by the decoder."""
        window = min(self.window or seq_len, seq_len)
        pairs = seq_len * window - window * (window - 1) / 2  # token i sees min(i + 1, window) keys
        return 4 * self.num_heads * self.head_dim * pairs / seq_len


class Block(nn.Module):
    """Pre-norm residual pair: x + mixer(norm(x)), then x + mlp(norm(x)); a subclass says how its mixer is called and what it remembers.

    mlp: None for a layer that is its mixer alone; it then has no second norm either.
    """

    def __init__(self, mixer: nn.Module, mlp: MLP | None, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(hidden_size, norm_eps)
        self.mixer = mixer
        self.mlp_norm = None if mlp is None else RMSNorm(hidden_size, norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, context: Context, state: LayerState | None = None) -> Tensor:
        """x: (B, T, D), the residual stream; fp32 under autocast, since it starts from fp32 embeddings."""
        return self.feed(self.branch(x, context, state), x)

    def branch(self, x: Tensor, context: Context, state: LayerState | None) -> Tensor:
        """The mixer's residual branch of x (B, T, D)."""
        return self.mix(self.mixer_norm(x), context, state)

    def feed(self, branch: Tensor, x: Tensor) -> Tensor:
        """Add the mixer's branch to the stream, then that of the MLP; all (B, T, D)."""
        if self.mlp is None or self.mlp_norm is None:
            return x + branch
        normed, x = self.mlp_norm.after(branch, x)
        return x + self.mlp(normed)

    @property
    def sublayers(self) -> int:
        """Residual branches: 2, or 1 without an MLP."""
        return 1 if self.mlp is None else 2

    def mix(self, x: Tensor, context: Context, state: LayerState | None) -> Tensor:
        raise NotImplementedError

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        raise NotImplementedError

    def mixing_flops(self, seq_len: int) -> float:
        raise NotImplementedError


class AttentionBlock(Block):
    """Block whose mixer is Attention."""

    mixer: Attention

    def mix(self, x: Tensor, context: Context, state: LayerState | None) -> Tensor:
        return self.mixer(x, context, state)

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        shape = (batch_size, self.mixer.num_kv_heads, self.mixer.head_dim)
        return KVCache.empty(shape, self.mixer.window, max_length, dtype, device)

    def mixing_flops(self, seq_len: int) -> float:
        return self.mixer.mixing_flops(seq_len)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and (tied) head: the part of the Model contract that does not depend on the architecture.

    Args:
        vocab_size: rows of the embedding and of the head.
        blocks: the layers, in order.
        rotary_dim: dims of a head that turn; None where there are no positions (NoPE).
        max_length: length in tokens that the model is trained at, L0 of the RoPE rules.
        window: most keys that a query of any layer sees: None when one layer sees all, 0 when no layer attends. Decides whether a RoPE
            rule can act at all.

    Set `gradient_checkpointing` to recompute each block in the backward. `recompute_contexts` is the `context_fn` of that: what stands
    beside the model and must be again as it was (an adapter's task ids).
    """

    def __init__(
        self,
        *,
        vocab_size: int | None,
        hidden_size: int,
        blocks: list[Block],
        norm_eps: float,
        tie_embeddings: bool,
        rope: RopeRule,
        rotary_dim: int | None,
        rope_theta: float,
        max_length: int,
        window: int | None,
    ) -> None:
        super().__init__()
        if vocab_size is None:  # null in an option file: filled in from the tokenizer before the model is built
            raise UserError("model.vocab_size: null; allowed is a number of rows of at least the tokenizer's vocabulary")
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.window = window
        self.gradient_checkpointing = False
        self.recompute_contexts = noop_context_fn
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.lm_head = None if tie_embeddings else nn.Linear(hidden_size, vocab_size, bias=False)
        self.rope_spec: RopeSpec | None = None
        self._inv_freq, self._attention_factors = torch.empty(0), torch.empty(0)  # no buffers: a cast of the module must not reach them
        self._rotary_dim = rotary_dim
        if rotary_dim is not None:
            self.set_rope(rope.spec(rotary_dim, rope_theta, max_length))

    def forward(self, batch: Batch, state: DecodeState | None = None) -> ModelOutput:
        """Return hidden states (B, T, D) for batch.input_ids (B, T); with a state, append these tokens to it.

        Raises ValueError when a state is given together with segment_ids: a decoded row is one document.
        """
        if state is None:
            return ModelOutput(self._layers(batch, None, None))
        if batch.segment_ids is not None:
            raise ValueError("batch.segment_ids: a row with a decode state holds one document; pass segment_ids=None")
        step = state.begin(*batch.input_ids.shape)
        layers = self._layers
        if torch.compiler.is_compiling():  # lengths differ from call to call: each step would be compiled anew
            layers = torch.compiler.disable(layers)
        hidden = layers(batch, step, state.layers)
        state.finish(batch.input_ids.shape[1])
        return ModelOutput(hidden)

    def _layers(self, batch: Batch, step: Step | None, states: list[LayerState] | None) -> Tensor:
        context = self._context(batch, step)
        x = self.embed_tokens(batch.input_ids)  # (B, T, D)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and states is None
        contexts: dict[str, Any] = {}
        if not torch.compiler.is_compiling():  # a graph takes none, and needs none
            contexts["context_fn"] = self.recompute_contexts
        for i, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, context, use_reentrant=False, **contexts)
            else:
                x = block(x, context, None if states is None else states[i])
        return self.norm(x)

    def _context(self, batch: Batch, step: Step | None) -> Context:
        ids, segments = batch.input_ids, batch.segment_ids
        document_start = None
        if segments is not None:
            document_start = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))  # (B, T)
        rope = None
        if self.rope_spec is not None and self.window != 0:
            positions = batch.position_ids
            if positions is None:
                positions = step.positions if step is not None else torch.arange(ids.shape[1], device=ids.device)[None]
            rope = rope_tables(positions, *self._frequencies(batch, step))
        return Context(rope, segments, document_start, step)

    def _frequencies(self, batch: Batch, step: Step | None) -> tuple[Tensor, float | Tensor]:
        """Inverse frequencies (R/2,) and attention factor of all rows, or (B, R/2) and (B, 1, 1) where each row has its regime."""
        assert self.rope_spec is not None
        regimes = self.rope_spec.regimes
        if self._inv_freq.device != batch.input_ids.device:
            self._inv_freq = self._inv_freq.to(batch.input_ids.device)
            self._attention_factors = self._attention_factors.to(batch.input_ids.device)
        chosen = step.regime if step is not None else batch.rope_regime
        if len(regimes) == 1 or chosen is None:
            index = self.rope_spec.regime_of(batch.input_ids.shape[1])
            return self._inv_freq[index], regimes[index].attention_factor
        return self._inv_freq[chosen.long()], self._attention_factors[chosen.long()][:, None, None]

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)

    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding when tied."""
        if self.lm_head is not None:
            return self.lm_head.weight
        embedding = getattr(self.embed_tokens, "base_layer", self.embed_tokens)  # an adapter there acts on the tokens alone
        return cast("Tensor", embedding.weight)

    def roles(self) -> dict[str, Role]:
        """Role of every parameter by name; `adapter` for what a wrapper, a module with a `base_layer`, adds to its base layer.

        Raises ValueError on a parameter that no role is known for.
        """
        wrappers = {path.removesuffix("base_layer") for path, _ in self.named_modules() if path.endswith(".base_layer")}
        roles: dict[str, Role] = {}
        for name, _ in self.named_parameters():
            inside = [name.removeprefix(path) for path in wrappers if name.startswith(path)]
            role = next((_ROLES[part] for part in reversed(name.split(".")) if part in _ROLES), None)
            if any(not rest.startswith("base_layer.") for rest in inside):
                role = "adapter"
            if role is None:
                raise ValueError(f"{name}: no role known; name the module as one of {', '.join(_ROLES)}")
            roles[name] = role
        return roles

    def fused_splits(self) -> dict[str, list[int]]:
        """Rows of each matrix that is stored fused: {parameter name: row counts}, for optimizers that treat a matrix as a whole."""
        splits: dict[str, list[int]] = {}
        for path, module in self.named_modules():
            if module is not self and hasattr(module, "fused_splits"):
                splits.update({f"{path}.{name}": rows for name, rows in module.fused_splits().items()})
        return splits

    def set_rope(self, spec: RopeSpec) -> None:
        """Turn with `spec` from now on; raises UserError when it does not fit the heads.

        Note: with a window no longer than spec.original_len no relative distance is new however long the text grows, so a rescaling rule
        is a no-op here (and says so).
        """
        if self._rotary_dim is None:
            log.warning("rope: %s has no effect, since model.position=none", spec.rule)
            return
        if spec.rotary_dim != self._rotary_dim:
            raise UserError(f"rope.rotary_dim: {spec.rotary_dim}; allowed is {self._rotary_dim} (model.head_dim * partial rotary factor)")
        for factors in (regime.factors for regime in spec.regimes):
            if len(factors) not in (0, spec.rotary_dim // 2) or not all(math.isfinite(f) and f > 0 for f in factors):
                raise UserError(
                    f"rope.factors: {len(factors)} values; allowed are {spec.rotary_dim // 2} finite values > 0, one a rotary pair"
                )
        if not spec.plain and self.window is not None and spec.original_len is not None and self.window <= spec.original_len:
            why = f"model.window={self.window} <= model.max_length={spec.original_len}" if self.window else "no layer attends"
            log.warning("rope: %s has no effect, since %s", spec.rule, why)
            spec = replace(spec, regimes=(RopeRegime(),))
        self.rope_spec = spec
        self._inv_freq = inverse_frequencies(spec)
        self._attention_factors = torch.tensor([regime.attention_factor for regime in spec.regimes], dtype=torch.float64, device="cpu")

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype = torch.float32) -> DecodeState:
        """Return an empty state; max_length bounds the tokens of a row where attention has no window. dtype: that of keys and values."""
        device = next(self.parameters()).device
        layers = [block.new_state(batch_size, max_length, dtype, device) for block in self.blocks]
        return DecodeState.empty(layers, batch_size, device, self.rope_spec.bounds if self.rope_spec is not None else ())

    def forward_flops(self, seq_len: int) -> float:
        """FLOPs of one forward, per token, in rows of seq_len tokens: 2 a weight of every matmul (head included) + attention and scans."""
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        if self.lm_head is None:
            weights += self.head_weight.numel()
        return 2.0 * weights + sum(block.mixing_flops(seq_len) for block in self.blocks)
