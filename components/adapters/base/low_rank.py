"""What the adapters of two thin matrices share: the options of rank and scale, the pair A and B, and the folder that PEFT reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.adapters.base.leaves import is_embedding, leaf_of
from components.adapters.base.peft_files import read_peft, write_peft
from components.adapters.base.targets import modules_ending_in
from components.adapters.base.task_ids import TaskIds
from components.adapters.base.wrapping import AdapterLayer, adapter_layers, adapter_state, inject, load_adapter_state, selected
from components.contracts import UserError

PEFT_BIAS = {"none": "none", "adapted": "lora_only", "all": "all"}  # PEFT's words for train_bias
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of an adapter's parameters
FREE = ("rank_pattern", "alpha_pattern", "modules_to_save", "bias", "fan_in_fan_out")  # keys of PEFT's that are read or follow


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The adapter's input in the dtype of its parameters; under autocast as it is, since autocast chooses the dtype of the products."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def wide(tensor: Tensor) -> Tensor:
    """In float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def parameter_options(base_layer: Any) -> dict[str, Any]:
    """Device and dtype of an adapter's new parameters: float32, or float64 on a base weight of it. `store_as` changes it afterwards."""
    weight = base_layer.weight
    return {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}


def check_lora(
    key: str, r: Any, alpha: Any, dropout: Any, rank_pattern: Mapping[str, Any], alpha_pattern: Mapping[str, Any]
) -> None:  # fmt: skip
    """Raise UserError, naming key.NAME, for a rank, scale or dropout out of range, and for a pattern that is none."""
    for name, rank in [("r", r), *((f"rank_pattern.{pattern}", rank) for pattern, rank in rank_pattern.items())]:
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"{key}.{name}: {rank!r}; the rank must be a whole number, at least 1")
    for name, value in [("alpha", alpha), *((f"alpha_pattern.{pattern}", value) for pattern, value in alpha_pattern.items())]:
        if not isinstance(value, (int, float)):
            raise UserError(f"{key}.{name}: {value!r}; must be a number")
        if not math.isfinite(value) or value <= 0:
            raise UserError(f"{key}.{name}: {value}; must be a finite number above 0")
    if not isinstance(dropout, (int, float)):
        raise UserError(f"{key}.dropout: {dropout!r}; must be a number")
    if not 0 <= dropout < 1:
        raise UserError(f"{key}.dropout: {dropout}; must be in [0, 1)")
    for name, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{key}.{name}: {pattern!r} is not a regular expression ({error})") from None


def check_patterns(key: str, rank_pattern: Iterable[str], alpha_pattern: Iterable[str], names: Sequence[str]) -> None:
    """Raise UserError for a pattern that fits none of the modules of these names."""
    for name, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for pattern in patterns:
            if not any(fits(pattern, module) for module in names):
                raise UserError(f"{key}.{name}: {pattern!r} fits none of the wrapped modules, such as {names[0]}")


def of_module(
    name: str, r: int, alpha: float, use_rslora: bool, rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float]
) -> tuple[int, float]:  # fmt: skip
    """Rank and scale of the module of that name."""
    r = next((rank for pattern, rank in rank_pattern.items() if fits(pattern, name)), r)
    alpha = next((value for pattern, value in alpha_pattern.items() if fits(pattern, name)), alpha)
    return r, alpha / (math.sqrt(r) if use_rslora else r)


def matched_rank(shapes: Iterable[tuple[int, int]], parameters: int, fixed: int = 0) -> int:
    """Rank at which LoRA on modules of these (in, out) has nearest to `parameters` trainable ones: a fair twin of another adapter.

    fixed: parameters that do not depend on the rank. Raises UserError when rank 1 has already more than twice as many.

    >>> matched_rank([(4096, 4096)] * 128, 16_845_824)  # MTL-LoRA with r 8, three B and eight tasks on LLaMA2-7B
    16
    """
    each = sum(inside + outside for inside, outside in shapes)
    if parameters < (each + fixed) / 2:
        raise UserError(f"adapter.match_parameters: {parameters:,}, but rank 1 has {each + fixed:,} on these targets; choose fewer targets")
    return max(1, round((parameters - fixed) / each))


class LowRankLayer(AdapterLayer):
    """A wrapper with A (r, in), kaiming-uniform with a = sqrt 5, and B (out, r), zero at the start (arXiv 2106.09685, section 4.1).

    A and B are float32 under a narrower base (float64 under a float64 one), unless `store_as` says otherwise.
    """

    adapter_prefix = "lora_"

    def __init__(self, base_layer: nn.Module, task_ids: TaskIds, r: int, scale: float, dropout: float) -> None:
        super().__init__(base_layer, task_ids)
        kwargs = parameter_options(base_layer)
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **kwargs)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, **kwargs)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self.rank = r

    def low_rank(self, x: Tensor) -> Tensor:
        """scale * B A x for x (..., in) that is dropped out and widened already: (..., out)."""
        out: Tensor = self.lora_B(self.scale * self.lora_A(x))  # (..., r), then (..., out)
        return out

    def delta_weight(self, task: int | None = None) -> Tensor:
        with torch.autocast(self.lora_A.weight.device.type, enabled=False):
            return self.scale * (wide(self.lora_B.weight) @ wide(self.lora_A.weight))  # (out, in)


class LowRankAdapter:
    """Options that all low-rank adapters have.

    r: rank, >= 1. alpha: the scale is alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2312.03732). dropout: on the adapter's input, in
    [0, 1). targets, exclude: which modules, see `components.adapters.base.targets.select_modules`. rank_pattern, alpha_pattern: {regex of
    the end of a module's name, from a dot: its r or alpha}, the first that fits; each must fit a wrapped module. modules_to_save,
    train_bias: what is trained in full beside the adapter, allow_tied: whether a module may share its weight with another, see
    `components.adapters.base.inject`. dtype: of the adapter's parameters, one of DTYPES; None: float32, or float64 on a base of it. What
    must not be coarse (lengths of DoRA, softmax, gates, merged weights) is computed in float32 whatever it is.
    Raises UserError for values out of range.
    """

    embeddings = False  # whether it can wrap an nn.Embedding

    def __init__(
        self, r: int, alpha: float, dropout: float, targets: str | Sequence[str], exclude: str | None, use_rslora: bool,
        rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float], modules_to_save: Sequence[str],
        train_bias: Literal["none", "adapted", "all"], dtype: str | None, allow_tied: bool,
    ) -> None:  # fmt: skip
        check_lora("adapter", r, alpha, dropout, rank_pattern, alpha_pattern)
        if train_bias not in PEFT_BIAS:
            raise UserError(f"adapter.train_bias: {train_bias!r}; allowed are {', '.join(PEFT_BIAS)}")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"adapter.dtype: {dtype!r}; allowed are null, {', '.join(DTYPES)}")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.exclude = exclude
        self.use_rslora = use_rslora
        self.rank_pattern = dict(rank_pattern)
        self.alpha_pattern = dict(alpha_pattern)
        self.modules_to_save = list(modules_to_save)
        self.train_bias = train_bias
        self.dtype = dtype
        self.allow_tied = allow_tied

    def chosen(self, model: nn.Module) -> list[str]:
        """Names of the modules that `apply` would wrap."""
        return selected(model, self.targets, self.exclude, self.embeddings)

    def check_alone(self, model: nn.Module, why: str = "which no folder of this adapter holds; merge instead") -> None:
        """Raise UserError when a module has an adapter that this one did not put there."""
        own = set(self.chosen(model))
        if others := [name for name, _ in adapter_layers(model) if name not in own]:
            raise UserError(f"adapter: {others[0]} has another one, {why}")

    def wrap_targets(
        self, model: nn.Module, wrap: Callable[[str, nn.Module, TaskIds, int, float], AdapterLayer], tasks: Sequence[str] = ()
    ) -> dict[str, Any]:
        """`inject` with the rank and scale of each module: wrap gets its name, the module, the ids, r and scale."""
        check_patterns("adapter", self.rank_pattern, self.alpha_pattern, self.chosen(model))

        def wrap_one(name: str, base: nn.Module, ids: TaskIds) -> AdapterLayer:
            r, scale = of_module(name, self.r, self.alpha, self.use_rslora, self.rank_pattern, self.alpha_pattern)
            layer = wrap(name, base, ids, r, scale)
            if self.dtype is not None:
                layer.store_as(getattr(torch, self.dtype))
            return layer

        return inject(
            model, self.targets, self.exclude, wrap_one, tasks, self.modules_to_save, self.train_bias, self.embeddings, self.allow_tied
        )  # fmt: skip

    def write_lora(
        self, model: nn.Module, folder: Path | str, state: dict[str, Tensor], use_dora: bool = False, lora: Mapping[str, Any] | None = None
    ) -> None:
        """Write a folder that PEFT reads. state: tensors by parameter name, A and B as PEFT has them.

        lora: r, alpha and dropout, and rank_pattern and alpha_pattern where it has any; None: the adapter's own.
        """
        if lora is None:
            keys = ("r", "alpha", "dropout", "rank_pattern", "alpha_pattern")
            lora = {key: getattr(self, key) for key in keys}
        more = {
            "use_dora": use_dora,
            "rank_pattern": lora.get("rank_pattern", {}),
            "alpha_pattern": lora.get("alpha_pattern", {}),
            "modules_to_save": modules_ending_in(model, self.modules_to_save, "adapter.modules_to_save") or None,
            "bias": PEFT_BIAS[self.train_bias],
        }
        stored = {name.partition(".lora_")[0] for name in state if ".lora_" in name}
        layers = {name: layer for name, layer in adapter_layers(model) if name in stored}
        # of PEFT it asks whether Conv1D is among them: an embedding is turned whatever it says
        more["fan_in_fan_out"] = any(not is_embedding(layer.base_layer) and layer.transposed for layer in layers.values())
        write_peft(Path(folder), model, list(layers), state, lora["r"], lora["alpha"], lora["dropout"], self.use_rslora, more)


class PeftAdapter(LowRankAdapter):
    """A low-rank adapter that PEFT has too: its folder is PEFT's.

    match_parameters: choose the rank at which nearest to this many parameters are trained in the wrapped modules; r is null then.
    """

    layer: type[LowRankLayer]
    use_dora = False

    def __init__(
        self, r: int | None, alpha: float, dropout: float, targets: str | Sequence[str], exclude: str | None, use_rslora: bool,
        rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float], modules_to_save: Sequence[str],
        train_bias: Literal["none", "adapted", "all"], match_parameters: int | None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None, allow_tied: bool = False,
    ) -> None:  # fmt: skip
        if (r is None) is (match_parameters is None):
            raise UserError(f"adapter.r: {r} and adapter.match_parameters: {match_parameters}; one of them decides, the other must be null")
        if match_parameters is not None and rank_pattern:
            raise UserError("adapter.rank_pattern: set, but adapter.match_parameters chooses one rank for all modules; drop one of them")
        super().__init__(
            1 if r is None else r, alpha, dropout, targets, exclude, use_rslora, rank_pattern, alpha_pattern, modules_to_save, train_bias,
            dtype, allow_tied,
        )  # fmt: skip
        self.match_parameters = match_parameters

    def apply(self, model: nn.Module) -> dict[str, Any]:
        """Wrap the targets in place and freeze the rest; the model's outputs do not change. See `components.adapters.base.inject`."""
        if self.match_parameters is not None:
            modules = [model.get_submodule(name) for name in self.chosen(model)]
            shapes = [leaf[:2] for module in modules if (leaf := leaf_of(getattr(module, "base_layer", module)))]
            lengths = sum(outside for _, outside in shapes) if self.use_dora else 0
            self.r = matched_rank(shapes, self.match_parameters, lengths)
        return self.wrap_targets(model, lambda _, base, ids, r, scale: self.wrap(base, ids, r, scale))

    def wrap(self, base: nn.Module, ids: TaskIds, r: int, scale: float) -> AdapterLayer:
        """The layer around one module."""
        return self.layer(base, ids, r, scale, self.dropout)

    def save(self, model: nn.Module, folder: Path | str) -> None:
        """Write adapter_model.safetensors and adapter_config.json as PEFT lays them out; PEFT and vLLM read the folder.

        Raises UserError beside another adapter.
        """
        self.check_alone(model)
        if self.match_parameters is not None:
            self.r = next(int(layer.rank) for _, layer in adapter_layers(model) if hasattr(layer, "rank"))  # type: ignore[arg-type]
        self.write_lora(model, folder, adapter_state(model), self.use_dora)

    def load(self, model: nn.Module, folder: Path | str) -> None:
        """Read the tensors of such a folder into a model that `apply` has wrapped.

        Raises UserError when a file is missing or unreadable, or keys, shapes, rank or scale differ from this adapter's.
        """
        config, state = read_peft(Path(folder), {"use_dora": self.use_dora}, FREE)
        for key, own in (
            ("r", self.r), ("lora_alpha", self.alpha), ("use_rslora", self.use_rslora), ("bias", PEFT_BIAS[self.train_bias]),
            ("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern),
        ):  # fmt: skip
            if config[key] != own:
                raise UserError(f"{folder}: {key} is {config[key]}; this adapter has {own}")
        for name in [name for name in state if name.endswith(".base_layer.weight")]:  # PEFT stores that of a wrapped embedding, frozen too
            own_weight = dict(model.named_parameters()).get(name)
            if own_weight is not None and not torch.equal(state.pop(name).to(own_weight), own_weight):
                module = name.removesuffix(".base_layer.weight")
                raise UserError(f"{folder}: holds another weight of {module} than this model's; load it on the base that it was trained on")
        load_adapter_state(model, state, str(folder))

    @classmethod
    def from_folder(cls, folder: Path | str) -> PeftAdapter:
        """The adapter that a PEFT folder describes; then `apply` it and `load`. Raises UserError for more than this adapter."""
        config, _ = read_peft(Path(folder), {"use_dora": cls.use_dora}, FREE)
        words = {theirs: ours for ours, theirs in PEFT_BIAS.items()}
        if config["bias"] not in words:
            raise UserError(f"{folder}: bias is {config['bias']!r}; allowed are {', '.join(words)}")
        return cls(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            targets=config["target_modules"],
            exclude=config["exclude_modules"],
            use_rslora=config["use_rslora"],
            rank_pattern=config["rank_pattern"],
            alpha_pattern=config["alpha_pattern"],
            modules_to_save=config["modules_to_save"] or [],
            train_bias=words[config["bias"]],  # type: ignore[arg-type]
            match_parameters=None,
        )


def fits(pattern: str, name: str) -> bool:
    """As PEFT compares: the pattern is the end of the name, from a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
