"""Fused projections, such as q, k and v in one matrix: how many rows each block has, by the model or by the user."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from components.adapters.base.leaves import leaf_of
from components.contracts import UserError

KEY = "adapter.fused"
EXAMPLE = "{qkv_proj: [q, k, v]}"


def check_fused(fused: Mapping[str, Any]) -> None:
    """Raise UserError for blocks that are neither two or more names nor two or more numbers of rows."""
    for ending, blocks in fused.items():
        several = isinstance(blocks, Sequence) and not isinstance(blocks, str) and len(blocks) > 1
        names = several and all(isinstance(block, str) for block in blocks) and len(set(blocks)) == len(blocks)
        rows = several and all(type(block) is int and block > 0 for block in blocks)
        if not names and not rows:
            raise UserError(f"{KEY}.{ending}: {blocks!r}; needed are names, such as [q, k, v], or rows, such as [64, 16, 16], at least two")


def fused_rows(model: nn.Module, fused: Mapping[str, Sequence[str | int]], wrapped: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """{module name: rows of its blocks} of the wrapped modules that are fused, whatever model it is.

    What the model says itself (`fused_splits()`) holds. fused: {ending of a module's name, at a dot: its blocks}, which lie one after
    another in the rows of the weight (of the output, for Conv1D); a projection that interleaves them by head cannot be split. Blocks are
    numbers of rows, or names: these have equal parts, but q, k and v of a model whose `config` has fewer heads of k and v have theirs.
    Raises UserError for a model that says nothing while `fused` is empty, an ending that no wrapped module has, one that the model speaks
    of itself, and rows that do not add up.
    """
    says = hasattr(model, "fused_splits")
    own: Mapping[str, Sequence[int]] = model.fused_splits() if says else {}  # type: ignore[operator]
    found = {name: tuple(own[f"{name}.weight"]) for name in wrapped if f"{name}.weight" in own}
    if not says and not fused:
        raise UserError(
            f"adapter.split_fused: true, but a {type(model).__name__} does not say which projections are fused; name them, such as "
            f"{KEY}={EXAMPLE}, or set adapter.split_fused=false"
        )
    for ending, blocks in fused.items():
        hits = [name for name in wrapped if f".{name}".endswith(f".{ending}")]
        if not hits:
            near = difflib.get_close_matches(ending, wrapped, 3, cutoff=0.0)
            raise UserError(f"{KEY}.{ending}: no wrapped module's name ends in it; nearest: {', '.join(near)}")
        for name in hits:
            if name in found:
                raise UserError(f"{KEY}.{ending}: {name} has blocks of {', '.join(map(str, found[name]))} rows already; drop it")
            module = model.get_submodule(name)
            leaf = leaf_of(getattr(module, "base_layer", module))  # `inject` says what a second adapter is
            assert leaf is not None  # by select_modules
            found[name] = _rows(model, f"{KEY}.{ending}", name, blocks, leaf.out_features)
    return found


def _rows(model: nn.Module, key: str, name: str, blocks: Sequence[str | int], total: int) -> tuple[int, ...]:
    """Rows of each block of a module with `total` of them."""
    if isinstance(blocks[0], int):
        rows = tuple(int(block) for block in blocks)
        if sum(rows) != total:
            raise UserError(f"{key}: {', '.join(map(str, rows))} are {sum(rows)} rows, but {name} has {total}")
        return rows
    heads = _heads(model) if set(blocks) == {"q", "k", "v"} else {}
    parts = [heads.get(str(block), 1) for block in blocks]
    each, rest = divmod(total, sum(parts))
    if rest:
        shares = " and ".join(f"{part} of {block}" for block, part in zip(blocks, parts)) if heads else f"{len(blocks)} equal parts"
        raise UserError(f"{key}: {total} rows of {name} are not {shares}; give the rows of each block, such as [64, 16, 16]")
    return tuple(part * each for part in parts)


def _heads(model: nn.Module) -> dict[str, int]:
    """Heads of q, k and v by the model's `config`, as transformers names them; {} where it does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    q, kv = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    return {"q": q, "k": kv, "v": kv} if isinstance(q, int) and isinstance(kv, int) else {}
