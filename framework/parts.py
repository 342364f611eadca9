"""The parts of a run, built from its configuration: data, model, adapter, weights; and what is written down before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from components.adapters.base import adapter_layers, merge, task_ids, unwrap
from components.contracts import Data, Tokenizer, UserError
from components.data.tokenizers import Tokenizer as SavedTokenizer
from framework import build, runtime
from framework.checkpoint import checkpoint_step, mismatch, model_weights, newest_intact, read_checkpoint
from framework.logging import masked, say
from framework.runs import read_state, replace_file


@dataclass
class Parts:
    """What a configuration was built into."""

    data: Data
    tokenizer: Tokenizer
    model: Any  # nn.Module and Model of the contract
    resume_file: Path | None  # checkpoint to go on from
    start_step: int
    data_state: dict[str, Any] | None  # what the data must still be when the run is resumed; None where the option does not say


def build_parts(config: DictConfig, run_dir: Path, resuming: bool) -> Parts:
    """Data, model and adapter; weights of `ckpt=` loaded, the checkpoint to resume found and compared."""
    data: Any = build.build_data(config)
    file = newest_intact(run_dir) if resuming else None
    cache_dir = Path(config.paths.cache_dir)
    source = build.load_run(config.ckpt, {"rope": config.rope}, cache_dir) if config.ckpt and file is None else None
    own = run_dir / "tokenizer"
    given = source.tokenizer if source is not None else SavedTokenizer.load(own) if resuming and own.is_dir() else None
    data.prepare(cache_dir, given)
    model = start_model(config, data.tokenizer, source)
    model.train()
    model.gradient_checkpointing = bool(config.gradient_checkpointing)
    if file is not None and (difference := mismatch(model, model_weights(read_checkpoint(file)))):
        raise UserError(f"resume: {str(file)!r} is of another architecture: {difference}")
    data_state = data.fingerprint
    if file is not None and not config.resume_force:
        check_same_data(data_state, run_dir, config)
    return Parts(data, data.tokenizer, model, file, checkpoint_step(file) if file is not None else 0, data_state)


def start_model(config: DictConfig, tokenizer: Tokenizer, source: build.Run | None) -> Any:
    """The model with its adapter: a fresh one, or that of the run of `ckpt=`, whose head then stands in the configuration too.

    What an adapter of that run learned goes into the weights, and a new adapter begins; but one with several tasks, which no weights can
    hold, is gone on with where the configuration has the same. Raises UserError where it has another.
    """
    if source is None:
        model = build.build_model(config, tokenizer.vocab_size)
    else:
        model = source.model
        config.model.vocab_size = model.vocab_size
        holder = task_ids(model)
        if holder is not None and len(holder) > 1 and build.plain(config.adapter) == build.plain(source.cfg.adapter):
            say(f"ckpt: going on with the adapter of {source.path} and its {len(holder)} tasks")
            return model
        model = without_adapter(source)
    build.build(config.adapter).apply(model)
    return model


def without_adapter(run: build.Run, task: str | int | None = None) -> Any:
    """The run's model as plain weights: what an adapter learned, for `task` where there are several, is added to them.

    Raises:
        UserError: the adapter has several tasks and none was named, or it cannot be merged.
    """
    holder = task_ids(run.model)
    if task is None and holder is not None and len(holder) > 1:
        raise UserError(
            f"ckpt: {run.path} has an adapter with {len(holder)} tasks ({', '.join(holder.names)}), each with weights of its own; go on "
            "with the same adapter and tasks, or write the weights of one by python generate.py task=export adapter.task=NAME "
            f"ckpt={run.path} and start from that folder"
        )
    if merge(run.model, task)["modules"]:
        say(f"ckpt: the adapter of {run.path} was merged into its weights")
    if any(True for _ in adapter_layers(run.model)):
        unwrap(run.model)
    return run.model


def check_same_data(now: dict[str, Any] | None, run_dir: Path, config: DictConfig) -> None:
    """Compare the data with what run_state.json says that the run began on; a run that says nothing (an older one) passes.

    Raises:
        UserError: text or epoch is another, so that the place in the epoch would mean other tokens.
    """
    before = read_state(run_dir).get("data")
    if not before or not now or before == now:
        return
    names = {"train": "training text", "val": "held-out text", "epoch_rows": "rows of an epoch"}
    changed = ", ".join(names.get(key, key) for key in sorted({*before, *now}) if before.get(key) != now.get(key))
    path = OmegaConf.select(config, "data.path")
    where = f" (data.path={build.plain(path)})" if path is not None else ""
    raise UserError(
        f"resume: the data changed since {run_dir} began: {changed}{where}; put it back, start a new run, or add resume_force=true"
    )


def with_head(config: DictConfig, parts: Parts) -> DictConfig:
    """A resolved copy of the configuration with the size of the head filled in."""
    config = DictConfig(OmegaConf.to_container(config, resolve=True))
    config.model.vocab_size = parts.model.vocab_size
    return config


def save_setup(config: DictConfig, run_dir: Path, parts: Parts) -> DictConfig:
    """Write config.yaml (resolved, without secrets) and the tokenizer; return the configuration with the size of the head filled in."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = with_head(config, parts)
    facts = {"versions": runtime.versions(), "git": runtime.git_state()}
    trailer = "".join(f"# {line}\n" for line in OmegaConf.to_yaml(facts).splitlines())
    replace_file(run_dir / "config.yaml", OmegaConf.to_yaml(masked(OmegaConf.to_container(config))) + trailer)
    parts.tokenizer.save(run_dir / "tokenizer")
    return config


def sweep_of(run_dir: Path) -> str | None:
    """Name of the sweep that the run belongs to, from what Hydra stored when it began."""
    file = run_dir / ".hydra" / "hydra.yaml"
    if not file.is_file():
        return None
    stored = OmegaConf.load(file).hydra
    return run_dir.parent.name if str(stored.mode).endswith("MULTIRUN") else None
