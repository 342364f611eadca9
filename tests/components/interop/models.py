"""Small random models of ours, and random checkpoints of the foreign layouts made name by name from their descriptions."""

import pytest
import torch

from components.contracts import Batch, UserError
from components.models.samba import Samba
from components.rope.rules import NoRescaling

HEADS = {"gqa": (4, 2, 16), "mqa": (4, 1, 16), "mha": (8, 8, 8)}  # query heads, kv heads, head dim
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_layers": 4, "intermediate_size": 256, "window": 7, "state_size": 6, "conv_kernel": 4,
    "expand": 2, "dt_rank": None, "layer_pattern": ["mamba", "attention"], "mlp_pattern": [True], "mixer_intermediate_size": None,
    "position": "rope", "rope_theta": 10000.0, "max_length": 32, "norm_eps": 1e-5, "tie_embeddings": True,
}  # fmt: skip


def config(heads="gqa", **changes):
    """The model's numbers under our names."""
    return SIZES | dict(zip(("num_heads", "num_kv_heads", "head_dim"), HEADS[heads])) | changes


def model(numbers, state=None, seed=0):
    """A model of ours: with random norms, D and biases too, or with the given state."""
    torch.manual_seed(seed)
    built = Samba(**numbers, rope=NoRescaling()).eval()
    if state is not None:
        built.load_state_dict(state)
        return built
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(("norm.weight", ".D")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("embed_tokens.weight"):
                parameter.normal_()
    return built


@torch.no_grad()
def logits(built, ids):
    return built.logits(built(Batch(input_ids=ids)).hidden)


def random_mamba(prefix, width=64, states=6, taps=4, rank=4, g=None):
    channels = 2 * width
    shapes = {
        "in_proj.weight": (2 * channels, width), "conv1d.weight": (channels, 1, taps), "conv1d.bias": (channels,),
        "x_proj.weight": (rank + 2 * states, channels), "dt_proj.weight": (channels, rank), "dt_proj.bias": (channels,),
        "A_log": (channels, states), "D": (channels,), "out_proj.weight": (width, channels),
    }  # fmt: skip
    return {prefix + name: torch.randn(*shape, generator=g) * 0.3 for name, shape in shapes.items()}


def reference_checkpoint(heads="gqa", layers=4, width=64, inner=256, rows=96):
    """Random tensors under the names and shapes of the reference's Samba."""
    g = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.3  # noqa: E731
    q, kv, size = HEADS[heads]
    embedding = draw(rows, width)
    w = {"lm_head.weight": embedding, "transformer.wte.weight": embedding, "transformer.ln_f.weight": 1 + draw(width)}
    for i in range(layers):
        p = f"transformer.h.{i}."
        w |= {p + "norm_1.weight": 1 + draw(width), p + "norm_2.weight": 1 + draw(width)}
        w |= {p + f"mlp.swiglu.w{k}.weight": draw(inner, width) for k in (1, 2)} | {p + "mlp.swiglu.w3.weight": draw(width, inner)}
        if i % 2 == 0:
            w |= random_mamba(p + "attn.", g=g)
        else:
            w |= {p + "attn.attn.weight": draw((q + 2 * kv) * size, width), p + "attn.proj.weight": draw(width, q * size)}
    return w


def fla_checkpoint(heads="gqa", layers=4, width=64, inner=256, rows=96):
    """Random tensors under the names and shapes of flash-linear-attention's Samba; the head is not tied."""
    g = torch.Generator().manual_seed(12)
    draw = lambda *shape: torch.randn(*shape, generator=g) * 0.3  # noqa: E731
    q, kv, size = HEADS[heads]
    w = {"lm_head.weight": draw(rows, width), "backbone.embeddings.weight": draw(rows, width), "backbone.norm_f.weight": 1 + draw(width)}
    for i in range(layers):
        p = f"backbone.layers.{i}."
        w |= {p + "mixer_norm.weight": 1 + draw(width), p + "mlp_norm.weight": 1 + draw(width)}
        w |= {p + f"mlp.{k}_proj.weight": draw(inner, width) for k in ("gate", "up")} | {p + "mlp.down_proj.weight": draw(width, inner)}
        if i % 2 == 0:
            w |= random_mamba(p + "mixer.", g=g)
        else:
            rows_of = {"q": q * size, "k": kv * size, "v": kv * size}
            w |= {f"{p}mixer.{k}_proj.weight": draw(n, width) for k, n in rows_of.items()} | {
                p + "mixer.o_proj.weight": draw(width, q * size)
            }
    return w


def refused(call, *words):
    """The error is one line that holds all the words."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line
