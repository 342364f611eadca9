"""MambaMixer against transformers' with copied random weights, and the samba blocks' attention against an explicit mask."""

import pytest
import torch

from components.blocks import Attention, Context
from components.models.samba import MambaMixer
from kernels.rope import rope_tables

transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")


def pair(hidden=24, state_size=8, expand=2, dt_rank=None):
    from transformers.models.mamba.modeling_mamba import MambaMixer as Theirs

    torch.manual_seed(0)
    ours = MambaMixer(hidden, state_size, 4, expand, dt_rank)
    config = transformers.MambaConfig(
        hidden_size=hidden,
        state_size=state_size,
        expand=expand,
        conv_kernel=4,
        time_step_rank=ours.dt_rank,
        use_bias=False,
        use_conv_bias=True,
        hidden_act="silu",
    )
    theirs = Theirs(config, layer_idx=0)
    state = {their_name(name): value.unsqueeze(1) if name == "conv_weight" else value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return ours, theirs


def their_name(name):
    return {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "dt_bias": "dt_proj.bias"}.get(name, name)


@pytest.mark.parametrize("length", [1, 3, 64])
@pytest.mark.parametrize("shape", [{}, {"hidden": 20, "state_size": 5, "expand": 3, "dt_rank": 7}], ids=["even", "odd"])
def test_output_and_gradients(shape, length):
    ours, theirs = pair(**shape)
    x = torch.randn(2, length, ours.in_proj.in_features)
    cotangent = torch.randn_like(x)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(mine), theirs(other)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    (y * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    assert (mine.grad - other.grad).norm() <= 1e-5 * other.grad.norm()
    reference = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = reference[their_name(name)].reshape(parameter.shape)
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_window_attention_equals_an_explicit_mask(heads, kv_heads):
    """Float64, scores written out: window keys with itself, half-split rotary, kv head j for query heads j*H/G on."""
    size, window, time = 8, 5, 23
    torch.manual_seed(0)
    layer = Attention(24, heads, kv_heads, size, window).double()
    x = torch.randn(2, time, 24, dtype=torch.float64)
    inv_freq = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    rope = rope_tables(torch.arange(time)[None], inv_freq, 1.0)
    got = layer(x, Context(rope=rope))

    q, k, v = layer.qkv_proj(x).split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    angles = torch.arange(time, dtype=torch.float64)[:, None] * inv_freq

    def turn(y, n):
        y = y.view(2, time, n, size).transpose(1, 2)
        a, b = y[..., : size // 2], y[..., size // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    q, k, v = turn(q, heads), turn(k, kv_heads), v.view(2, time, kv_heads, size).transpose(1, 2)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    i = torch.arange(time)
    seen = (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)
    assert seen.sum(1).max() == window
    weights = (q @ k.transpose(-1, -2) / size**0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    expected = layer.o_proj((weights @ v).transpose(1, 2).reshape(2, time, heads * size))
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()  # cos and sin are kept in fp32
