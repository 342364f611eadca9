"""The folder that PEFT writes for a LoRA: adapter_config.json, and adapter_model.safetensors with base_model.model.<path>.lora_A.weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.contracts import UserError

KEY_PREFIX = "base_model.model."
WEIGHTS, CONFIG, ROUTING = "adapter_model.safetensors", "adapter_config.json", "routing.json"
# Options of a LoraConfig that change the forward pass, with the only values that mean plain LoRA.
PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}
# Others that change it, or the base; they are not written, since an older PEFT does not know them.
ABSENT = ("use_bdlora", "kasa_config", "arrow_config", "monteclora_config")
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base as it is


def write_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_routing(folder: Path, routing: Mapping[str, str | None]) -> None:
    """Write routing.json: {mode: name of the adapter to load for a request of that mode, or null for the base model}."""
    (folder / ROUTING).write_text(json.dumps(routing, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_folder` wrote. Raises UserError for a missing or damaged file."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: no such file; an adapter folder holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged adapter ({error}); copy or export it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: holds a {type(config).__name__}; a mapping is needed")
    return config, state


def write_peft(
    folder: Path, model: nn.Module, modules: Sequence[str], state: Mapping[str, Tensor], r: int, alpha: float, dropout: float,
    use_rslora: bool, more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write one LoRA. modules: names of the wrapped modules. state: tensors by parameter name, without PEFT's prefix.

    more: values of the configuration that are not those of PLAIN.
    """
    config = {
        "peft_type": "LORA",
        # PEFT's causal wrapper asks its base model for this method; any other nn.Module needs the plain wrapper.
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _target_modules(model, modules),
        "exclude_modules": None,
        "use_rslora": use_rslora,
        "init_lora_weights": True,
        **PLAIN,
        **(more or {}),
    }
    write_folder(folder, config, {f"{KEY_PREFIX}{name}": tensor for name, tensor in state.items()})


def read_peft(
    folder: Path, expected: Mapping[str, Any] | None = None, free: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Return the configuration and the tensors by parameter name.

    expected: values of the configuration that are not those of PLAIN. free: keys of PLAIN that may have any value.
    Raises UserError for a missing or damaged file, another method than LoRA, another option, or a start that may change the base.
    """
    config, state = read_folder(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')}; only LORA can be read")
    for key, plain in {**PLAIN, **(expected or {})}.items():
        found = config.get(key, PLAIN[key])
        config[key] = PLAIN[key] if found in (None, {}, []) else found
        if key not in free and config[key] != plain:
            raise UserError(f"{folder / CONFIG}: {key} is {found!r}; only {key}={plain!r} can be read by this adapter")
    for key in ABSENT:
        if config.get(key):
            raise UserError(f"{folder / CONFIG}: {key} is set, which is no plain LoRA; it cannot be read")
    if (start := config.get("init_lora_weights")) not in STARTS:
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights is {start!r}, which may have changed the base model too; only "
            f"{', '.join(map(json.dumps, STARTS))} can be read; where PEFT can, save_pretrained with "
            "path_initial_model_for_weight_conversion makes it one of these"
        )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise UserError(f"{folder / CONFIG}: lacks {', '.join(missing)}")
    config = {"lora_dropout": 0.0, "exclude_modules": None, "use_rslora": False, **config}
    if isinstance(config["exclude_modules"], list):  # PEFT reads a list as name endings
        config["exclude_modules"] = (
            rf"(.*\.)?({'|'.join(map(re.escape, config['exclude_modules']))})" if config["exclude_modules"] else None
        )
    for name in state:
        if not name.startswith(KEY_PREFIX):
            raise UserError(f"{folder / WEIGHTS}: key {name!r} does not start with {KEY_PREFIX}")
    state = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in state.items()}
    return config, {name: tensor for name, tensor in state.items() if not _is_copy(name, state)}


def _is_copy(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether it is what bias=all adds to a file for a bias in modules_to_save: the base's, or the trained one a second time."""
    return any(part in name and name.replace(part, ".") in state for part in (".original_module.", ".modules_to_save."))


def _target_modules(model: nn.Module, modules: Sequence[str]) -> list[str] | str:
    """PEFT's target_modules for exactly these modules: their last names where those single them out, else a regex of the full names."""
    wrapped = set(modules)
    last = sorted({name.rpartition(".")[2] for name in modules})
    inside = tuple(f"{name}." for name in wrapped)
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last and not name.startswith(inside)}
    return last if alike == wrapped else "|".join(re.escape(name) for name in modules)
