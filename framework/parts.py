"""The parts of a run, built from its configuration: data, model, adapter, weights; and what is written down before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from components.adapters.base import adapter_layers, adapter_state, by_token, merge, task_ids, tasks_to_say, unwrap
from components.contracts import Data, Tokenizer, UserError
from components.data.tokenizers import Tokenizer as SavedTokenizer
from framework import build, runtime
from framework.checkpoint import checkpoint_step, mismatch, model_weights, newest_intact, read_checkpoint
from framework.export import interop, layouts_holding
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
    model = start_model(config, data.tokenizer, source, fresh=file is None)
    tell_of_rest(config, data)
    model.train()
    model.gradient_checkpointing = bool(config.gradient_checkpointing)
    if file is not None and (difference := mismatch(model, model_weights(read_checkpoint(file)))):
        raise UserError(f"resume: {str(file)!r} is of another architecture: {difference}")
    data_state = data.fingerprint
    if file is not None and not config.resume_force:
        check_same_data(data_state, run_dir, config)
    return Parts(data, data.tokenizer, model, file, checkpoint_step(file) if file is not None else 0, data_state)


def tell_of_rest(config: DictConfig, data: Any) -> None:
    """Say which tasks' rows are drawn and train nothing, since the adapter trains what others have alone (`resting`), and what to do."""
    resting = [name for name in getattr(build.build(config.adapter), "resting", ()) if name in getattr(data, "task_names", ())]
    if resting:
        weighed = isinstance(config.data.get("tasks"), DictConfig)
        way = "; weight: 1e-6 in their entries of data.tasks draws the others alone" if weighed else ""
        say(f"adapter: rows of {', '.join(resting)} are drawn in their share, and train nothing{way}")


def start_model(config: DictConfig, tokenizer: Tokenizer, source: build.Run | None, fresh: bool) -> Any:
    """The model with its adapter: a fresh one, or that of the run of `ckpt=`, whose head then stands in the configuration too.

    What an adapter of that run learned goes into the weights, and a new adapter begins; but one that can be taken over (`take_over`), since
    it has tasks, experts or a router, is gone on with. Raises UserError where the configuration has another that no weights can hold.
    fresh: the weights are not those of a checkpoint that is to be read; `adapter_from` says where a new adapter starts then.
    """
    adapter, given = build.build(config.adapter), config.get("adapter_from")
    if given is not None and not hasattr(adapter, "load"):
        raise UserError(f"adapter_from: {given}, but this run has no adapter; choose one by adapter=NAME")
    if source is None:
        model = build.build_model(config, tokenizer.vocab_size)
    else:
        model = source.model
        config.model.vocab_size = model.vocab_size
        if hasattr(adapter, "take_over") and config.adapter.get("_target_") == source.cfg.adapter.get("_target_"):
            if given is not None:
                raise UserError(f"adapter_from: {given}, but the adapter of {source.path} is gone on with; drop one of the two")
            go_on(model, adapter, config, source)
            return model
        model = without_adapter(source)
    adapter.apply(model)
    if source is None and fresh and any(True for _ in adapter_layers(model)):
        say(
            "ckpt: null, so that the adapter is trained on a base of random weights, which stays as it is; ckpt=RUN_DIR gives a trained one"
        )
    if given is not None and fresh:
        numbers = build.plain((config if source is None else source.cfg).model) | {"vocab_size": model.vocab_size}
        layouts = [layout for layout in layouts_holding(numbers["_target_"]).values() if layout is not None]
        interop().load_renamed(adapter, model, given, layouts, numbers)
        say(f"adapter_from: the adapter starts from {given}")
    elif fresh and (key := getattr(adapter, "of_learned", None)):
        raise UserError(
            f"adapter.{key}: {getattr(adapter, key)}, which is for an adapter that learned, and this one begins; give ckpt=RUN_DIR of a "
            "run with the same adapter, or adapter_from=DIR, or drop the override"
        )
    return model


def go_on(model: Any, adapter: Any, config: DictConfig, source: build.Run) -> None:
    """Put the configuration's `adapter` in the place of the source's, with what that one learned.

    Keys that the adapter lists in `may_change` (dotted, * for a name) may differ; they decide how it learns and not what its tensors mean.
    Entries may come to the mappings of `may_add`.
    Raises UserError for any other difference, and for tasks that the adapter cannot take over.
    """
    before, now = (flat(build.plain(c.adapter)) for c in (source.cfg, config))
    older = {key: p.default for key, p in inspect.signature(type(adapter)).parameters.items() if p.default is not p.empty}  # keys to come
    free, new = getattr(adapter, "may_change", ()), getattr(adapter, "may_add", ())
    for key in dict.fromkeys([*before, *now]):
        same = now.get(key) == before.get(key, older.get(key)) or not (now.get(key) or before.get(key, older.get(key)))
        if not same and not any(fnmatch(key, pattern) for pattern in free) and not comes(key, before, new):
            raise UserError(
                f"adapter.{key}: {now.get(key)}, but the adapter of {source.path}, which is gone on with, has {before.get(key)}; "
                f"keys that may change are {', '.join(free) or 'none'}; or write the weights of one task by python generate.py task=export "
                f"adapter.task=NAME ckpt={source.path} and start from that folder"
            )
    names = getattr(task_ids(model), "names", ())
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    unwrap(model)
    adapter.apply(model)
    adapter.take_over(model, state, names, str(source.path))
    say(f"ckpt: going on with the adapter of {source.path}" + (f" and its {len(names)} tasks" if tasks_to_say(model) else ""))


def comes(key: str, before: dict[str, Any], mappings: Sequence[str]) -> bool:
    """Whether a dotted key belongs to an entry NAME of a mapping, mapping.NAME..., that had entries before, but not this one."""
    mapping, _, rest = key.partition(".")
    names = {other.split(".")[1] for other in before if other.startswith(f"{mapping}.")}
    return mapping in mappings and bool(names) and rest.split(".")[0] not in names


def flat(tree: Any, stem: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {stem.removesuffix("."): tree}
    return {key: value for name, inner in tree.items() for key, value in flat(inner, f"{stem}{name}.").items()}


def without_adapter(run: build.Run, task: str | int | None = None) -> Any:
    """The run's model as plain weights: what an adapter learned, for `task` where there are several, is added to them.

    Raises:
        UserError: the adapter has several tasks and none was named, or it cannot be merged.
    """
    if by_token(run.model):
        raise UserError(
            f"ckpt: {run.path} has an adapter that weighs its parts anew for each token, which no weights can hold; go on with the same "
            "adapter, or start from the run that it was trained on"
        )
    if task is None and (several := tasks_to_say(run.model)):
        raise UserError(
            f"ckpt: {run.path} has an adapter with {len(several)} tasks ({', '.join(several)}), each with weights of its own; go on "
            "with the same adapter and tasks, or write the weights of one by python generate.py task=export adapter.task=NAME "
            f"ckpt={run.path} and start from that folder"
        )
    if merge(run.model, task)["modules"]:
        names = getattr(task_ids(run.model), "names", ())
        which = f", task {task if isinstance(task, str) else names[task or 0]}," if names else ""
        say(f"ckpt: the adapter of {run.path}{which} was merged into a copy of its weights; the run is as it was")
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
