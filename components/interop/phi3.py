"""Phi-3 and Phi-4-mini of transformers (Phi3ForCausalLM, model_type phi3): a Hugging Face folder, with or without fused projections.

Only config.json, the weights and tokenizer.json are read: an `auto_map` in the former names code, which is never run.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from components.blocks import rotary_dims
from components.contracts import RopeRegime, RopeSpec, UserError
from components.interop.common import (
    Config,
    Entry,
    Layout,
    Tensors,
    agree,
    ask,
    convert,
    convert_back,
    head_entries,
    heads,
    is_tied,
    layer_count,
    need,
    only,
    same,
    with_tied_head,
)
from components.interop.files import write_folder
from components.rope.longrope import longrope_attention_factor

log = logging.getLogger(__name__)

EMBEDDING, HEAD, NORM, LAYERS = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers."
WHAT = "transformers' Phi3ForCausalLM"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # rows of the parts, in this order
MUST_BE_OFF = ("attention_bias", "mlp_bias", "lm_head_bias", "attention_dropout", "resid_pdrop", "embd_pdrop")
ASKED = ("num_heads", "window", "rope_theta", "max_length", "norm_eps")
VLLM = "vllm"
ONE_REGIME = "rope.switch=always_long or rope.switch=always_short of python generate.py task=export writes one regime for all rows"


def entries(config: Config) -> list[Entry]:
    """Table of a whole model."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = config["num_heads"] * config["head_dim"], config["num_kv_heads"] * config["head_dim"]
    table = head_entries(EMBEDDING, NORM, config)
    for i in range(config["num_layers"]):
        ours, theirs = f"layers.{i}.", f"{LAYERS}{i}."
        table += [
            same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight", width),
            same(f"{ours}mixer.qkv_proj.weight", f"{theirs}self_attn.qkv_proj.weight", queries + 2 * keys, width),
            same(f"{ours}mixer.o_proj.weight", f"{theirs}self_attn.o_proj.weight", width, queries),
            same(f"{ours}mlp_norm.weight", f"{theirs}post_attention_layernorm.weight", width),
            same(f"{ours}mlp.gate_up_proj.weight", f"{theirs}mlp.gate_up_proj.weight", 2 * inner, width),
            same(f"{ours}mlp.down_proj.weight", f"{theirs}mlp.down_proj.weight", width, inner),
        ]
    return table


def fuse(tensors: Tensors) -> Tensors:
    """The same tensors with q, k, v and gate, up (Llama's names) stacked as qkv_proj and gate_up_proj; incomplete sets stay as they are."""
    fused = dict(tensors)
    for whole, parts in FUSED.items():
        for name in tensors:
            if match := re.fullmatch(rf"(.*\.){parts[0]}\.weight", name):
                names = [f"{match[1]}{part}.weight" for part in parts]
                if all(part in fused for part in names):
                    fused[f"{match[1]}{whole}.weight"] = torch.cat([fused.pop(part) for part in names])
    return fused


def unfuse(tensors: Tensors, config: Config) -> Tensors:
    """The reverse of `fuse`, for a model with these numbers: the parts are views of the fused matrices' rows."""
    queries, keys = config["num_heads"] * config["head_dim"], config["num_kv_heads"] * config["head_dim"]
    rows = {"qkv_proj": [queries, keys, keys], "gate_up_proj": [config["intermediate_size"]] * 2}
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(.*\.)({'|'.join(FUSED)})\.weight", name)
        if match is None:
            found[name] = tensor
            continue
        names = [f"{match[1]}{part}.weight" for part in FUSED[match[2]]]
        found.update(zip(names, tensor.split(rows[match[2]]), strict=True))
    return found


def from_phi3(tensors: Tensors, config: Config) -> Tensors:
    """State dict of Phi3ForCausalLM as ours; warns of a tied head that is stored all the same. Raises UserError for anything but a fit."""
    full = with_tied_head(fuse(tensors), EMBEDDING, config)
    state = convert(full, entries(config), WHAT)
    if config["tie_embeddings"] and full[HEAD].data_ptr() != full[EMBEDDING].data_ptr():
        log.warning("%s: stored although it is tied to %s; they are equal, and one is kept", HEAD, EMBEDDING)
    return state


def to_phi3(state: Tensors, config: Config) -> Tensors:
    """Our state dict as Phi3ForCausalLM's, a tied head included. Raises UserError when its code would compute other numbers with it."""
    only(WHAT, "position", config["position"], config["position"] == "rope", "has rotary positions always")
    return undo(state, config)


def undo(state: Tensors, config: Config) -> Tensors:
    """The reverse of `from_phi3`."""
    return convert_back(state, entries(config), WHAT)


def matches(names: Iterable[str]) -> bool:
    layer = f"{LAYERS}0.self_attn."
    return not {f"{layer}qkv_proj.weight", f"{layer}q_proj.weight"}.isdisjoint(names)


def rope_nodes(about: Config) -> dict[str, Config]:
    """The nodes of config.json that hold RoPE keys. Raises UserError for one that is no node."""
    nodes = {place: about[place] for place in ("rope_parameters", "rope_scaling") if about.get(place) is not None}
    if wrong := [place for place, node in nodes.items() if not isinstance(node, dict)]:
        raise UserError(f"config.json: {wrong[0]}={nodes[wrong[0]]!r}; allowed is null or an object of keys such as rope_type")
    return nodes


def told(about: Config, key: str) -> Any:
    """What config.json says of a RoPE key: in `rope_parameters` (transformers 5), in `rope_scaling` (before), or beside them.

    None when it says nothing. Raises UserError when it says two things.
    """
    places = {f"{place}.": node for place, node in rope_nodes(about).items()} | {"": about}
    said = {f"{place}{key}": node[key] for place, node in places.items() if node.get(key) is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        words = ", ".join(f"{name}={value!r}" for name, value in said.items())
        raise UserError(f"config.json: {words}; they must be equal; correct the one that is wrong")
    return values[0] if values else None


def rescales(about: Config) -> bool:
    """Whether positions are rescaled (LongRoPE, in older files called su or yarn). Raises UserError for another rule."""
    names = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
    kinds = {node.get("rope_type") or node.get("type") or "default" for node in rope_nodes(about).values()}
    if unknown := sorted(kind for kind in kinds if kind not in names):
        raise UserError(f"config.json: rope_type={unknown[0]!r}; allowed for model_type='phi3' are 'default' and 'longrope'")
    return "longrope" in {names[kind] for kind in kinds}


def refuse_others(about: Config) -> None:
    """Raise UserError for a config.json of a model that computes something else."""
    kind, activation = about.get("model_type", "phi3"), about.get("hidden_act", "silu")
    if kind != "phi3" or activation not in ("silu", "swish"):
        raise UserError(f"config.json: model_type={kind!r}, hidden_act={activation!r}; allowed are 'phi3' and 'silu'")
    if wrong := [key for key in MUST_BE_OFF if about.get(key)]:
        words = ", ".join(f"{key}={about[key]!r}" for key in wrong)
        raise UserError(f"config.json: {words}; the model has no biases and no dropout; set a dropout to 0.0 there to load without it")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers_told(about: Config) -> dict[str, Any]:
    """What config.json says of the model under our names; what it does not say is absent. Raises UserError for what is no number."""
    longest = about.get("max_position_embeddings")
    partial = told(about, "partial_rotary_factor")
    said = {
        "num_heads": about.get("num_attention_heads"),
        "partial_rotary_factor": 1.0 if partial is None else partial,
        "rope_theta": told(about, "rope_theta"),
        "max_length": told(about, "original_max_position_embeddings") if rescales(about) else longest,
        "norm_eps": about.get("rms_norm_eps"),
        "initializer_range": about.get("initializer_range"),
        "window": about.get("sliding_window"),
    }
    said = {key: value for key, value in said.items() if value is not None}
    checked = said | ({} if longest is None else {"max_length (max_position_embeddings)": longest})
    if wrong := [f"{key}: {value!r}" for key, value in checked.items() if not is_number(value)]:
        raise UserError(f"config.json: what it says of model.{', model.'.join(wrong)}; allowed are numbers")
    if "sliding_window" in about and (said.get("window") is None or (longest is not None and said["window"] >= longest)):
        said["window"] = None
    return said


def infer(tensors: Tensors, about: Config, given: Config) -> dict[str, Any]:
    """The model's numbers from shapes and config.json; what neither says is asked for, never taken from the defaults of a class.

    max_length is the length before rescaling: original_max_position_embeddings under LongRoPE, else max_position_embeddings. A window of
    at least max_position_embeddings hides nothing and becomes None. A file without partial_rotary_factor (Phi-3's) turns whole heads.
    """
    refuse_others(about)
    first = f"{LAYERS}0."
    tensors = tensors | fuse({name: tensor for name, tensor in tensors.items() if name.startswith(first)})
    rows, width = need(tensors, EMBEDDING).shape
    layers, inner = layer_count(tensors, LAYERS), need(tensors, f"{first}mlp.down_proj.weight").shape[1]
    agree(about, {"hidden_size": width, "vocab_size": rows, "num_hidden_layers": layers, "intermediate_size": inner})
    known = numbers_told(about) | dict(given)
    ask(known, ASKED, "config.json has them as num_attention_heads, sliding_window, rope_theta, max_position_embeddings, rms_norm_eps")
    queries = need(tensors, f"{first}self_attn.o_proj.weight").shape[1]
    keys = (need(tensors, f"{first}self_attn.qkv_proj.weight").shape[0] - queries) // 2
    sizes = heads(known["num_heads"], queries, keys)
    theirs = {"head_dim": sizes["head_dim"], "num_key_value_heads": sizes["num_kv_heads"]}
    agree({key: about[key] for key in theirs if about.get(key) is not None}, theirs)  # null there: as the other numbers have it
    numbers: dict[str, Any] = {
        "vocab_size": rows, "hidden_size": width, "num_layers": layers, "intermediate_size": inner, "position": "rope",
        "tie_embeddings": is_tied(tensors, EMBEDDING, about),
    }  # fmt: skip
    return numbers | sizes | known


def rope_of(about: Config, numbers: Config) -> RopeSpec | None:
    """The spec that a checkpoint's positions were rescaled with; None for plain ones. `numbers` are those that `infer` gives.

    There are factors for rows of up to original_max_position_embeddings tokens and others beyond; one attention factor holds for both.

    Raises:
        UserError: lists that are missing, of another length or hold anything but numbers above 0; another rule than LongRoPE.
    """
    if not rescales(about):
        return None
    turning, original = rotary_dims(numbers["head_dim"], numbers["partial_rotary_factor"]), numbers["max_length"]
    factors: list[tuple[float, ...]] = []
    for key in ("short_factor", "long_factor"):
        values = told(about, key)
        if not isinstance(values, list) or len(values) != turning // 2 or not all(is_number(value) and value > 0 for value in values):
            found = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
            allowed = f"allowed are {turning // 2} numbers > 0, one a pair of the {turning} rotary dims"
            raise UserError(f"config.json: {key} is {found}; {allowed}")
        factors.append(() if set(values) == {1.0} else tuple(map(float, values)))
    longest, scale, multiplier = about.get("max_position_embeddings", original), told(about, "factor"), told(about, "attention_factor")
    for key, value in (("factor", scale), ("attention_factor", multiplier)):
        if value is not None and not (is_number(value) and value > 0):
            raise UserError(f"config.json: {key}={value!r}; allowed is null or a number > 0")
    if multiplier is None:
        multiplier = longrope_attention_factor(longest / original if scale is None else scale, original)
    last = RopeRegime(factors[1], float(multiplier))
    regimes = (last,) if factors[0] == factors[1] else (RopeRegime(factors[0], float(multiplier), original), last)
    return RopeSpec(turning, float(numbers["rope_theta"]), regimes, original, longest, "longrope")


def refuse_vllm(config: Config, rope: RopeSpec | None) -> None:
    """Raise UserError where vLLM's Phi3ForCausalLM, its Llama with fused projections, would compute other numbers than the model."""
    only("vLLM's Phi3ForCausalLM", "window", config["window"], config["window"] is None, "knows no sliding_window")
    if rope is not None and rope.bounds:
        raise UserError(
            f"rope: {rope.rule} changes tables at {', '.join(map(str, rope.bounds))} tokens, and vLLM never does: it keeps the one that it "
            f"chose when it started (long where max_model_len > {config['max_length']}); {ONE_REGIME}"
        )


def rope_keys(config: Config, rope: RopeSpec | None, engine: str) -> dict[str, Any]:
    """RoPE keys of config.json in both dialects. Any rule of fixed factors is written as LongRoPE, the one that this layout has.

    Where both dialects stand, transformers 5 takes rope_scaling; transformers 4 refuses one of more than three keys, so the attention
    factor is left out when it is the one that all of them compute. The length before rescaling stands outside too: transformers writes
    its class default of 4096 over the inner one when there is no outer. vLLM has names of its own for the factor, at which transformers
    warns, so that they are written for vLLM alone.

    Raises:
        UserError: regimes with attention factors that differ, or that end elsewhere than at the model's max_length.
    """
    length = config["max_length"]
    about = {"rope_theta": float(config["rope_theta"]), "partial_rotary_factor": float(config["partial_rotary_factor"])}
    lengths = {"max_position_embeddings": length, "original_max_position_embeddings": length}
    if rope is None or rope.plain:
        return about | lengths | {"rope_scaling": None, "rope_parameters": about | {"rope_type": "default"}}
    quotient = config["hidden_size"] // config["num_heads"]
    fits = config["head_dim"] == quotient
    only(WHAT, "head_dim", config["head_dim"], fits, f"counts the factors of {rope.rule} by hidden_size / num_heads = {quotient}")
    multipliers = [regime.attention_factor for regime in rope.regimes]
    if len(set(multipliers)) > 1:
        raise UserError(f"rope: {rope.rule} has attention factors {multipliers}, {WHAT} one for rows of any length; {ONE_REGIME}")
    if rope.bounds not in ((), (length,)):
        one = f"{WHAT} once, at model.max_length={length}"
        raise UserError(f"rope: {rope.rule} changes tables at {list(rope.bounds)} tokens, {one}; {ONE_REGIME}")
    lengths["max_position_embeddings"] = longest = max(rope.target_len or length, length)
    ones = (1.0,) * (rope.rotary_dim // 2)
    rule: dict[str, Any] = {key: list(rope.regimes[i].factors or ones) for key, i in (("short_factor", 0), ("long_factor", -1))}
    if multipliers[0] != longrope_attention_factor(longest / length, length):
        rule["attention_factor"] = multipliers[0]
        if engine == VLLM:
            rule |= {"short_mscale": multipliers[0], "long_mscale": multipliers[0]}
    inner = about | {"rope_type": "longrope", "original_max_position_embeddings": length} | rule
    return about | lengths | {"rope_scaling": {"type": "longrope"} | rule, "rope_parameters": inner}


def config_json(
    config: Config, eot_id: int, dtype: torch.dtype, rope: RopeSpec | None = None, stops: Sequence[int] = (), engine: str = "transformers"
) -> dict[str, Any]:
    """config.json under the names of Phi3Config. Raises UserError for what it cannot hold, or `engine` would not compute."""
    if engine == VLLM:
        refuse_vllm(config, rope)
    width, count, size = config["hidden_size"], config["num_heads"], config["head_dim"]
    about = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": config["vocab_size"], "hidden_size": width,
        "intermediate_size": config["intermediate_size"], "num_hidden_layers": config["num_layers"], "num_attention_heads": count,
        "num_key_value_heads": config["num_kv_heads"], "hidden_act": "silu", "rms_norm_eps": config["norm_eps"],
        "initializer_range": config["initializer_range"], "sliding_window": config["window"],
        "tie_word_embeddings": config["tie_embeddings"], "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "use_cache": True, "bos_token_id": eot_id, "eos_token_id": [eot_id, *stops],
        "pad_token_id": eot_id, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if width // count != size:  # which they take where nothing is said
        about["head_dim"] = size
    return about | rope_keys(config, rope, engine)


def write(
    folder: Path, tensors: Tensors, config: Config, eot_id: int, shard_bytes: int, rope: RopeSpec | None = None,
    stops: Sequence[int] = (), engine: str = "transformers",
) -> None:  # fmt: skip
    """Write a folder that Phi3ForCausalLM of `engine` reads. rope: the model's rule; stops: ids that end a turn, beside `eot_id`."""
    write_folder(folder, tensors, config_json(config, eot_id, tensors[NORM].dtype, rope, stops, engine), shard_bytes)


LAYOUT = Layout(
    "phi3", "phi4mini", matches, infer, (), from_phi3, to_phi3, undo, write, fuse, rope_of, engines=("transformers", VLLM)
)  # fmt: skip
