"""What every checkpoint layout shares: a table of tensors read in both directions, strict checks, and the sizes that shapes tell.

A layout is a list of `Entry`, one for each tensor of ours. Both directions walk the same list, so neither can forget what the other knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.contracts import RopeSpec, UserError

Tensors = dict[str, Tensor]
Config = Mapping[str, Any]  # the node `model` of a configuration
Shape = tuple[int, ...]

WRAPPERS = {"_forward_module", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
SHOWN_SHAPES = 3


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the one or more that hold the same numbers elsewhere; split and join are each other's inverse."""

    ours: str
    shape: Shape
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Layout:
    """What a module of this folder offers as LAYOUT.

    Attributes:
        name: the word for it on a command line.
        model: option of the group `model` that its checkpoints become.
        matches: do these tensor names look like this layout?
        infer: (tensors, config.json or hparams, values given by the user) -> the model's numbers; asks for what cannot be inferred.
        asks: keys of the model that a written checkpoint does not hold.
        from_foreign: (their tensors, the model's numbers) -> our state dict.
        to_foreign: (our state dict, the model's numbers) -> their tensors, when their code computes the same with them.
        undo: the reverse of `from_foreign` alone, whatever their code would compute.
        write: (folder, their tensors, the model's numbers, id of the end-of-text token, bytes of a shard) -> None; where there is `rope`,
            also the keywords rope (the model's spec or None), stops (ids that end a turn, beside the end of text) and engine.
        canonical: their tensors under the names that `to_foreign` gives, where there are several customs.
        rope: (config.json, the model's numbers) -> the spec that the checkpoint's positions were rescaled with, None for plain ones;
            absent when the layout has no place for a RoPE rule.
        engines: libraries (transformers, vllm) that build the model from a written folder by themselves, the first by default.
    """

    name: str
    model: str
    matches: Callable[[Iterable[str]], bool]
    infer: Callable[[Tensors, Config, Config], dict[str, Any]]
    asks: tuple[str, ...]
    from_foreign: Callable[[Tensors, Config], Tensors]
    to_foreign: Callable[[Tensors, Config], Tensors]
    undo: Callable[[Tensors, Config], Tensors]
    write: Callable[..., None]
    canonical: Callable[[Tensors], Tensors] = dict
    rope: Callable[[Config, Config], RopeSpec | None] | None = None
    engines: tuple[str, ...] = ()


def same(ours: str, theirs: str, *shape: int) -> Entry:
    """The same tensor under another name."""
    return Entry(ours, shape, (theirs,), (shape,), lambda t: (t,), lambda parts: parts[0])


def stacked(ours: str, theirs: Sequence[str], rows: Sequence[int], columns: int) -> Entry:
    """Matrices that we keep one above the other."""
    shapes = tuple((n, columns) for n in rows)
    return Entry(ours, (sum(rows), columns), tuple(theirs), shapes, lambda t: t.split(list(rows)), lambda parts: torch.cat(list(parts)))


def mamba_entries(ours: str, theirs: str, config: Config) -> list[Entry]:
    """A Mamba-1 mixer: transformers, mamba_ssm and the Samba reference agree on its tensors. ours, theirs: prefixes with their dot."""
    width, channels = config["hidden_size"], config["expand"] * config["hidden_size"]
    states, taps = config["state_size"], config["conv_kernel"]
    rank = config.get("dt_rank") or -(-width // 16)
    conv = Entry(
        f"{ours}conv_weight", (channels, taps), (f"{theirs}conv1d.weight",), ((channels, 1, taps),),
        lambda t: (t[:, None],), lambda parts: parts[0][:, 0],
    )  # fmt: skip
    return [
        same(f"{ours}in_proj.weight", f"{theirs}in_proj.weight", 2 * channels, width),
        conv,
        same(f"{ours}conv_bias", f"{theirs}conv1d.bias", channels),
        same(f"{ours}x_proj.weight", f"{theirs}x_proj.weight", rank + 2 * states, channels),
        same(f"{ours}dt_proj.weight", f"{theirs}dt_proj.weight", channels, rank),
        same(f"{ours}dt_bias", f"{theirs}dt_proj.bias", channels),
        same(f"{ours}A_log", f"{theirs}A_log", channels, states),
        same(f"{ours}D", f"{theirs}D", channels),
        same(f"{ours}out_proj.weight", f"{theirs}out_proj.weight", width, channels),
    ]


def head_entries(embedding: str, norm: str, config: Config) -> list[Entry]:
    """Embedding, final norm and head; a tied head is there a second copy of the embedding (`with_tied_head` adds it where it is not)."""
    rows, width = config["vocab_size"], config["hidden_size"]
    final = same("norm.weight", norm, width)
    if not config["tie_embeddings"]:
        return [same("embed_tokens.weight", embedding, rows, width), same("lm_head.weight", "lm_head.weight", rows, width), final]

    def one(parts: Sequence[Tensor]) -> Tensor:
        if not torch.equal(parts[0], parts[1]):
            raise UserError(f"lm_head.weight differs from {embedding}, so the head is not tied; add model.tie_embeddings=false")
        return parts[0]

    shape = (rows, width)
    tied = Entry("embed_tokens.weight", shape, (embedding, "lm_head.weight"), (shape, shape), lambda t: (t, t), one)
    return [tied, final]


def with_tied_head(tensors: Tensors, embedding: str, config: Config) -> Tensors:
    """Add the head that a file with tied weights leaves out."""
    if config["tie_embeddings"] and embedding in tensors and "lm_head.weight" not in tensors:
        return {**tensors, "lm_head.weight": tensors[embedding]}
    return tensors


def is_tied(tensors: Tensors, embedding: str, about: Config) -> bool:
    """Does the head share the embedding: what config.json says, else whether it is absent or equal."""
    told = about.get("tie_word_embeddings")
    if told is not None:
        return bool(told)
    return "lm_head.weight" not in tensors or torch.equal(tensors["lm_head.weight"], need(tensors, embedding))


def convert(tensors: Tensors, entries: Sequence[Entry], what: str) -> Tensors:
    """Their tensors as ours, in float32 (half precision fits exactly).

    Raises:
        UserError: naming every unknown and every missing tensor, or the shapes that differ; `what` names the layout.
    """
    expected = {name: shape for entry in entries for name, shape in zip(entry.theirs, entry.shapes, strict=True)}
    check(tensors, expected, what)
    return {entry.ours: entry.join([tensors[name] for name in entry.theirs]).float().contiguous() for entry in entries}


def convert_back(state: Tensors, entries: Sequence[Entry], what: str) -> Tensors:
    """Our tensors as theirs, in their dtypes. Raises UserError as `convert` does."""
    check(state, {entry.ours: entry.shape for entry in entries}, f"model to be written as {what}")
    found: Tensors = {}
    for entry in entries:
        found.update(zip(entry.theirs, entry.split(state[entry.ours].detach()), strict=True))
    return found


def check(tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], what: str) -> None:
    """Raise UserError unless `tensors` has exactly the expected names and shapes."""
    problems = []
    if unknown := [name for name in tensors if name not in expected]:
        problems.append(f"unknown tensors: {', '.join(unknown)}")
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing tensors: {', '.join(missing)}")
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN_SHAPES} more" if len(wrong) > SHOWN_SHAPES else ""
        problems.append(f"a model of other sizes: {', '.join(wrong[:SHOWN_SHAPES])}{more}")
    if problems:
        raise UserError(f"{what}: {'; '.join(problems)}")


def unwrapped(tensors: Tensors) -> Tensors:
    """The same tensors without the path parts that distributed and compiling wrappers leave in their names."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise UserError(f"{name}: another tensor is {short} too once the parts that wrappers add are left out")
        plain[short] = tensor
    return plain


def need(tensors: Mapping[str, Tensor], name: str, dims: int = 2) -> Tensor:
    """A tensor that sizes are read from. Raises UserError when it is missing or has another number of dimensions."""
    if name not in tensors:
        raise UserError(f"{name}: not in the checkpoint, so it is of another layout or incomplete")
    if tensors[name].dim() != dims:
        raise UserError(f"{name}: has shape {tuple(tensors[name].shape)}, expected {dims} dimensions; another architecture")
    return tensors[name]


def layer_count(tensors: Iterable[str], prefix: str) -> int:
    """1 + the highest index of the layers under `prefix`. Raises UserError when there are none."""
    found = [int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))]
    if not found:
        raise UserError(f"{prefix}*: no layers in the checkpoint, so it is of another layout or incomplete")
    return 1 + max(found)


def mamba_sizes(tensors: Tensors, prefix: str, hidden_size: int) -> dict[str, int]:
    """Numbers of a Mamba-1 mixer from its shapes."""
    channels, states = need(tensors, f"{prefix}A_log").shape
    if channels % hidden_size:
        raise UserError(f"{prefix}A_log: {channels} channels are no multiple of the hidden size {hidden_size}; another architecture")
    return {
        "state_size": states,
        "conv_kernel": need(tensors, f"{prefix}conv1d.weight", 3).shape[2],
        "expand": channels // hidden_size,
        "dt_rank": need(tensors, f"{prefix}dt_proj.weight").shape[1],
    }


def heads(num_heads: int, query_size: int, kv_size: int) -> dict[str, int]:
    """Sizes of grouped-query attention with `num_heads` query heads, from the rows of all its queries and of all its keys."""
    if not isinstance(num_heads, int) or num_heads < 1:
        raise UserError(f"model.num_heads: {num_heads!r}; allowed is a whole number of at least 1")
    size, rest = divmod(query_size, num_heads)
    if rest or size == 0 or kv_size % size:
        raise UserError(f"model.num_heads: {num_heads} does not fit {query_size} rows of queries and {kv_size} of keys")
    return {"num_heads": num_heads, "num_kv_heads": kv_size // size, "head_dim": size}


def no_attention(hidden_size: int) -> dict[str, Any]:
    """Numbers that the model asks for and a stack without attention never uses; positions are off, since nothing would turn."""
    return {"num_heads": 1, "num_kv_heads": 1, "head_dim": hidden_size, "position": "none", "window": None}


def ask(given: Config, keys: Sequence[str], hint: str) -> None:
    """Raise UserError naming all of `keys` that the user has not given."""
    if absent := [key for key in keys if key not in given]:
        names, words = ", ".join(f"model.{key}" for key in absent), " ".join(f"model.{key}=NUMBER" for key in absent)
        raise UserError(f"{names}: not stored in the checkpoint; add {words} ({hint})")


def agree(about: Config, found: Mapping[str, object]) -> None:
    """Raise UserError when config.json says other numbers than the shapes do; a key that it lacks says nothing."""
    for key, value in found.items():
        if key in about and about[key] != value:
            raise UserError(f"config.json: {key}={about[key]!r}, but the tensors have {value!r}; the files belong to different models")


def period(values: Sequence[Any]) -> list[Any]:
    """The shortest beginning that gives `values` when it is repeated."""
    for length in range(1, len(values) + 1):
        if all(value == values[i % length] for i, value in enumerate(values)):
            return list(values[:length])
    return []


def kinds(config: Config) -> list[str]:
    """Mixer of every layer."""
    pattern = config["layer_pattern"]
    if not isinstance(pattern, list) or not pattern or not all(isinstance(kind, str) for kind in pattern):
        raise UserError(f"model.layer_pattern: {pattern!r}; allowed is a list of mixers, such as [mamba, attention]")
    return [pattern[i % len(pattern)] for i in range(config["num_layers"])]


def have_mlp(config: Config) -> list[bool]:
    """Whether each layer has an MLP sublayer."""
    pattern = config.get("mlp_pattern") or [True]
    return [bool(pattern[i % len(pattern)]) for i in range(config["num_layers"])]


def only(layout: str, key: str, value: object, allowed: bool, what: str) -> None:
    """Raise UserError when a model has a number that the layout cannot express."""
    if not allowed:
        raise UserError(f"model.{key}: {value!r} cannot be written as {layout}, which {what}")


def grow_vocabulary(state: Tensors, rows: int, like: int | None = None) -> Tensors:
    """Give embedding and head `rows` rows; the new ones are copies of row `like`, or the mean row (a random one would be an outlier)."""
    grown = dict(state)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in state:
            weight = state[name]
            row = weight.mean(dim=0) if like is None else weight[like]
            grown[name] = torch.cat([weight, row.expand(rows - len(weight), -1)])
    return grown
