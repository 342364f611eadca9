"""Mamba-1 models of transformers (MambaForCausalLM) and of mamba_ssm, whose tensors agree but for the embedding's name."""

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
    convert,
    convert_back,
    have_mlp,
    head_entries,
    is_tied,
    kinds,
    layer_count,
    mamba_entries,
    mamba_sizes,
    need,
    no_attention,
    only,
    same,
    with_tied_head,
)
from components.interop.files import write_folder

EMBEDDING, MAMBA_SSM_EMBEDDING = "backbone.embeddings.weight", "backbone.embedding.weight"
WHAT = "transformers' MambaForCausalLM"


def entries(config: Config) -> list[Entry]:
    """Table of a whole model. Raises UserError when it is more than Mamba mixers."""
    pattern = kinds(config)
    only(WHAT, "layer_pattern", config["layer_pattern"], set(pattern) == {"mamba"}, "has Mamba mixers alone")
    only(WHAT, "mlp_pattern", config.get("mlp_pattern"), not any(have_mlp(config)), "has no MLPs")
    table = head_entries(EMBEDDING, "backbone.norm_f.weight", config)
    for i in range(config["num_layers"]):
        ours, theirs = f"layers.{i}.", f"backbone.layers.{i}."
        table.append(same(f"{ours}mixer_norm.weight", f"{theirs}norm.weight", config["hidden_size"]))
        table += mamba_entries(f"{ours}mixer.", f"{theirs}mixer.", config)
    return table


def renamed(tensors: Tensors) -> Tensors:
    """mamba_ssm's name of the embedding as transformers'."""
    return {EMBEDDING if name == MAMBA_SSM_EMBEDDING else name: tensor for name, tensor in tensors.items()}


def from_transformers(tensors: Tensors, config: Config) -> Tensors:
    """State dict of MambaForCausalLM (or of mamba_ssm's MambaLMHeadModel) as ours. Raises UserError for anything but an exact fit."""
    return convert(with_tied_head(renamed(tensors), EMBEDDING, config), entries(config), WHAT)


def to_transformers(state: Tensors, config: Config) -> Tensors:
    """Our state dict as MambaForCausalLM's, its tied head included. Raises UserError when the model is not Mamba alone."""
    return convert_back(state, entries(config), WHAT)


def mixer_from_transformers(tensors: Tensors, config: Config) -> Tensors:
    """State dict of one MambaMixer of theirs as that of one of ours."""
    return convert(tensors, mamba_entries("", "", config), "transformers' MambaMixer")


def mixer_to_transformers(state: Tensors, config: Config) -> Tensors:
    """State dict of one MambaMixer of ours as that of one of theirs."""
    return convert_back(state, mamba_entries("", "", config), "transformers' MambaMixer")


def matches(names: Iterable[str]) -> bool:
    return "backbone.layers.0.norm.weight" in set(names)


def infer(tensors: Tensors, about: Config, given: Config) -> dict[str, Any]:
    """The model's numbers from shapes and config.json (transformers' or mamba_ssm's)."""
    kind, activation = about.get("model_type", "mamba"), about.get("hidden_act", "silu")
    if kind != "mamba" or activation not in ("silu", "swish"):  # falcon_mamba has the same tensors and normalises dt, B and C besides
        raise UserError(f"config.json: model_type={kind!r}, hidden_act={activation!r}; allowed are 'mamba' and 'silu'")
    tensors = renamed(tensors)
    rows, width = need(tensors, EMBEDDING).shape
    layers = layer_count(tensors, "backbone.layers.")
    sizes = mamba_sizes(tensors, "backbone.layers.0.mixer.", width)
    agree(about, {"hidden_size": width, "vocab_size": rows, "num_hidden_layers": layers} if "model_type" in about else {})
    numbers: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": width,
        "num_layers": layers,
        "intermediate_size": 2 * width,  # of no MLP here
        "layer_pattern": ["mamba"],
        "mlp_pattern": [False],
        "norm_eps": float(about.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": is_tied(tensors, EMBEDDING, about),
    }
    return numbers | sizes | no_attention(width) | dict(given)


def write(folder: Path, tensors: Tensors, config: Config, eot_id: int, shard_bytes: int) -> None:
    """Write a folder that MambaForCausalLM.from_pretrained reads."""
    width, channels = config["hidden_size"], config["expand"] * config["hidden_size"]
    about = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": config["vocab_size"], "hidden_size": width,
        "num_hidden_layers": config["num_layers"], "state_size": config["state_size"], "conv_kernel": config["conv_kernel"],
        "expand": config["expand"], "intermediate_size": channels, "time_step_rank": config.get("dt_rank") or -(-width // 16),
        "layer_norm_epsilon": config["norm_eps"], "hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True,
        "tie_word_embeddings": config["tie_embeddings"], "bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id,
        "torch_dtype": str(tensors["backbone.norm_f.weight"].dtype).removeprefix("torch."),
    }  # fmt: skip
    write_folder(folder, tensors, about, shard_bytes)


LAYOUT = Layout(
    "transformers", "samba", matches, infer, (), from_transformers, to_transformers, to_transformers, write, renamed,
    engines=("transformers",),
)  # fmt: skip
