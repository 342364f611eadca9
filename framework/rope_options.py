"""Options of the group `rope` inside another node, {rope: OPTION, key: value, ...}: as specs, and as words of a command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from components.contracts import RopeRule, RopeSpec, UserError
from framework.build import build, plain
from framework.overrides import CONF, group_options
from framework.signatures import nearest


def rope_spec(path: str, node: Any, numbers: Mapping[str, Any], needs: str | None = None, **values: Any) -> RopeSpec:
    """What the option that `node`, at the key `path`, names makes of a model.

    Args:
        node: `rope` and those keys of the option that are to differ.
        numbers: the model's rotary_dim, base and original_len.
        needs: a key that the option must have.
        values: laid over the option's own, where it has such keys, and under the node's.

    Raises:
        UserError: another option or key, or what the option refuses, under the key `path`.
    """
    keys = dict(node) if isinstance(node, dict) else {"rope": node}
    option, stored = keys.pop("rope", None), {name: stored_option(name) for name in group_options("rope")}
    able = [name for name in stored if needs is None or needs in stored[name]]
    if option not in able:
        raise UserError(f"{path}.rope: {option!r} is not one of {', '.join(able)}{nearest(str(option), able)}")
    given = {key: value for key, value in values.items() if key in stored[option]}
    try:
        rule: RopeRule = build({**stored[option], **given, **keys}, path=path)
        return rule.spec(**numbers)
    except UserError as error:
        raise UserError(re.sub(r"\brope\.", f"{path}.", str(error))) from error


def rope_words(node: Mapping[str, Any], **values: Any) -> list[str]:
    """Words that choose the option of `node` on a command line, with `values`, quoted for a shell; what the option has anyway is absent."""
    stored = stored_option(node["rope"])
    own = {key: value for key, value in node.items() if key != "rope" and value != stored.get(key)}
    return [shlex.quote(f"rope={node['rope']}"), *(shlex.quote(f"rope.{key}={hydra(value)}") for key, value in {**own, **values}.items())]


def stored_option(name: str) -> dict[str, Any]:
    """The option's file."""
    return plain(OmegaConf.load(CONF / "rope" / f"{name}.yaml"))


def hydra(value: Any) -> str:
    """A value in Hydra's grammar.

    >>> hydra({"policy": "both", "value": None}), hydra([1.5, 2]), hydra("a.json"), hydra("a,b.json")
    ('{policy: both, value: null}', '[1.5, 2]', 'a.json', "'a,b.json'")
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(hydra, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)
