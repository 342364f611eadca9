"""Samba of flash-linear-attention (SambaForCausalLM, model_type samba): a Hugging Face folder with separate q, k, v, gate and up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components.contracts import UserError
from components.interop.common import (
    Config,
    Entry,
    Layout,
    Tensors,
    agree,
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
from components.interop.files import write_folder

EMBEDDING, LAYERS = "backbone.embeddings.weight", "backbone.layers."
WHAT = "flash-linear-attention's samba"
MLP_MULTIPLE = 256  # its MLP has 2/3 * hidden_ratio * hidden_size channels, rounded up to this


def entries(config: Config) -> list[Entry]:
    """Table of a whole model. Raises UserError for layers that it does not have there."""
    pattern, width, inner = kinds(config), config["hidden_size"], config["intermediate_size"]
    only(WHAT, "layer_pattern", config["layer_pattern"], "mlp" not in pattern, "has Mamba and attention mixers")
    only(WHAT, "mlp_pattern", config.get("mlp_pattern"), all(have_mlp(config)), "has an MLP in every layer")
    queries, keys = config["num_heads"] * config["head_dim"], config["num_kv_heads"] * config["head_dim"]
    table = head_entries(EMBEDDING, "backbone.norm_f.weight", config)
    for i, kind in enumerate(pattern):
        ours, theirs = f"layers.{i}.", f"{LAYERS}{i}."
        table += [same(f"{ours}{norm}.weight", f"{theirs}{norm}.weight", width) for norm in ("mixer_norm", "mlp_norm")]
        if kind == "mamba":
            table += mamba_entries(f"{ours}mixer.", f"{theirs}mixer.", config)
        else:
            names = [f"{theirs}mixer.{part}_proj.weight" for part in "qkv"]
            table.append(stacked(f"{ours}mixer.qkv_proj.weight", names, (queries, keys, keys), width))
            table.append(same(f"{ours}mixer.o_proj.weight", f"{theirs}mixer.o_proj.weight", width, queries))
        names = [f"{theirs}mlp.{part}_proj.weight" for part in ("gate", "up")]
        table.append(stacked(f"{ours}mlp.gate_up_proj.weight", names, (inner, inner), width))
        table.append(same(f"{ours}mlp.down_proj.weight", f"{theirs}mlp.down_proj.weight", width, inner))
    return table


def from_fla(tensors: Tensors, config: Config) -> Tensors:
    """State dict of SambaForCausalLM as ours. Raises UserError for anything but an exact fit."""
    return convert(with_tied_head(tensors, EMBEDDING, config), entries(config), WHAT)


def to_fla(state: Tensors, config: Config) -> Tensors:
    """Our state dict as SambaForCausalLM's, a tied head included. Raises UserError when its code would compute other numbers with it."""
    config_json(config, 0)
    return undo(state, config)


def undo(state: Tensors, config: Config) -> Tensors:
    """The reverse of `from_fla`."""
    return convert_back(state, entries(config), WHAT)


def matches(names: Iterable[str]) -> bool:
    return f"{LAYERS}0.mixer_norm.weight" in set(names)


def infer(tensors: Tensors, about: Config, given: Config) -> dict[str, Any]:
    """The model's numbers from shapes and config.json; without one the head count and the window are asked for."""
    kind, activation = about.get("model_type", "samba"), about.get("hidden_act", "swish")
    if kind != "samba" or activation not in ("silu", "swish"):
        raise UserError(f"config.json: model_type={kind!r}, hidden_act={activation!r}; allowed are 'samba' and 'swish'")
    rows, width = need(tensors, EMBEDDING).shape
    layers = range(layer_count(tensors, LAYERS))
    mixers = ["mamba" if f"{LAYERS}{i}.mixer.A_log" in tensors else "attention" for i in layers]
    agree(about, {"hidden_size": width, "vocab_size": rows, "num_hidden_layers": len(layers)})
    numbers: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": width,
        "num_layers": len(layers),
        "layer_pattern": period(mixers),
        "mlp_pattern": [True],
        "intermediate_size": need(tensors, f"{LAYERS}0.mlp.gate_proj.weight").shape[0],
        "norm_eps": float(about.get("norm_eps", 1e-5)),
        "tie_embeddings": is_tied(tensors, EMBEDDING, about),
    }
    if "max_position_embeddings" in about:
        numbers["max_length"] = about["max_position_embeddings"]
    if "mamba" in mixers:
        numbers |= mamba_sizes(tensors, f"{LAYERS}{mixers.index('mamba')}.mixer.", width)
    if "attention" not in mixers:
        return numbers | no_attention(width) | dict(given)
    attn = about.get("attn") or {}
    told = {"num_heads": attn.get("num_heads"), "rope_theta": attn.get("rope_theta")}
    known = {key: value for key, value in told.items() if value is not None} | dict(given)
    if "window_size" in attn:
        known.setdefault("window", attn["window_size"])
    ask(known, ("num_heads", "window"), "config.json has them as attn.num_heads and attn.window_size")
    layer = f"{LAYERS}{mixers.index('attention')}.mixer."
    queries, keys = need(tensors, f"{layer}q_proj.weight").shape[0], need(tensors, f"{layer}k_proj.weight").shape[0]
    return numbers | heads(int(known["num_heads"]), queries, keys) | {"position": "rope", "rope_theta": 10000.0} | known


def config_json(config: Config, eot_id: int) -> dict[str, Any]:
    """config.json under the names of SambaConfig. Raises UserError for a number that it cannot hold."""
    pattern, width, inner = kinds(config), config["hidden_size"], config["intermediate_size"]
    attends = [i for i, kind in enumerate(pattern) if kind != "mamba"]
    attn = None
    if attends:
        windows = {config["window"] if kind == "attention" else None for kind in pattern if kind != "mamba"}
        only(WHAT, "layer_pattern", config["layer_pattern"], len(windows) == 1, "has one window for all attention layers")
        only(WHAT, "position", config["position"], config["position"] == "rope", "has rotary positions always")
        fits = config["num_heads"] * config["head_dim"] == width
        only(WHAT, "head_dim", config["head_dim"], fits, "has heads of hidden_size / num_heads dims")
        attn = {
            "layers": attends, "num_heads": config["num_heads"], "num_kv_heads": config["num_kv_heads"], "qkv_bias": False,
            "window_size": windows.pop(), "rope_theta": config["rope_theta"],
        }  # fmt: skip
    else:
        attn = {"layers": [], "num_heads": 1, "num_kv_heads": 1, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}
    only(WHAT, "intermediate_size", inner, inner % MLP_MULTIPLE == 0, f"has a multiple of {MLP_MULTIPLE}")
    ratio: float = 4
    if -(-int(width * ratio * 2 / 3) // MLP_MULTIPLE) * MLP_MULTIPLE != inner:
        ratio = (inner - MLP_MULTIPLE / 2) * 1.5 / width  # half a multiple below: rounding up ends at `inner`, whatever floats do
    return {
        "architectures": ["SambaForCausalLM"], "model_type": "samba", "vocab_size": config["vocab_size"], "hidden_size": width,
        "state_size": config["state_size"], "num_hidden_layers": config["num_layers"], "expand": config["expand"],
        "conv_kernel": config["conv_kernel"], "time_step_rank": config.get("dt_rank") or -(-width // 16), "time_step_min": 0.001,
        "time_step_max": 0.1, "time_step_floor": 1e-4, "attn": attn, "hidden_ratio": ratio, "hidden_act": "swish",
        "norm_eps": config["norm_eps"], "use_bias": False, "use_conv_bias": True, "max_position_embeddings": config["max_length"],
        "tie_word_embeddings": config["tie_embeddings"], "fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True,
        "fuse_linear_cross_entropy": False, "bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id,
    }  # fmt: skip


def write(folder: Path, tensors: Tensors, config: Config, eot_id: int, shard_bytes: int) -> None:
    """Write config.json and the weights. Has not been loaded by flash-linear-attention itself, which needs a GPU."""
    write_folder(folder, tensors, config_json(config, eot_id), shard_bytes)


LAYOUT = Layout("fla", "samba", matches, infer, (), from_fla, to_fla, undo, write)
