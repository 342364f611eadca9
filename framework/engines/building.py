"""Which engine a configuration names, over what of a run."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from components.contracts import Engine, UserError
from framework.build import Run, build
from framework.signatures import ALLOWED, locate

if TYPE_CHECKING:
    from collections.abc import Iterable

DECIDING = frozenset(
    {"ids", "logit_bias", "logprobs", "seed", "stop_ids", "texts", "token_ids"}
)  # abilities that answers, or rows, depend on


def takes(config: DictConfig, allowed: Iterable[str] = ()) -> str:
    """What the engine is built from: `model`, the live module; `export`, the run's export; `tokenizer`, that of a run or None."""
    return str(getattr(locate(config._target_, (*ALLOWED, *allowed)), "takes", "model"))


def build_engine(config: DictConfig, run: Run | None, cache_dir: Path, task: str | int | None = None) -> Engine:
    """The engine of the node `engine`. run: None where the engine needs none.

    An export is made once and found again by the digest of what is in it; the run's adapter, for `task`, is merged into it.

    Raises:
        UserError: no run for an engine that needs one, or one that the engine cannot express.
    """
    needs = takes(config, run.cfg.allow_targets if run is not None else ())
    if needs == "tokenizer":
        engine: Engine = build(config, None if run is None else run.tokenizer)
        return engine
    if run is None:
        raise UserError("ckpt: null; this engine needs a run: ckpt=RUN_DIR")
    if needs == "export":
        reader = locate(config._target_, (*ALLOWED, *run.cfg.allow_targets)).reader  # type: ignore[attr-defined]
        return build(config, exported(run, reader, cache_dir, task), run.tokenizer)
    return build(config, run.model, run.tokenizer)


def exported(run: Run, reader: str, cache_dir: Path, task: str | int | None) -> Path:
    """The folder that `reader` (transformers, vllm) reads, made now or found in the cache."""
    from framework.export import export, layout_for

    try:
        layout = layout_for(run, None, reader, "task.format")
    except UserError as error:
        raise UserError(
            f"engine: {reader} has no class for a {type(run.model).__name__}, which {run.path} is; take engine=native"
        ) from error
    folder = cache_dir / "exports" / f"{run.path.name}-{digest(run, reader, task)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        own = replace(run, model=copy.deepcopy(run.model))  # an export merges adapters and moves weights
        export(own, folder, layout, reader, None, "paths.cache_dir", task)
    return folder


def identity(engine: Engine, run: Run | None) -> dict[str, Any]:
    """What of an engine and a run decides the answers: kind, model and number format of the engine, not its address, so that a model may
    move; what it can do, where answers depend on that; the run's weights, and how its data make prompts.
    """
    dtype = str(getattr(engine, "dtype", getattr(engine, "arguments", {}).get("dtype")))
    kind = engine.engine_id.partition(":")[0]
    found: dict[str, Any] = {"engine": [kind, engine.model_id, dtype], "able": sorted(DECIDING & engine.capabilities)}
    if run is not None:
        data = OmegaConf.to_container(run.cfg.data, resolve=True)
        template = {key: data[key] for key in ("_target_", "template") if isinstance(data, dict) and key in data}
        found |= {"weights": digest(run), "data": template}
    return found


def digest(run: Run, *further: Any) -> str:
    """16 hex digits of the weights, positions and tokenizer of a run."""
    import torch

    about = (*further, repr(getattr(run.model, "rope_spec", None)), run.tokenizer.to_json(), run.tokenizer.stop_ids)  # type: ignore[attr-defined]
    found = hashlib.blake2b(repr(about).encode(), digest_size=8)
    for name, tensor in sorted(run.model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
