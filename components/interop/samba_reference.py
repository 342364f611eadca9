"""Checkpoints of the Samba paper's own code: a dict {model, optimizer, hparams, iter_num, step_count} of torch.save.

Its fused attention matrix goes by kv group, [q .. q, k, v] for each, where ours is all q, then all k, then all v.
The file does not say how many heads there are nor how long the window is; both are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.contracts import UserError
from components.interop.common import (
    Config,
    Entry,
    Layout,
    Tensors,
    ask,
    convert,
    convert_back,
    have_mlp,
    head_entries,
    heads,
    is_tied,
    kinds,
    layer_count,
    mamba_entries,
    mamba_sizes,
    need,
    no_attention,
    only,
    period,
    same,
    stacked,
    with_tied_head,
)
from components.interop.files import write_pth

EMBEDDING, LAYERS = "transformer.wte.weight", "transformer.h."
WHAT = "the Samba reference's checkpoint"
MAX_LENGTH = 4096  # tokens of a training row in every configuration of the reference; the file does not say
HINT = "Samba-421M has 12 query heads, Samba-1.3B 18, both a window of 2048; null is full attention"
FILE = "model.pth"


def grouped(ours: str, theirs: str, config: Config) -> Entry:
    """The fused attention matrix: (G groups of [H/G q, k, v]) there, [H q | G k | G v] here, heads of K rows."""
    groups, size, width = config["num_kv_heads"], config["head_dim"], config["hidden_size"]
    queries = config["num_heads"] // groups
    rows = groups * (queries + 2) * size

    def split(t: Tensor) -> Sequence[Tensor]:
        q, k, v = t.split([groups * queries * size, groups * size, groups * size])
        parts = [q.view(groups, queries, size, width), k.view(groups, 1, size, width), v.view(groups, 1, size, width)]
        return (torch.cat(parts, dim=1).reshape(rows, width),)

    def join(parts: Sequence[Tensor]) -> Tensor:
        q, k, v = parts[0].reshape(groups, queries + 2, size, width).split([queries, 1, 1], dim=1)  # (G, ., K, D) each
        return torch.cat([block.reshape(-1, width) for block in (q, k, v)])

    return Entry(ours, (rows, width), (theirs,), ((rows, width),), split, join)


def entries(config: Config) -> list[Entry]:
    """Table of a whole model. Raises UserError when the reference has no such layers."""
    pattern, mlps, width = kinds(config), have_mlp(config), config["hidden_size"]
    only(WHAT, "layer_pattern", config["layer_pattern"], "mlp" not in pattern, "has Mamba and attention mixers")
    alone = set(pattern) == {"mamba"} and not any(mlps)  # pure Mamba models have blocks of their own there
    table = head_entries(EMBEDDING, "transformer.ln_f.weight", config)
    for i, kind in enumerate(pattern):
        ours, theirs = f"layers.{i}.", f"{LAYERS}{i}."
        table.append(same(f"{ours}mixer_norm.weight", f"{theirs}{'norm' if alone else 'norm_1'}.weight", width))
        if kind == "mamba":
            table += mamba_entries(f"{ours}mixer.", f"{theirs}{'mixer' if alone else 'attn'}.", config)
        else:
            table.append(grouped(f"{ours}mixer.qkv_proj.weight", f"{theirs}attn.attn.weight", config))
            table.append(same(f"{ours}mixer.o_proj.weight", f"{theirs}attn.proj.weight", width, config["num_heads"] * config["head_dim"]))
        if mlps[i]:
            inner, mlp = config["intermediate_size"], f"{theirs}mlp.swiglu."
            table.append(same(f"{ours}mlp_norm.weight", f"{theirs}norm_2.weight", width))
            table.append(stacked(f"{ours}mlp.gate_up_proj.weight", (f"{mlp}w1.weight", f"{mlp}w2.weight"), (inner, inner), width))
            table.append(same(f"{ours}mlp.down_proj.weight", f"{mlp}w3.weight", width, inner))
    return table


def from_samba(tensors: Tensors, config: Config) -> Tensors:
    """State dict of the reference's model as ours. Raises UserError for anything but an exact fit."""
    return convert(with_tied_head(tensors, EMBEDDING, config), entries(config), WHAT)


def to_samba(state: Tensors, config: Config) -> Tensors:
    """Our state dict as the reference's. Raises UserError when its code would compute other numbers with it."""
    if config["position"] == "rope":
        only(WHAT, "rope_theta", config["rope_theta"], config["rope_theta"] == 10000.0, "has rotary positions of base 10000")
    only(WHAT, "norm_eps", config["norm_eps"], config["norm_eps"] == 1e-5, "has norms of eps 1e-5")
    mixers = kinds(config)
    whole = "full_attention" in mixers and (config["window"] is not None or "attention" in mixers)
    only(WHAT, "layer_pattern", config["layer_pattern"], not whole, "has one window for all layers that attend")
    if set(mixers) != {"mamba"}:
        fits = config["num_heads"] * config["head_dim"] == config["hidden_size"]
        only(WHAT, "head_dim", config["head_dim"], fits, "has heads of hidden_size / num_heads dims")
    return undo(state, config)


def undo(state: Tensors, config: Config) -> Tensors:
    """The reverse of `from_samba`."""
    return convert_back(state, entries(config), WHAT)


def matches(names: Iterable[str]) -> bool:
    return EMBEDDING in set(names)


def infer(tensors: Tensors, about: Config, given: Config) -> dict[str, Any]:
    """The model's numbers from shapes and what the user gave. Raises UserError asking for num_heads and window where there is attention.

    Note: NoPE models have the same tensors; say model.position=none. Layers that attend without a window are imported with it.
    """
    rows, width = need(tensors, EMBEDDING).shape
    layers = range(layer_count(tensors, LAYERS))
    mixers = ["mamba" if mamba_prefix(tensors, i) else "attention" for i in layers]
    mlps = [f"{LAYERS}{i}.mlp.swiglu.w1.weight" in tensors for i in layers]
    numbers: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": width,
        "num_layers": len(layers),
        "layer_pattern": period(mixers),
        "mlp_pattern": period(mlps),
        "intermediate_size": need(tensors, f"{LAYERS}{mlps.index(True)}.mlp.swiglu.w1.weight").shape[0] if any(mlps) else 2 * width,
        "norm_eps": 1e-5,
        "tie_embeddings": is_tied(tensors, EMBEDDING, {}),
        "max_length": MAX_LENGTH,
    }
    if "mamba" in mixers:
        numbers |= mamba_sizes(tensors, mamba_prefix(tensors, mixers.index("mamba")), width)
    if "attention" in mixers:
        name = f"; this one is {about['model_name']}" if "model_name" in about else ""
        ask(given, ("num_heads", "window"), HINT + name)
        layer = f"{LAYERS}{mixers.index('attention')}.attn."
        fused, queries = need(tensors, f"{layer}attn.weight").shape[0], need(tensors, f"{layer}proj.weight").shape[1]
        numbers |= heads(given["num_heads"], queries, (fused - queries) // 2) | {"position": "rope", "rope_theta": 10000.0}
    else:
        numbers |= no_attention(width)
    return numbers | dict(given)


def mamba_prefix(tensors: Tensors, layer: int) -> str:
    """Prefix of a layer's Mamba tensors, "" where it attends. Raises UserError when it does neither."""
    for prefix in (f"{LAYERS}{layer}.attn.", f"{LAYERS}{layer}.mixer."):
        if f"{prefix}A_log" in tensors:
            return prefix
    if f"{LAYERS}{layer}.attn.attn.weight" not in tensors:
        raise UserError(f"{LAYERS}{layer}: neither a Mamba nor an attention layer of the reference")
    return ""


def write(folder: Path, tensors: Tensors, config: Config, eot_id: int, shard_bytes: int) -> None:
    """Write model.pth with the reference's keys. There is no optimizer in it: it is for evaluation and for a fresh start."""
    keys = ("num_heads", "num_kv_heads", "hidden_size", "num_layers", "intermediate_size", "window", "vocab_size")
    hparams = {key: config[key] for key in keys if isinstance(config.get(key), int)}
    write_pth(folder / FILE, {"model": tensors, "hparams": hparams, "iter_num": 0, "step_count": 0})


LAYOUT = Layout("samba", "samba", matches, infer, ("num_heads", "window", "position"), from_samba, to_samba, undo, write)
