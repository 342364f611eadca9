"""An adapter beside an exported base: plain LoRAs under the module names of the other project, in PEFT's layout."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from components.adapters.base import task_ids
from components.adapters.base.peft_files import KEY_PREFIX, read_folder, write_folder
from components.contracts import UserError

PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None}  # what vLLM serves, and what stands on the base's own weights
Lora = tuple[dict[str, Any], dict[str, Tensor]]  # adapter_config.json and the tensors by parameter name


def kept_adapters(adapter: Any, model: nn.Module, task: str | int | None) -> dict[str, Lora]:
    """The plain LoRAs that an adapter option comes to on `model`, by task, or under the name `adapter` where it has none.

    task: that one alone. Raises UserError for an adapter that is none, or is more than that.
    """
    holder = task_ids(model)
    names = holder.names if holder is not None else ()
    if names and not hasattr(adapter, "export_peft"):
        raise UserError(f"task.adapter: keep, but {type(adapter).__name__} is no plain LoRA for each task; use task.adapter=merge")
    wanted = [names[holder.index(task)]] if holder is not None and task is not None else list(names) or ["adapter"]
    found: dict[str, Lora] = {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            if names:
                adapter.export_peft(model, name, folder)
            else:
                adapter.save(model, folder)
            config, state = read_folder(Path(folder))
        for key, plain in {**PLAIN, "peft_type": "LORA"}.items():
            if config.get(key, plain) != plain:
                raise UserError(
                    f"task.adapter: keep, but the adapter has {key}={config[key]!r}, which is no plain LoRA; use task.adapter=merge"
                )
        found[name] = config, state
    return found


def module_names(wrapped: Iterable[str], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """{our name of a wrapped module: theirs}. ours, theirs: the same tensors under both names, as a layout's `to_foreign` gives them.

    Raises UserError for a module whose weight the layout stores otherwise than as it is.
    """
    places = {(tensor.data_ptr(), tensor.shape): name for name, tensor in theirs.items()}
    names: dict[str, str] = {}
    for name in wrapped:
        weight = ours[f"{name}.weight"]
        place = places.get((weight.data_ptr(), weight.shape))
        if place is None:
            raise UserError(f"task.adapter: keep, but the layout stores {name} in pieces; use task.adapter=merge")
        names[name] = place.removesuffix(".weight")
    return names


def write_adapter(folder: Path, lora: Lora, names: Mapping[str, str], theirs: Mapping[str, Tensor], base: str) -> None:
    """Write one LoRA for the base that lies in the folder `base`. names: see `module_names`; theirs: all tensors of the base."""
    config, state = lora
    last = sorted({name.rpartition(".")[2] for name in names.values()})
    alike = {name.removesuffix(".weight") for name in theirs if name.removesuffix(".weight").rpartition(".")[2] in last}
    targets = last if alike == set(names.values()) else "|".join(re.escape(name) for name in names.values())
    config = {**config, "base_model_name_or_path": base, "task_type": "CAUSAL_LM", "target_modules": targets}
    renamed = {}
    for key, tensor in state.items():
        module, _, rest = key.removeprefix(KEY_PREFIX).partition(".lora_")
        renamed[f"{KEY_PREFIX}{names[module]}.lora_{rest}"] = tensor
    write_folder(folder, config, renamed)


def adapter_usage(engine: str, base: Path, folder: Path) -> str:
    """What to type to load the base and the adapter in `folder` beside it."""
    if engine == "vllm":
        return f"vllm.LLM({str(base)!r}, enable_lora=True) and LoRARequest({folder.name!r}, 1, {str(folder)!r}) with each request"
    return f"peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(folder)!r})"
