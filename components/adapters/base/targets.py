"""Which modules an adapter wraps: by role, by regex, by name suffix, or all linear layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from components.adapters.base.leaves import is_embedding, leaf_of
from components.contracts import ROLES, Role, UserError

NEVER_ALL = ("head", "embedding", "router")  # `all-linear` leaves these alone
MOST_NAMES = 20  # nearest names in a message


def select_modules(
    model: nn.Module, targets: str | Sequence[str], exclude: str | None, roles: Mapping[str, Role], opaque: type[nn.Module],
    embeddings: bool,
) -> list[str]:  # fmt: skip
    """Names of the leaf modules to wrap, in the order of the model.

    targets: `role:qkv,o` (modules whose weight has one of the roles; a role that this model lacks is skipped), `all-linear` (every
        linear layer but head, embedding and router), any other string as a regex for the whole name, or a list of name endings at dots, of
        which each must match. exclude: regex for the whole name; wins. roles: by parameter name before wrapping. opaque: wrapper type that
        counts as a leaf. embeddings: whether an nn.Embedding can be wrapped. Raises UserError when nothing is left, listing the nearest
        names, for a leaf that cannot be wrapped (see `components.adapters.base.leaves.leaf_of`), and for the head, which is not called as
        a module in training.
    """
    leaves = dict(_leaves(model, opaque))
    dropped = _compile("adapter.exclude", exclude) if exclude is not None else None
    chosen = [name for name in _matches(model, leaves, targets, roles, opaque) if dropped is None or not dropped.fullmatch(name)]
    if not chosen:
        outside = " outside adapter.exclude" if exclude else ""
        tied = _asks_for_head(targets) and bool(roles) and "head" not in roles.values()
        why = "the head is tied to the embedding and no module of its own; " if tied else ""
        raise UserError(f"adapter.targets: {_shown(targets)} matches no module{outside}; {why}{_nearest(targets, leaves)}")
    for name in chosen:
        if roles.get(f"{name}.weight") == "head":
            raise UserError(f"adapter.targets: {_shown(targets)} matches the head {name}, whose weight the loss reads; set adapter.exclude")
        leaf = leaves[name]
        if is_embedding(leaf) and not embeddings:
            raise UserError(
                f"adapter.targets: {_shown(targets)} matches {name}, an embedding, which only adapter=lora can wrap; set adapter.exclude"
            )
        if leaf_of(leaf) is None and not isinstance(leaf, opaque):
            kind = "an Embedding with max_norm" if type(leaf) is nn.Embedding else f"a {type(leaf).__name__}"
            kind += " with packed weights, through which torch.ao passes no gradient" if _is_packed(leaf) else ""
            raise UserError(
                f"adapter.targets: {_shown(targets)} matches {name}, {kind}; only nn.Linear, Conv1D and nn.Embedding can be wrapped, "
                "narrow the pattern or set adapter.exclude"
            )
    return chosen


def _asks_for_head(targets: str | Sequence[str]) -> bool:
    return isinstance(targets, str) and targets.startswith("role:") and "head" in targets.removeprefix("role:").replace(" ", "").split(",")


def modules_ending_in(model: nn.Module, endings: Sequence[str], key: str) -> list[str]:
    """Names of the modules that end, at a dot, in one of `endings`. Raises UserError, naming `key`, for one that no module has."""
    names = [name for name, _ in model.named_modules() if name]
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in names):
            near = difflib.get_close_matches(ending, names, 3, cutoff=0.0)
            raise UserError(f"{key}: no module's name ends in {ending!r}; nearest: {', '.join(near)}")
    return [name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def _is_packed(module: nn.Module) -> bool:
    """Whether it is a quantised layer of torch.ao, whose weight is a method, and whose child holds the numbers."""
    return callable(getattr(module, "weight", None))


def _is_linear(module: nn.Module) -> bool:
    return leaf_of(module) is not None and not is_embedding(module)


def _leaves(module: nn.Module, opaque: type[nn.Module], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules without children by name; what `opaque` wraps is not entered. A module under two names is listed under both."""
    closed = isinstance(module, opaque) or _is_packed(module)
    children = [] if closed else [(key, child) for key, child in module._modules.items() if child is not None]
    if name and not children:
        yield name, module
    for child_name, child in children:
        yield from _leaves(child, opaque, f"{name}.{child_name}" if name else child_name)


def _matches(
    model: nn.Module, leaves: Mapping[str, nn.Module], targets: str | Sequence[str], roles: Mapping[str, Role], opaque: type[nn.Module]
) -> list[str]:
    if not isinstance(targets, str):
        return _by_suffix(leaves, list(targets))
    if targets == "all-linear":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        linear = [name for name, module in leaves.items() if (_is_linear(module) or isinstance(module, opaque)) and module is not output]
        return [name for name in linear if roles.get(f"{name}.weight") not in NEVER_ALL]
    if targets.startswith("role:"):
        wanted = [role.strip() for role in targets.removeprefix("role:").split(",")]
        for role in wanted:
            if role not in ROLES:
                near = difflib.get_close_matches(role, ROLES, 1)
                raise UserError(
                    f"adapter.targets: {role!r} is not a role; allowed: {', '.join(ROLES)}" + (f"; did you mean {near[0]}?" if near else "")
                )
        return [name for name in leaves if roles.get(f"{name}.weight") in wanted]
    pattern = _compile("adapter.targets", targets)
    return [name for name in leaves if pattern.fullmatch(name)]


def _by_suffix(leaves: Mapping[str, nn.Module], suffixes: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for suffix in suffixes:
        hits = [name for name in leaves if name == suffix or name.endswith(f".{suffix}")]
        if not hits:
            raise UserError(f"adapter.targets: no module's name ends in {suffix!r}; {_nearest(suffix, leaves)}")
        found.update(hits)
    return [name for name in leaves if name in found]


def _nearest(targets: str | Sequence[str], leaves: Mapping[str, nn.Module]) -> str:
    """The names most like what was asked for; linear layers alone."""
    names = [name for name, module in leaves.items() if _is_linear(module)]
    wanted = targets if isinstance(targets, str) else " ".join(targets)
    near = difflib.get_close_matches(wanted, names, MOST_NAMES, cutoff=0.0)
    return f"nearest linear modules: {', '.join(near)}" if near else "the model has no linear module"


def _shown(targets: str | Sequence[str]) -> str:
    return repr(targets if isinstance(targets, str) else list(targets))


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is not a regular expression ({error})") from None
