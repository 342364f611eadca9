"""Explain why Hydra refused a command line: every bad override gets one line, all at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.signatures import nearest

CONF = Path(__file__).resolve().parent.parent / "conf"


def explain(config_name: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """Lines for the overrides that the configuration refuses, and the overrides that it accepts.

    Choices of options come first, because a value may belong to an option that an earlier word chose; refused words are found by halving.
    """
    lines: list[str] = []
    good: list[str] = []
    with config_loader():
        for part in ([o for o in overrides if is_choice(o)], [o for o in overrides if not is_choice(o)]):
            sift(config_name, part, good, lines)
    return lines, good


def sift(config_name: str, words: list[str], good: list[str], lines: list[str]) -> None:
    """Append the acceptable words to `good`, a line for each other one to `lines`."""
    if not words:
        return
    try:
        compose(config_name, [*good, *words], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        if len(words) == 1:
            lines.append(explain_one(config_name, good, words[0], error))
            return
        half = len(words) // 2
        sift(config_name, words[:half], good, lines)
        sift(config_name, words[half:], good, lines)
    else:
        good.extend(words)


def explain_one(config_name: str, good: list[str], override: str, error: Exception) -> str:
    """The line for one override, given those accepted before it."""
    key, _, value = override.lstrip("+~").partition("=")
    if isinstance(error, OverrideParseException) or (not value and "=" not in override):
        return f"{override}: not an override; write key=value (quote values with spaces, '=' or commas twice: \"key='a=b'\")"
    groups = group_names()
    if isinstance(error, MissingConfigException) or (key in groups and "Could not find" in str(error)):
        options = group_options(key)
        where = f"one of {', '.join(options)}" if options else "no such group"
        return f"{key}: {value!r} is not an option; {where}{nearest(value, options)}"
    if override.startswith("+") and key in groups:
        return f"{override}: {key} is already in the defaults; drop the plus sign and write {key}={value}"
    beside = re.search(r"Could not override '(\w+)", str(error))
    if beside and key in groups and beside[1] != key:  # the option needs a group that this command does not have
        return f"{key}: {value!r} belongs to the other command, python {'generate' if config_name == 'train' else 'train'}.py"
    keys = known_keys(compose(config_name, good))
    candidates = [*groups, *keys]
    close = nearest(key, candidates) or nearest(key.rpartition(".")[2], [k.rpartition(".")[2] for k in keys])
    if ("Key" in str(error) and "is not in struct" in str(error)) or "Could not override" in str(error):
        parent = key.rpartition(".")[0]
        if key in keys:
            return f"{key}: {value} gives it keys that it does not have yet; add them with a plus sign, '+{key}={value}'"
        siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
        allowed = f"; keys of {parent}: {', '.join(siblings)}" if parent and siblings else ""
        return f"{key}: unknown key{close or allowed}"
    return f"{override}: {first_line(error)}{close}"


def is_choice(override: str) -> bool:
    """Does the override choose an option of a group?"""
    return override.lstrip("+~").partition("=")[0] in group_names()


def group_names() -> list[str]:
    """Groups of conf/, nested ones with a slash."""
    return sorted(str(p.relative_to(CONF)) for p in CONF.rglob("*") if p.is_dir() and any(p.glob("*.yaml")))


def group_options(group: str) -> list[str]:
    """Options of one group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def known_keys(config: DictConfig) -> list[str]:
    """Every key path of a composed configuration."""

    def walk(node: Any, path: str) -> list[str]:
        if not isinstance(node, dict):
            return [path]
        inner = [k for name, value in node.items() for k in walk(value, f"{path}.{name}" if path else str(name))]
        return ([path] if path else []) + inner

    return walk(OmegaConf.to_container(config, resolve=False), "")


def first_line(error: BaseException) -> str:
    """The first sentence of a library's message, on one line."""
    text = re.sub(r"\s+", " ", str(error).strip().split("\n")[0])
    return text or type(error).__name__


class config_loader:
    """Context in which `hydra.compose` reads conf/, also inside a running Hydra application."""

    def __enter__(self) -> None:
        self.saved = GlobalHydra.instance().hydra
        self.config = HydraConfig.instance().cfg
        GlobalHydra.instance().clear()
        initialize_config_dir(str(CONF), version_base="1.3")

    def __exit__(self, *exc: object) -> None:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = self.saved
        HydraConfig.instance().cfg = self.config
