"""Mixtures of LoRAs: one of several by the row's mode, or a weighted sum by the row's task or by each token.

Three routers in one class: `modality` (Phi-4-Multimodal, arXiv 2503.01743; also several named LoRAs side by side), `task`
(MOELoRA, arXiv 2310.18339) and `token` (HydraLoRA, arXiv 2404.19245, with the losses of the Switch Transformer, arXiv 2101.03961).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from components.adapters.base import OFF, TaskIds, adapter_layers, adapter_state, load_adapter_state, task_ids
from components.adapters.base.low_rank import FREE, PEFT_BIAS, LowRankAdapter, check_lora, check_patterns, of_module
from components.adapters.base.peft_files import read_folder, read_peft, write_folder, write_routing
from components.adapters.mixture import ModalityLayer, RowChoice, TaskLayer, TokenLayer, watch_routers
from components.contracts import UserError

ROUTERS = ("modality", "task", "token")
PATTERNS = ("rank_pattern", "alpha_pattern")
LATER: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}  # what a folder that lacks them means
PEFT_TYPE = "MOE_LORA"  # of our own folders


class MoELoRA(LowRankAdapter):
    """Adapter option: several LoRAs on each of the chosen linear layers and a router over them, everything else frozen.

    router: `modality`, `task` or `token`, see the three layers. tasks: names of the data's tasks; for `modality` they must be the modes of
    `rules`. The rest is as in `LowRankAdapter`; what is trained in full beside the experts (modules_to_save, train_bias) serves all rows,
    those without an expert too.

    Learned routers: r: the rank, over all experts for `task` (num_experts must divide it), of A and of each head for `token`; so are those
    of rank_pattern. embedding_dim: of a task (`task`). top_k: how many experts a token uses, null for all; aux: weights {balance, z} of the
    router's losses (`token`).

    modality: experts: {name: {r, alpha, dropout}}, and rank_pattern and alpha_pattern where an expert has any, which the adapter's own do
    not stand for. rules: {mode: name of its expert, or null for the base model}; their order gives the ids of the modes; {}: every expert
    is a mode of its own name. train: names of the experts to train, null for all.

    Raises UserError for values out of range, and for keys that the router does not read.
    """

    def __init__(
        self,
        router: Literal["modality", "task", "token"],
        r: int,
        alpha: float,
        dropout: float,
        num_experts: int,
        embedding_dim: int,
        top_k: int | None,
        aux: Mapping[str, float],
        experts: Mapping[str, Mapping[str, Any]],
        rules: Mapping[str, str | None],
        train: Sequence[str] | None,
        tasks: Sequence[str] | None,
        targets: str | Sequence[str],
        exclude: str | None,
        use_rslora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        modules_to_save: Sequence[str] = (),
        train_bias: Literal["none", "adapted", "all"] = "none",
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
        allow_tied: bool = False,
    ) -> None:
        if router not in ROUTERS:
            raise UserError(f"adapter.router: {router!r}; allowed are {', '.join(ROUTERS)}{_near(router, ROUTERS)}")
        super().__init__(
            r, alpha, dropout, targets, exclude, use_rslora, rank_pattern or {}, alpha_pattern or {}, modules_to_save, train_bias, dtype,
            allow_tied,
        )  # fmt: skip
        self.router = router
        self.num_experts, self.embedding_dim, self.top_k, self.aux = num_experts, embedding_dim, top_k, dict(aux)
        for name, expert in experts.items():
            if not isinstance(expert, Mapping):
                raise UserError(f"adapter.experts.{name}: {expert!r}; needed is {{r: RANK, alpha: NUMBER, dropout: SHARE}}")
        self.experts = {str(name): dict(expert) for name, expert in experts.items()}
        self.rules = dict(rules) or {name: name for name in experts}
        self.train = list(self.experts if train is None else train)
        self.tasks = list(tasks or ())
        self._check_unread(train)
        self._check_modality() if router == "modality" else self._check_learned()

    def _check_unread(self, train: Sequence[str] | None) -> None:
        """A value that the router does not read is a mistake."""
        read = {"modality": ("experts", "rules", "train"), "task": (), "token": ("top_k", "aux")}[self.router]
        given = {
            "experts": self.experts, "rules": self.rules, "train": train, "top_k": self.top_k, "aux": any(self.aux.values()),
        }  # fmt: skip
        for key in PATTERNS:
            if self.router == "modality" and getattr(self, key):
                raise UserError(f"adapter.{key}: set, but with adapter.router=modality each expert has its own, adapter.experts.NAME.{key}")
        for key, value in given.items():
            if value and key not in read:
                reader = "token" if key in ("top_k", "aux") else "modality"
                raise UserError(f"adapter.{key}: set, but adapter.router={self.router} does not read it; drop it, or use router={reader}")

    def _check_learned(self) -> None:
        if self.num_experts < 1 or self.embedding_dim < 1:
            key = "num_experts" if self.num_experts < 1 else "embedding_dim"
            raise UserError(f"adapter.{key}: {getattr(self, key)}; must be at least 1")
        for key, r in {"r": self.r, **{f"rank_pattern.{pattern}": rank for pattern, rank in self.rank_pattern.items()}}.items():
            if self.router == "task" and r % self.num_experts:
                raise UserError(
                    f"adapter.{key}: {r} is shared out among adapter.num_experts={self.num_experts} experts; it must be a multiple of that"
                )
        if self.router == "task" and not self.tasks:
            raise UserError("adapter.tasks: none, and adapter.router=task chooses by them; use data with tasks, or router=token")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"adapter.top_k: {self.top_k}; must be null or from 1 to adapter.num_experts={self.num_experts}")
        if self.top_k == 1 < self.num_experts and not any(self.aux.values()):
            raise UserError(
                "adapter.top_k: 1; a single weight is always 1, so only adapter.aux.balance or .z can teach the router: set one"
            )
        for key, weight in self.aux.items():
            if key not in ("balance", "z"):
                raise UserError(f"adapter.aux.{key}: unknown; allowed are balance, z{_near(key, ('balance', 'z'))}")
            if not math.isfinite(weight) or weight < 0:
                raise UserError(f"adapter.aux.{key}: {weight}; must be a finite number, 0 or above")

    def _check_modality(self) -> None:
        if not self.experts:
            raise UserError("adapter.experts: none, and adapter.router=modality chooses among them; give {NAME: {r, alpha, dropout}}")
        for name, expert in self.experts.items():
            if not name.isidentifier():
                raise UserError(f"adapter.experts: {name!r}; a name consists of letters, digits and _")
            if set(expert) - set(PATTERNS) != {"r", "alpha", "dropout"}:
                raise UserError(f"adapter.experts.{name}: has {', '.join(map(str, expert)) or 'nothing'}; needed are r, alpha, dropout")
            patterns = [expert.get(key, {}) for key in PATTERNS]
            if not all(isinstance(pattern, Mapping) for pattern in patterns):
                raise UserError(f"adapter.experts.{name}: {' and '.join(PATTERNS)} are of the form {{regex: value}}")
            check_lora(f"adapter.experts.{name}", expert["r"], expert["alpha"], expert["dropout"], *patterns)
        for key, expert_name in [*(("rules", name) for name in self.rules.values()), *(("train", name) for name in self.train)]:
            if expert_name is not None and expert_name not in self.experts:
                known = ", ".join(self.experts)
                raise UserError(f"adapter.{key}: {expert_name!r}; the experts are {known}{_near(expert_name, self.experts)}")
        if self.tasks and self.tasks != list(self.rules):
            raise UserError(f"adapter.rules: modes {', '.join(self.rules)}, but the tasks of the data are {', '.join(self.tasks)}")
        if not self.train:
            raise UserError(f"adapter.train: []; null for all experts, or some of {', '.join(self.experts)}")

    @property
    def may_change(self) -> tuple[str, ...]:
        """Keys that may differ where an adapter is gone on with: how it learns, and which modes there are, which no tensor knows of."""
        return ("dropout", "train", "aux.*", "experts.*.dropout", *(("tasks",) if self.router == "modality" else ()))

    @property
    def may_add(self) -> tuple[str, ...]:
        """Mappings that entries may come to where an adapter is gone on with: further experts and modes."""
        return ("experts", "rules") if self.router == "modality" else ()

    def take_over(self, model: nn.Module, state: dict[str, Tensor], names: Sequence[str], source: str) -> None:
        """Go on with an adapter of the same shape; experts that it lacks begin anew. model: wrapped by `apply`.

        state, names: its tensors by parameter name, and its tasks. source: what to blame in a UserError.
        """
        begun = adapter_state(model) if self.router == "modality" else {}
        load_adapter_state(model, {**begun, **state}, source)

    @property
    def resting(self) -> tuple[str, ...]:
        """Modes whose rows train nothing (router=modality)."""
        if self.router != "modality" or self.modules_to_save or self.train_bias != "none":
            return ()
        return tuple(mode for mode, expert in self.rules.items() if expert not in self.train)

    def apply(self, model: nn.Module) -> dict[str, Any]:
        """Wrap the targets in place and freeze the rest; the model's outputs do not change. See `components.adapters.base.inject`."""
        if self.router == "modality":
            report = self.wrap_targets(model, self._by_mode(model), list(self.rules))
        elif self.router == "task":
            report = self.wrap_targets(
                model,
                lambda _, base, ids, r, scale: TaskLayer(base, ids, r, scale, self.dropout, self.num_experts, self.embedding_dim),
                self.tasks,
            )
        else:
            report = self.wrap_targets(
                model,
                lambda _, base, ids, r, scale: TokenLayer(base, ids, r, scale, self.dropout, self.num_experts, self.top_k, self.aux),
                self.tasks,
            )
        if self.router == "token":
            watch_routers(model)
        return report

    def _by_mode(self, model: nn.Module) -> Callable[[str, nn.Module, TaskIds, int, float], ModalityLayer]:
        """What wraps a module with router=modality: each expert with its own rank and scale there."""
        for name, expert in self.experts.items():
            ranks, alphas = (expert.get(key, {}) for key in PATTERNS)
            check_patterns(f"adapter.experts.{name}", ranks, alphas, self.chosen(model))
        numbers = {name: i for i, name in enumerate(self.experts)}
        choice = RowChoice([OFF if name is None else numbers[name] for name in self.rules.values()], len(numbers))

        def wrap(module: str, base: nn.Module, ids: TaskIds, r: int, scale: float) -> ModalityLayer:
            there = {}
            for name, expert in self.experts.items():
                patterns = (expert.get(key, {}) for key in PATTERNS)
                rank, factor = of_module(module, expert["r"], expert["alpha"], self.use_rslora, *patterns)
                there[name] = {"r": rank, "scale": factor, "dropout": expert["dropout"]}
            return ModalityLayer(base, ids, choice, there, self.train)

        return wrap

    def save(self, model: nn.Module, folder: Path | str) -> None:
        """Write adapter_model.safetensors, the adapter's tensors by name, adapter_config.json, and for `modality` routing.json.

        Raises UserError beside another adapter.
        """
        self.check_alone(model)
        write_folder(Path(folder), {"peft_type": PEFT_TYPE, **self._config(model)}, adapter_state(model))
        if (routing := self.routing()) is not None:
            write_routing(Path(folder), routing)

    def load(self, model: nn.Module, folder: Path | str) -> None:
        """Read such a folder into a model that `apply` has wrapped. Tasks in another order are put into this model's.

        Raises UserError when a file is missing or damaged, or keys, shapes, router, experts or tasks differ from this adapter's.
        """
        stored, state = read_folder(Path(folder))
        if stored.get("peft_type") != PEFT_TYPE:
            raise UserError(f"{folder}: peft_type is {stored.get('peft_type')}; needed is {PEFT_TYPE}")
        for key, own in self._config(model).items():
            theirs = stored.get(key, LATER.get(key))
            if key == "tasks" and self.router == "task" and isinstance(theirs, list) and sorted(theirs) == sorted(own):
                places = [theirs.index(name) for name in own]
                for name, tensor in state.items():
                    if name.endswith(".lora_embedding") and tensor.shape[:1] == (len(places),):
                        state[name] = tensor[places]
            elif theirs != own:
                raise UserError(f"{folder}: {key} is {theirs}; this adapter has {own}")
        load_adapter_state(model, state, str(folder))

    def _config(self, model: nn.Module) -> dict[str, Any]:
        """What must be the same for tensors to mean the same."""
        if self.router == "modality":
            experts = {name: {key: value for key, value in e.items() if key != "dropout"} for name, e in self.experts.items()}
            return {"router": self.router, "use_rslora": self.use_rslora, "experts": experts, "rules": self.rules}
        holder = task_ids(model)
        tasks = list(holder.names) if holder is not None and self.router == "task" else []
        keys = ("router", "r", "alpha", *LATER, "num_experts", "top_k")
        return {**{key: getattr(self, key) for key in keys}, "tasks": tasks}

    def routing(self) -> dict[str, str | None] | None:
        """{mode: its expert, None for the base model} with router=modality; None for learned routers, whose experts mean nothing alone."""
        return dict(self.rules) if self.router == "modality" else None

    def save_expert(self, model: nn.Module, name: str, folder: Path | str) -> None:
        """Write one expert (router=modality) as a LoRA of its own, in PEFT's layout: PEFT and vLLM read the folder.

        Raises UserError beside another adapter.
        """
        self.check_alone(model)
        state = adapter_state(model)
        chosen = {theirs: state[key] for key, theirs in _keys_of(model, name).items()}
        in_full = {key: tensor for key, tensor in state.items() if ".lora_" not in key}
        self.write_lora(model, folder, chosen | in_full, lora=self._expert(name))

    def load_expert(self, model: nn.Module, name: str, folder: Path | str) -> None:
        """Read a LoRA in PEFT's layout into one expert (router=modality); the others stay.

        Raises UserError when a file is missing or damaged, or keys, shapes, rank or scale differ from the expert's.
        """
        expert = self._expert(name)
        config, state = read_peft(Path(folder), free=FREE)
        for key, own in (
            ("r", expert["r"]), ("lora_alpha", expert["alpha"]), ("use_rslora", self.use_rslora), ("bias", PEFT_BIAS[self.train_bias]),
            *((key, expert.get(key, {})) for key in PATTERNS),
        ):  # fmt: skip
            if config[key] != own:
                raise UserError(f"{folder}: {key} is {config[key]}; expert {name} has {own}")
        places = {theirs: ours for ours, theirs in _keys_of(model, name).items()}
        others = {key: tensor for key, tensor in adapter_state(model).items() if ".lora_" in key and key not in places.values()}
        load_adapter_state(model, {**others, **{places.get(key, key): tensor for key, tensor in state.items()}}, str(folder))

    def _expert(self, name: str) -> dict[str, Any]:
        if self.router != "modality" or name not in self.experts:
            known = ", ".join(self.experts) if self.router == "modality" else f"none with adapter.router={self.router}"
            raise UserError(f"adapter.experts: {name!r}; the named experts are {known}{_near(name, self.experts)}")
        return self.experts[name]


def _keys_of(model: nn.Module, expert: str) -> dict[str, str]:
    """Parameter names of one expert -> their names in PEFT's files."""
    return {f"{module}.{side}.{expert}": f"{module}.{side}.weight" for module, _ in adapter_layers(model) for side in ("lora_A", "lora_B")}


def _near(word: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(valid), 1)
    return f"; did you mean {near[0]}?" if near else ""
