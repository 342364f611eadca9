"""From configuration to objects: compose, check, instantiate, load a run. The only module that calls Hydra's instantiate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from components.contracts import Data, Tokenizer, UserError
from framework import resolvers
from framework.foreign import CACHE, as_run
from framework.overrides import config_loader, explain, first_line
from framework.signatures import check_node
from framework.validate import problems

if TYPE_CHECKING:
    import torch
    from torch import nn

HEAD_MULTIPLE = 64  # head rows are padded to this: tidy shapes for matrix units, as in the published models


class ConfigErrors(UserError):
    """All problems of a configuration; `lines` holds one each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def compose(config_name: str, overrides: list[str] | None = None) -> DictConfig:
    """The configuration that the command line would have, validated.

    Args:
        config_name: "train" or "generate".
        overrides: words of the command line, e.g. ["model/size=test", "seed=7"].

    Raises:
        ConfigErrors: with every problem found.

    Example:
        >>> compose("train", ["model/size=test"]).model.num_layers > 0
        True
    """
    import hydra
    from hydra.errors import HydraException

    resolvers.register()
    overrides = list(overrides or [])
    try:
        with config_loader():
            config = hydra.compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigErrors(all_problems(config_name, overrides, error)) from error
    detach(config)
    check(config)
    return config


def all_problems(config_name: str, overrides: list[str], error: Exception) -> list[str]:
    """Everything wrong with a command line that Hydra refused: the refused words, then what is wrong with the rest."""
    import hydra

    lines, good = explain(config_name, overrides)
    if not lines:
        return [first_line(error)]
    with config_loader():
        config = hydra.compose(config_name, good)
    detach(config)
    try:
        check(config)
    except ConfigErrors as further:
        lines = [*lines, *further.lines]
    return lines


def detach(config: DictConfig) -> None:
    """Give `paths.output_dir` a value where no Hydra application runs to say it."""
    if OmegaConf.is_interpolation(config.paths, "output_dir"):
        config.paths.output_dir = str(Path(config.paths.root) / "unnamed")


def check(config: DictConfig) -> dict[str, Any]:
    """Resolve and validate; return plain containers.

    Raises:
        ConfigErrors: with every problem found.
    """
    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        lines = [f"{key}: no value given; write {key}=VALUE" for key in missing(OmegaConf.to_container(config))]
        raise ConfigErrors(lines or [broken(error)]) from error
    lines = problems(resolved)
    if len(lines) > 1:  # a value that follows another key is wrong because that one is
        following = tuple(f"{path}{end}" for path in interpolated(OmegaConf.to_container(config)) for end in ":.")
        lines = [line for line in lines if not line.startswith(following)] or lines
    if lines:
        raise ConfigErrors(lines)
    return resolved


def interpolated(node: Any, path: str = "") -> Iterator[str]:
    """Key paths of an unresolved configuration whose value is an interpolation."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from interpolated(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str) and "${" in node:
        yield path


def missing(node: Any, path: str = "") -> Iterator[str]:
    """Key paths of an unresolved configuration whose value is to be given (`???`), not those that follow one of them."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from missing(value, f"{path}.{key}" if path else str(key))
    elif node == "???":
        yield path


def broken(error: OmegaConfBaseException) -> str:
    """The line for an interpolation that leads nowhere."""
    return f"{error.full_key or '?'}: {first_line(error).removeprefix('UserError raised while resolving interpolation: ')}"


def plain(node: Any) -> Any:
    """A configuration node as plain dicts and lists, resolved; other values as they are."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def literal(node: Any) -> Any:
    """Resolved containers in which '${' is text, as in a prompt. Hydra resolves twice on its way, so each backslash counts four times."""
    if isinstance(node, dict):
        return {key: literal(value) for key, value in node.items()}
    if isinstance(node, list):
        return [literal(value) for value in node]
    return re.sub(r"(\\*)\$\{", lambda m: "\\" * (4 * len(m[1]) + 3) + "${", node) if isinstance(node, str) else node


def build(node: DictConfig | dict[str, Any] | None, *args: Any, path: str | None = None, **runtime: Any) -> Any:
    """Instantiate one node; None for an empty one. Lists and dicts arrive as plain Python. path: of the node, for messages.

    Raises:
        UserError: the node's target is not allowed or its arguments do not fit.
    """
    import hydra
    from hydra.errors import InstantiationException

    if not node:
        return None
    path = path or (str(node._get_full_key(None)) if isinstance(node, DictConfig) else "") or "config"
    if lines := check_node(path, plain(node)):
        raise ConfigErrors(lines)
    try:
        return hydra.utils.instantiate(literal(plain(node)), *args, _convert_="all", **runtime)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, (TypeError, ValueError)):
            raise UserError(f"{path}: {first_line(cause)}") from error
        raise


def build_data(config: DictConfig) -> Data:
    """The data option; call `prepare` before use."""
    return build(config.data)


def build_model(config: DictConfig, vocab_size: int) -> Any:
    """The model (an nn.Module with the `Model` contract) with its RoPE rule. vocab_size: ids of the tokenizer; a null
    model.vocab_size becomes its next multiple of 64."""
    node = plain(config.model)
    if node["vocab_size"] is None:
        node["vocab_size"] = -(-vocab_size // HEAD_MULTIPLE) * HEAD_MULTIPLE
    elif node["vocab_size"] < vocab_size:
        raise UserError(f"model.vocab_size: {node['vocab_size']} is below the tokenizer's {vocab_size} ids; use null to follow it")
    return build(node, rope=build(config.rope), path="model")


def build_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """One optimizer object over the trainable parameters, grouped by their roles."""
    from components.optim.groups import named_parameters

    return build(config.optimizer)(named_parameters(model))


@dataclass
class Run:
    """A trained run, loaded: configuration, model with its weights (adapter applied), tokenizer, folder, step and file of the weights."""

    cfg: DictConfig
    model: Any  # nn.Module and Model of the contract
    tokenizer: Tokenizer
    path: Path
    step: int
    file: Path | None = None


def run_folder(path: Path) -> Path:
    """The run directory of a `ckpt=` path, which is that directory or a checkpoint file in it.

    Raises:
        UserError: it is neither.
    """
    folder = path if path.is_dir() else path.parent.parent
    if not (folder / "config.yaml").is_file():
        holds = "a run directory holds config.yaml and checkpoints/, a Hugging Face folder config.json"
        raise UserError(f"ckpt: {str(path)!r} is not a run; {holds}")
    return folder


def read_config(run: Path) -> DictConfig:
    """The configuration that a run stored.

    Raises:
        UserError: it cannot be read.
    """
    try:
        config = OmegaConf.load(run / "config.yaml")
    except Exception as error:  # YAML has many ways to be broken
        raise UserError(f"{run / 'config.yaml'}: cannot be read ({first_line(error)})") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{run / 'config.yaml'}: is not the configuration of a run")
    return config


def load_run(path: str | Path, changes: dict[str, Any] | None = None, cache_dir: Path = CACHE) -> Run:
    """Load a run directory or one of its checkpoint files. The only loader of trained models.

    Args:
        path: RUN_DIR (its last checkpoint), RUN_DIR/checkpoints/FILE.ckpt, or a Hugging Face folder.
        changes: {"rope": node, ...} laid over the run's own configuration; None values mean "as trained".
        cache_dir: where a Hugging Face folder becomes a run first.

    Raises:
        UserError: not a run, an unreadable checkpoint, or one of another architecture.
    """
    from components.data.tokenizers import Tokenizer as RunTokenizer
    from framework.checkpoint import load_weights, newest_checkpoint

    path = Path(path)
    if not path.exists():
        raise UserError(f"ckpt: {str(path)!r} does not exist; give a run directory, a checkpoint file or a Hugging Face folder")
    path = as_run(path, cache_dir)
    folder = run_folder(path)
    file = path if path.is_file() else newest_checkpoint(path)
    config = read_config(folder)
    with open_dict(config):
        for key, value in (changes or {}).items():
            if value is not None:
                config[key] = plain(value)  # an interpolation in it may lead to what this configuration lacks
    tokenizer = RunTokenizer.load(folder / "tokenizer")
    model = build_model(config, tokenizer.vocab_size)
    build(config.adapter).apply(model)
    step = load_weights(model, file)
    model.eval()
    return Run(config, model, tokenizer, folder, step, file)
