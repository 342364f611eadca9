"""Checkpoint files: .pth and .bin (no code is run from them), .safetensors, sharded safetensors with an index, Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.contracts import UserError
from components.interop.common import Tensors, unwrapped

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
IN_FOLDER = (INDEX, SINGLE, "pytorch_model.bin.index.json", "pytorch_model.bin", "model.pth")
SHARD_BYTES = 5 * 10**9  # as large as the files that Hugging Face's tools write


@dataclass(frozen=True)
class Source:
    """A checkpoint as read. about: config.json, or the hparams inside a .pth; tokenizer: the tokenizer.json beside it."""

    tensors: Tensors
    about: dict[str, Any]
    tokenizer: Path | None


def read(path: Path) -> Source:
    """Read a checkpoint file, an index or a folder. Names lose what wrappers (DDP, FSDP, torch.compile) added to them.

    Raises:
        UserError: missing, damaged, of an unknown kind, or a pickle that holds more than tensors and plain containers.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    file = path
    if path.is_dir():
        found = [folder / name for name in IN_FOLDER if (folder / name).is_file()]
        if not found:
            raise UserError(f"{path}: holds none of {', '.join(IN_FOLDER)}; give the checkpoint file itself")
        file = found[0]
    inside: dict[str, Any] = {}
    if file.name.endswith(".index.json"):
        tensors = read_shards(file)
    elif file.suffix == ".safetensors":
        tensors = read_safetensors(file)
    else:
        tensors, inside = read_pickle(file)
    about = inside or (read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {})
    tokenizer = folder / TOKENIZER
    return Source(unwrapped(tensors), about, tokenizer if tokenizer.is_file() else None)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError when it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


def read_safetensors(file: Path) -> Tensors:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: truncated, damaged or no safetensors file ({str(error).splitlines()[0]})") from error


def read_shards(index: Path) -> Tensors:
    """All tensors of a sharded checkpoint. Raises UserError when the index and its files disagree."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: has no weight_map")
    tensors: Tensors = {}
    for name in sorted(set(map(str, places.values()))):
        if Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, which is not a file beside it")
        shard = index.parent / name
        if not shard.is_file():
            raise UserError(f"{shard}: no such file, but {index.name} names it")
        part = read_safetensors(shard) if shard.suffix == ".safetensors" else read_pickle(shard)[0]
        if astray := sorted(key for key in part if places.get(key) != name):
            raise UserError(f"{shard}: holds {', '.join(astray)}, which {index.name} does not place there")
        tensors.update(part)
    if absent := sorted(set(places) - set(tensors)):
        raise UserError(f"{index}: names {', '.join(absent)}, which no file holds")
    return tensors


def read_pickle(file: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and hparams of a file of torch.save: a state dict, or a dict that holds one as `model` or `state_dict`."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a damaged or foreign file as any of half a dozen types
        raise UserError(f"{file}: cannot be read: damaged, no checkpoint, or it holds objects whose code would have to run") from error
    hparams: dict[str, Any] = {}
    if isinstance(content, Mapping):
        hparams = content["hparams"] if isinstance(content.get("hparams"), dict) else {}
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file}: holds no state dict (tensors by name, or such a dict as `model` or `state_dict`)")
    return {str(name): tensor for name, tensor in content.items()}, hparams


def write_folder(folder: Path, tensors: Tensors, config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and model.safetensors, or shards with an index above `shard_bytes`.

    A tensor that is the same memory as an earlier one (a tied head) is left out, as Hugging Face does. Raises UserError when the weights
    cannot be written.
    """
    seen: set[tuple[int, torch.Size]] = set()
    shards: list[Tensors] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen:
            continue
        seen.add(place)
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.contiguous().clone()  # blocks of a fused matrix are views, which a file cannot hold
        room -= size
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    several = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = several if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # the library's own kind, also for a full disk
            raise UserError(f"{folder / name}: cannot be written ({error}); is the disk full?") from error
        (folder / name).chmod((folder / CONFIG).stat().st_mode)  # the library lets nobody else read it
    if len(shards) == 1:
        return
    total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n", encoding="utf-8")


def write_pth(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file of torch.save that `weights_only=True` can read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(content), file)
