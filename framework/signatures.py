"""Check a resolved configuration against the classes it names: targets, keys, types. Every problem is one line; all are found at once."""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union

ALLOWED = ("components.", "framework.", "kernels.", "torch.", "lightning.")
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_")


def nearest(word: str, valid: typing.Iterable[str], remedy: str = "did you mean '{}'?") -> str:
    """'; did you mean ...' with the closest valid name, or ''."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return "; " + remedy.format(close[0]) if close else ""


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dict with a `_target_` below `node` (plain containers), with its key path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}[{index}]")


def check_targets(config: dict[str, Any]) -> list[str]:
    """Problems of every `_target_` node of a resolved configuration: target not allowed or not there, unknown keys, wrong types."""
    allowed = ALLOWED + tuple(config.get("allow_targets") or ())
    problems: list[str] = []
    for path, node in targets(config):
        problems += check_node(path, node, allowed)
    return problems


def check_node(path: str, node: dict[str, Any], allowed: Sequence[str] = ALLOWED) -> list[str]:
    """Problems of one `_target_` node."""
    name = node["_target_"]
    try:
        target = locate(name, allowed)
    except LookupError as error:
        return [f"{path}._target_: {error.args[0]}"]
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = type_hints(target)
    problems = []
    for key, value in node.items():
        if key in RESERVED:
            continue
        if key not in parameters and not takes_any:
            problems.append(f"{path}.{key}: unknown key of {name.rpartition('.')[2]}{nearest(key, parameters)}")
        elif key in hints and not fits(value, hints[key], parameters[key].default):
            problems.append(f"{path}.{key}: {value!r} is not {describe(hints[key])}{nearest_literal(value, hints[key])}")
    return problems


def locate(name: Any, allowed: Sequence[str] = ALLOWED) -> Any:
    """Import what a `_target_` names.

    Raises:
        LookupError: the name has no allowed prefix, or nothing is there.
    """
    if not isinstance(name, str) or not name.startswith(tuple(allowed)):
        raise LookupError(f"{name!r} is not allowed; targets start with {', '.join(ALLOWED)} or a prefix in allow_targets=[...]")
    module, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise LookupError(f"{name!r} cannot be imported ({error})") from error
    if not hasattr(found, attribute):
        raise LookupError(f"'{module}' has no '{attribute}'{nearest(attribute, vars(found))}")
    return getattr(found, attribute)


def type_hints(target: Any) -> dict[str, Any]:
    """Parameter annotations of a class or function; {} where they cannot be evaluated."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError, AttributeError):
        return {}


def fits(value: Any, hint: Any, default: Any = inspect.Parameter.empty) -> bool:
    """Can a value from YAML serve a parameter annotated `hint`? Annotations that say nothing about plain values pass."""
    if value is None:
        return default is None or not plain(hint) or type(None) in typing.get_args(hint)
    if isinstance(value, dict) and "_target_" in value:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    container = origin or hint
    if inspect.isclass(container) and issubclass(container, Mapping):
        return isinstance(value, dict)
    if inspect.isclass(container) and issubclass(container, Sequence):
        items = [a for a in arguments if a is not Ellipsis]
        return isinstance(value, list) and (not items or all(any(fits(v, a) for a in items) for v in value))
    return True


def plain(hint: Any) -> bool:
    """Does the annotation consist of types that YAML can write?"""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    known = (int, float, bool, str, type(None))
    return all(o in known or typing.get_origin(o) in (list, tuple, dict, Literal) for o in options)


def describe(hint: Any) -> str:
    """An annotation in a user's words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    several = {int: "whole numbers, such as [128, 256]", float: "numbers, such as [0.1, 0.5]"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if hint in names:
        return names[hint]
    container = origin or hint
    if inspect.isclass(container) and issubclass(container, Mapping):
        return "a mapping"
    if inspect.isclass(container) and issubclass(container, Sequence):
        return "a list" + (f" of {several.get(arguments[0]) or describe(arguments[0])}" if arguments else "")
    return getattr(hint, "__name__", str(hint))


def nearest_literal(value: Any, hint: Any) -> str:
    """The closest allowed word when the annotation lists words."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = [str(w) for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o)]
    return nearest(str(value), words)
