"""Adapters beside an exported base: plain LoRAs under the module names of the other project, in PEFT's layout."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.adapters.base import adapter_layers, by_token, task_ids
from components.adapters.base.low_rank import fits
from components.adapters.base.peft_files import CONFIG, KEY_PREFIX, ROUTING, read_folder, write_folder, write_routing
from components.adapters.lora import LoRA
from components.contracts import UserError

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be; 16 by default
PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None}  # what vLLM serves, and what stands on the base's own weights
Lora = tuple[dict[str, Any], dict[str, Tensor]]  # adapter_config.json and the tensors by parameter name


@dataclass
class Kept:
    """Plain LoRAs by name. tasks: a task of the run's adapter that each stands for; routing: {mode: its LoRA, None for the base}."""

    loras: dict[str, Lora] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)
    routing: dict[str, str | None] | None = None


def kept_adapters(adapter: Any, model: nn.Module, task: str | int | None) -> Kept:
    """The plain LoRAs that an adapter option comes to on `model`, by task or expert, or under the name `adapter` where it has neither.

    task: that one alone. Raises UserError for an adapter that is none, or is more than that.
    """
    holder = task_ids(model)
    names = holder.names if holder is not None else ()
    routing: dict[str, str | None] | None = adapter.routing() if hasattr(adapter, "routing") else None
    if routing is None and (hasattr(adapter, "routing") or (names and not hasattr(adapter, "export_peft"))):
        remedy = (
            "nor can it be merged, since it weighs its parts anew for each token: it answers here alone, unmerged (generate.py ckpt=RUN)"
            if by_token(model)
            else "use task.adapter=merge"
        )
        raise UserError(f"task.adapter: keep, but {type(adapter).__name__} is no plain LoRA for each task; {remedy}")
    wanted = [names[holder.index(task)]] if holder is not None and task is not None else list(names) or ["adapter"]
    kept = Kept(routing=None if routing is None else {mode: routing[mode] for mode in wanted})
    for name in wanted:
        place = name if routing is None else routing[name]
        if place is None or place in kept.loras:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if routing is not None:
                adapter.save_expert(model, place, folder)
            elif names:
                adapter.export_peft(model, name, folder)
            else:
                adapter.save(model, folder)
            config, state = read_folder(Path(folder))
        for key, plain in {**PLAIN, "peft_type": "LORA"}.items():
            if config.get(key, plain) != plain:
                raise UserError(
                    f"task.adapter: keep, but the adapter has {key}={config[key]!r}, which is no plain LoRA; use task.adapter=merge"
                )
        kept.loras[place] = config, state
        if names:
            kept.tasks[place] = name
    if not kept.loras:
        raise UserError(f"task.adapter: keep, but {', '.join(wanted)} is the base model itself; use task.adapter=merge")
    return kept


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


def write_adapters(folder: Path, kept: Kept, names: Mapping[str, str], theirs: Mapping[str, Tensor], base: str) -> None:
    """Write every LoRA to its own folder in `folder`, and routing.json, for the base that lies in the folder `base`.

    names: see `module_names`; theirs: all tensors of the base.
    """
    modules = _modules(theirs)
    for name, (config, state) in kept.loras.items():
        last = sorted({place.rpartition(".")[2] for place in names.values()})
        short = _targeted(last, modules) == set(names.values())
        targets = last if short else "|".join(re.escape(place) for place in names.values())
        config, state = _renamed((config, state), names)
        write_folder(folder / name, {**config, "base_model_name_or_path": base, "task_type": "CAUSAL_LM", "target_modules": targets}, state)
    if kept.routing is not None:
        write_routing(folder, kept.routing)


def read_back(folder: Path, kept: Kept, name: str, names: Mapping[str, str], theirs: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
    """Put the LoRA that lies in `folder` / name on `model`, our base, after comparing the file with what was meant. Returns `model`.

    Raises RuntimeError, a defect of ours, for other tensors, other modules or another routing.
    """
    found = read_folder(folder / name)
    back = {place: own for own, place in names.items()}
    modules = _modules(theirs)
    (config, state), (_, wanted) = _renamed(found, back), kept.loras[name]
    if state.keys() != wanted.keys() or not all(torch.equal(state[key], tensor) for key, tensor in wanted.items()):
        raise RuntimeError(f"{folder / name}: the tensors did not survive the export")
    if _targeted(found[0]["target_modules"], modules) != set(back):
        raise RuntimeError(f"{folder / name}: target_modules means other modules than those that have an adapter")
    if kept.routing is not None and json.loads((folder / ROUTING).read_text(encoding="utf-8")) != kept.routing:
        raise RuntimeError(f"{folder / ROUTING}: another routing than the run's")
    with tempfile.TemporaryDirectory() as place:
        write_folder(Path(place), {**config, "target_modules": "|".join(re.escape(own) for own in names)}, state)
        adapter = LoRA.from_folder(place)
        adapter.apply(model)
        adapter.load(model, place)
    return model


def load_renamed(adapter: Any, model: nn.Module, folder: str, layouts: Iterable[Any], config: Mapping[str, Any]) -> None:
    """`adapter.load` of a folder, also of a LoRA under the module names of another project, as `write_adapters` leaves them.

    model: wrapped by `adapter.apply`. layouts: those that hold it; config: its numbers. Raises UserError as `adapter.load` does.
    """
    names = _their_names(model, Path(folder), layouts, config)
    if not names:
        return adapter.load(model, folder)
    with tempfile.TemporaryDirectory() as place:
        write_folder(Path(place), *_renamed(read_folder(Path(folder)), names))
        try:
            adapter.load(model, place)
        except UserError as error:
            raise UserError(str(error).replace(place, str(folder))) from None


def put_on(model: nn.Module, folder: Path, layouts: Iterable[Any], config: Mapping[str, Any]) -> None:
    """Wrap `model`, our base without an adapter, as the LoRA in `folder` says and read it; layouts, config: as for `load_renamed`.

    Raises UserError for a folder that is missing, damaged or no plain LoRA, and for modules that the model lacks.
    """
    names = _their_names(model, folder, layouts, config)
    about, state = read_folder(folder)
    modules = _adapted(state)
    if lacking := [name for name in modules if name not in (names or _modules(model.state_dict()))]:
        raise UserError(f"{folder}: adapts {lacking[0]}, which this model does not have; it belongs to another base")
    with tempfile.TemporaryDirectory() as place:
        about, state = _renamed((about, state), names or {name: name for name in modules})
        targets = "|".join(re.escape(name) for name in _adapted(state))
        write_folder(Path(place), {**about, "target_modules": targets}, state)
        try:
            adapter = LoRA.from_folder(place)
            adapter.apply(model)
            adapter.load(model, place)
        except UserError as error:
            raise UserError(str(error).replace(place, str(folder))) from None


def _adapted(state: Iterable[str]) -> list[str]:
    """Names of the modules that the tensors of a folder belong to."""
    return list(dict.fromkeys(key.removeprefix(KEY_PREFIX).partition(".lora_")[0] for key in state))


def _their_names(model: nn.Module, folder: Path, layouts: Iterable[Any], config: Mapping[str, Any]) -> dict[str, str]:
    """{name of a module in the folder: ours}, of the wrapped ones, else of all; {} where it has our names, or those of no layout."""
    if not folder.is_dir():
        return {}
    about, state = read_folder(folder)
    modules, wrapped = set(_adapted(state)), [name for name, _ in adapter_layers(model)]
    ours = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    if about.get("peft_type") != "LORA" or modules <= set(wrapped or _modules(ours)):
        return {}
    for layout in layouts:
        try:
            theirs = layout.undo(ours, config)
            names = {place: own for own, place in module_names(wrapped or _whole(ours, theirs), ours, theirs).items()}
        except UserError:  # it stores a wrapped module in pieces
            continue
        if modules <= names.keys():
            return names
    return {}


def _modules(tensors: Iterable[str]) -> list[str]:
    """Names of the modules with a weight."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]


def _whole(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Those of our modules whose weight the other layout stores as it is."""
    places = {(tensor.data_ptr(), tensor.shape) for tensor in theirs.values()}
    return [name for name in _modules(ours) if ((weight := ours[f"{name}.weight"]).data_ptr(), weight.shape) in places]


def _targeted(targets: str | list[str], modules: Iterable[str]) -> set[str]:
    """The modules that PEFT would wrap."""
    if isinstance(targets, str):
        return {name for name in modules if re.fullmatch(targets, name)}
    return {name for name in modules if any(f".{name}".endswith(f".{ending}") for ending in targets)}


def _renamed(lora: Lora, names: Mapping[str, str]) -> Lora:
    """The same with other names of the modules, also in what the configuration says of single ones."""
    config, state = lora
    patterns = {
        key: {re.escape(new): value for old, new in names.items() if (value := _first(config.get(key) or {}, old)) is not None}
        for key in ("rank_pattern", "alpha_pattern")
    }
    renamed = {}
    for key, tensor in state.items():
        module, _, rest = key.removeprefix(KEY_PREFIX).partition(".lora_")
        renamed[f"{KEY_PREFIX}{names[module]}.lora_{rest}"] = tensor
    return {**config, **patterns}, renamed


def _first(patterns: Mapping[str, Any], name: str) -> Any:
    """Value of the first pattern that fits."""
    return next((value for pattern, value in patterns.items() if fits(pattern, name)), None)


def adapter_usage(engine: str, base: Path, folder: Path) -> str:
    """What to type to load the base and the adapter in `folder` beside it."""
    if engine == "vllm":
        beside = folder.parent.glob(f"*/{CONFIG}")  # any of them may be asked for
        configs = [json.loads(file.read_text(encoding="utf-8")) for file in beside]
        largest = max(rank for config in configs for rank in (config["r"], *(config.get("rank_pattern") or {}).values()))
        room = next((rank for rank in VLLM_RANKS if rank >= largest), largest)  # a larger one vLLM refuses by itself
        llm = f"vllm.LLM({str(base)!r}, enable_lora=True, max_lora_rank={room})"
        return f"{llm} and LoRARequest({folder.name!r}, 1, {str(folder)!r}) with each request"
    return f"peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(folder)!r})"
