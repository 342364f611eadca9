"""Small plain-torch forwards of the foreign models, written from their descriptions and sharing no code with ours.

Everything is float64 and one position or head at a time where that is clearer; weights are looked up by their foreign names.
"""

import math

import torch
import torch.nn.functional as F

EPS = 1e-5


def norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def mamba(x, w, prefix):
    """u, z from one projection; depthwise convolution of 4 taps; step sizes, B and C from u; a recurrence over time."""
    get = lambda name: w[prefix + name]  # noqa: E731
    a_log = get("A_log")
    channels, states = a_log.shape
    rank = get("dt_proj.weight").shape[1]
    u, z = (x @ get("in_proj.weight").T).split(channels, -1)
    taps = get("conv1d.weight")[:, 0]
    padded = torch.cat([u.new_zeros(u.shape[0], taps.shape[1] - 1, channels), u], 1)
    u = F.silu(sum(taps[:, k] * padded[:, k : k + x.shape[1]] for k in range(taps.shape[1])) + get("conv1d.bias"))
    dr, b, c = (u @ get("x_proj.weight").T).split([rank, states, states], -1)
    dt = torch.log1p(torch.exp(dr @ get("dt_proj.weight").T + get("dt_proj.bias")))
    h, rows = u.new_zeros(u.shape[0], channels, states), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * -a_log.exp()) * h + (dt[:, t] * u[:, t])[:, :, None] * b[:, t, None, :]
        rows.append((h * c[:, t, None, :]).sum(-1) + get("D") * u[:, t])
    return (torch.stack(rows, 1) * F.silu(z)) @ get("out_proj.weight").T


def rotate(x, base):
    """Half-split rotary positions on the whole head. x: (B, T, K)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / base ** (torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(queries, keys, values, window, base):
    """One head: query i sees keys i-window+1 .. i."""
    if base is not None:
        queries, keys = rotate(queries, base), rotate(keys, base)
    distance = torch.arange(keys.shape[1])[:, None] - torch.arange(keys.shape[1])
    seen = (distance >= 0) & (distance < (window or keys.shape[1]))
    scores = (queries @ keys.mT / math.sqrt(queries.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ values


def reference_attention(x, w, prefix, num_heads, window, base):
    """The fused matrix goes by kv group: its query heads, then its key head, then its value head."""
    fused = x @ w[prefix + "attn.weight"].T
    size = w[prefix + "proj.weight"].shape[1] // num_heads
    blocks = fused.split(size, -1)
    groups = (len(blocks) - num_heads) // 2
    per_group, heads = num_heads // groups + 2, []
    for g in range(groups):
        *queries, key, value = blocks[g * per_group : (g + 1) * per_group]
        heads += [attend(q, key, value, window, base) for q in queries]
    return torch.cat(heads, -1) @ w[prefix + "proj.weight"].T


def separate_attention(x, w, prefix, num_heads, window, base):
    """Three matrices; key head j serves the j-th run of query heads."""
    q, k, v = (x @ w[f"{prefix}{name}_proj.weight"].T for name in "qkv")
    size = q.shape[-1] // num_heads
    k, v = k.split(size, -1), v.split(size, -1)
    heads = [attend(head, k[i * len(k) // num_heads], v[i * len(k) // num_heads], window, base) for i, head in enumerate(q.split(size, -1))]
    return torch.cat(heads, -1) @ w[prefix + "o_proj.weight"].T


def reference_logits(w, ids, num_heads, window, base=10000.0):
    """The reference's GPT: blocks of norm_1, attn, norm_2, mlp; blocks of norm, mixer where there are Mamba mixers alone."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = w["transformer.wte.weight"][ids]
    for i in range(sum(name.endswith((".norm_1.weight", ".norm.weight")) for name in w)):
        p = f"transformer.h.{i}."
        if p + "mixer.A_log" in w:
            x = x + mamba(norm(x, w[p + "norm.weight"]), w, p + "mixer.")
            continue
        n = norm(x, w[p + "norm_1.weight"])
        x = x + (mamba(n, w, p + "attn.") if p + "attn.A_log" in w else reference_attention(n, w, p + "attn.", num_heads, window, base))
        if p + "norm_2.weight" in w:
            n = norm(x, w[p + "norm_2.weight"])
            gate, up, down = (w[f"{p}mlp.swiglu.w{k}.weight"] for k in (1, 2, 3))
            x = x + (F.silu(n @ gate.T) * (n @ up.T)) @ down.T
    return norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def fla_logits(w, ids, num_heads, window, base=10000.0):
    """flash-linear-attention's SambaForCausalLM."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = w["backbone.embeddings.weight"][ids]
    for i in range(sum(name.endswith(".mixer_norm.weight") for name in w)):
        p = f"backbone.layers.{i}."
        n = norm(x, w[p + "mixer_norm.weight"])
        m = p + "mixer."
        x = x + (mamba(n, w, m) if m + "A_log" in w else separate_attention(n, w, m, num_heads, window, base))
        n = norm(x, w[p + "mlp_norm.weight"])
        gate, up, down = (w[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(n @ gate.T) * (n @ up.T)) @ down.T
    return norm(x, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T
