"""MTL-LoRA (arXiv 2410.09437): one A for all tasks, a small matrix for each task inside the rank, and several B that each task mixes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.adapters.base import (
    OFF,
    AdapterLayer,
    TaskIds,
    adapter_layers,
    adapter_state,
    count_parameters,
    load_adapter_state,
    task_ids,
)  # fmt: skip
from components.adapters.base.fused import check_fused, fused_rows
from components.adapters.base.low_rank import LowRankAdapter, parameter_options, wide, widen
from components.adapters.base.peft_files import read_folder, write_folder
from components.adapters.base.sharing import cosines
from components.contracts import UserError
from kernels.lora_grouped import lora_mixed

PER_TASK = ("lora_lambdas", "lora_B_w")  # parameters with a row for each task


class MTLLoRALayer(AdapterLayer):
    """y = base(x) + scale * B_t Lambda_t A dropout(x) for the task t of each row or token, with B_t = sum_i softmax(w_t / tau)_i B_i.

    lora_A (r, in), kaiming-uniform with a = sqrt 5. lora_lambdas (T, r, r), or (T, r) for diagonals: the identity at the start; a fused
    projection has one for each of its blocks of rows: (T, blocks, r, r) or (T, blocks, r). lora_B (n, out, r), zero at the start.
    lora_B_w (T, n), uniform within +-1/sqrt(n) or zero. All are float32 or wider, unless `store_as` says otherwise.

    The tasks of a batch may be mixed at no cost, see `kernels.lora_grouped.lora_mixed`.

    Note: in the published code a fused projection has one Lambda over the ranks of all its blocks, which mixes them; here one a block.
    """

    adapter_prefix = "lora_"

    def __init__(
        self, base_layer: nn.Module, task_ids: TaskIds, r: int, scale: float, dropout: float, n_up: int, tau: float,
        lambda_type: str, w_init: str, splits: Sequence[int],
    ) -> None:  # fmt: skip
        """splits: rows of each block of a fused projection, which add up to out_features; () for a plain one."""
        super().__init__(base_layer, task_ids)
        tasks, inside, outside = len(task_ids), self.in_features, self.out_features
        kwargs = parameter_options(base_layer)
        self.splits = tuple(splits) if lambda_type != "none" and len(splits) > 1 else (outside,)
        self.scale = scale
        self.tau = tau
        self.lambda_type = lambda_type
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(r, inside, **kwargs))
        self.lora_B = nn.Parameter(torch.zeros(n_up, outside, r, **kwargs))
        self.lora_B_w = nn.Parameter(torch.zeros(tasks, n_up, **kwargs))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if w_init == "uniform":
            nn.init.kaiming_uniform_(self.lora_B_w, a=math.sqrt(5))
        if lambda_type != "none":
            one = torch.eye(r, **kwargs) if lambda_type == "full" else torch.ones(r, **kwargs)
            blocks = () if len(self.splits) == 1 else (len(self.splits),)
            self.lora_lambdas = nn.Parameter(one.expand(tasks, *blocks, *one.shape).clone())

    def rows(self, key: str) -> Tensor:
        """A parameter with a row for each task: the trained row of a task that was added stands apart from the frozen rest."""
        old: Tensor = getattr(self, key)
        return torch.cat([old, getattr(self, f"{key}_new")]) if hasattr(self, f"{key}_new") else old

    def set_apart(self, first: int, rows: Mapping[str, Tensor] | None = None) -> None:
        """Freeze the layer but for what the tasks from `first` on have of their own. rows: by key, in the place of those there are."""
        self.requires_grad_(False)
        for key in PER_TASK:
            if hasattr(self, key):
                every = self.rows(key).detach() if rows is None else rows[key]
                setattr(self, key, nn.Parameter(every[:first].clone(), requires_grad=False))
                setattr(self, f"{key}_new", nn.Parameter(every[first:].clone()))

    def add_row(self, source: int | None) -> None:
        """A new last row of what each task has, a copy of the row `source` or the mean of all; all else is frozen."""
        rows = {key: self.rows(key).detach() for key in PER_TASK if hasattr(self, key)}
        self.set_apart(len(self.rows("lora_B_w")), {key: torch.cat([old, _start(old, source)]) for key, old in rows.items()})

    def shares(self) -> Tensor:
        """Weights of the mixtures: (T, n) float32 or wider, each row sums to 1."""
        w = self.rows("lora_B_w")
        return torch.softmax(wide(w) / self.tau, -1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ..., in), or (N, in) for ids by token. Returns (..., out) in the dtype of the base output.

        Rows or tokens with the id OFF get the base output. Raises UserError as `TaskIds.of` does.
        """
        y: Tensor = self.base_layer(x)
        if not self.adds:
            return y
        ids = self.task_ids.of(x)  # (B,) or (B, T)
        rows = (ids.numel(), -1)
        dropped = self.dropout(widen(x, self.lora_A.dtype)).reshape(*rows, self.in_features)
        out = lora_mixed(
            y.reshape(*rows, self.out_features), dropped, self.lora_A, self.lora_B, self.shares(), self._lambdas(), self.scale,
            ids.flatten().clamp_min(0), self.splits,
        ).view_as(y)  # fmt: skip
        if self.task_ids.some_off:
            out = torch.where((ids != OFF).reshape(*ids.shape, *(1,) * (y.dim() - ids.dim())), out, y)
        return out

    def _lambdas(self) -> Tensor | None:
        """(T, blocks, r, r) or (T, blocks, r)."""
        if self.lambda_type == "none":
            return None
        lambdas = self.rows("lora_lambdas")
        return lambdas.unsqueeze(1) if len(self.splits) == 1 else lambdas

    def factors(self, task: int | None = None) -> tuple[Tensor, Tensor]:
        """The task's update without its scale as up @ down: up (out, r) is B_t Lambda_t by blocks of rows, down (r, in) is A.

        Raises UserError when there are several tasks and none is said.
        """
        if task is None and len(self.task_ids) > 1:
            raise UserError(f"adapter.task: missing; each of {', '.join(self.task_ids.names)} has an update of its own")
        task = task or 0
        with torch.autocast(self.lora_A.device.type, enabled=False):
            up = torch.einsum("n,nor->or", self.shares()[task], wide(self.lora_B))  # (out, r)
            if (lambdas := self._lambdas()) is not None:
                matrices = wide(lambdas[task].diag_embed() if self.lambda_type == "diag" else lambdas[task])  # (blocks, r, r)
                up = torch.cat([rows @ matrix for rows, matrix in zip(up.split(self.splits), matrices, strict=True)])
        return up, wide(self.lora_A)

    def delta_weight(self, task: int | None = None) -> Tensor:
        up, down = self.factors(task)
        with torch.autocast(up.device.type, enabled=False):
            return self.scale * (up @ down)  # (out, in)

    def diagnostics(self) -> dict[str, float]:
        """What tasks share; {} for one task. largest_share: largest weight of a mixture (1/n is even), mean over the tasks.

        task_cosine: between the updates of two tasks, mean over the pairs.
        """
        tasks = len(self.task_ids)
        if tasks < 2:
            return {}
        alike = (cosines(self).sum() - tasks) / (tasks * (tasks - 1)) if self.lora_B.any() else torch.zeros(())
        return {"largest_share": self.shares().amax(-1).mean().item(), "task_cosine": alike.item()}


class MTLLoRA(LowRankAdapter):
    """Adapter option: low-rank updates that tasks share in part; everything else frozen.

    n_up: up-projections B_i, >= 1. tau: temperature of their mixture, > 0; small is nearly one B a task. lambda_type: the matrix inside the
    rank is full, diagonal or left out. w_init: `uniform` as published, or `zeros`, an even mixture. tasks: their names; the order fixes the
    ids of a batch, and a folder is read by the names. split_fused: each block of a fused projection has its own Lambda; fused: the blocks,
    where the model does not say them itself, see `components.adapters.base.fused`. train: the last of the tasks, whose own rows alone are
    trained, while all else keeps every bit; None: everything. new_from: where tasks begin that the adapter which is gone on with lacks, at
    the mean of its tasks or at one. The rest is as in `LowRankAdapter`. Raises UserError for values out of range.
    """

    may_change = ("dropout", "tasks", "train", "new_from")  # of an adapter that is gone on with

    def __init__(
        self, r: int, alpha: float, dropout: float, targets: str | Sequence[str], exclude: str | None, use_rslora: bool,
        rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float], modules_to_save: Sequence[str],
        train_bias: Literal["none", "adapted", "all"], n_up: int, tau: float, lambda_type: Literal["full", "diag", "none"],
        w_init: Literal["uniform", "zeros"], tasks: Sequence[str], split_fused: bool,
        fused: Mapping[str, Sequence[str | int]] | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None, allow_tied: bool = False,
        train: Sequence[str] | None = None, new_from: str = "mean",
    ) -> None:  # fmt: skip
        super().__init__(
            r, alpha, dropout, targets, exclude, use_rslora, rank_pattern, alpha_pattern, modules_to_save, train_bias, dtype, allow_tied
        )  # fmt: skip
        if n_up < 1:
            raise UserError(f"adapter.n_up: {n_up}; at least 1 up-projection is needed")
        if not math.isfinite(tau) or tau <= 0:
            raise UserError(f"adapter.tau: {tau}; must be a finite number above 0")
        for key, value, allowed in (("lambda_type", lambda_type, ("full", "diag", "none")), ("w_init", w_init, ("uniform", "zeros"))):
            if value not in allowed:
                raise UserError(f"adapter.{key}: {value!r}; allowed are {', '.join(allowed)}")
        if not tasks:
            raise UserError("adapter.tasks: []; name at least one task")
        if train is not None and (not 0 < len(train) < len(tasks) or list(train) != list(tasks[-len(train) :])):
            raise UserError(
                f"adapter.train: {', '.join(train) or '[]'}; null for everything, or the last of the tasks {', '.join(tasks)}, but not all"
            )
        check_fused(fused or {})
        if fused and not split_fused:
            raise UserError("adapter.fused: set, but adapter.split_fused=false splits nothing; drop one of them")
        self.train, self.new_from = train, new_from
        self.n_up = n_up
        self.tau = tau
        self.lambda_type = lambda_type
        self.w_init = w_init
        self.tasks = tuple(tasks)
        self.split_fused = split_fused
        self.fused = dict(fused or {})

    @property
    def of_learned(self) -> str | None:
        """A key that has a meaning only for an adapter that has learned: B is zero at the start, so that no row of a task would move."""
        return "train" if self.train else "new_from" if self.new_from != "mean" else None

    @property
    def resting(self) -> tuple[str, ...]:
        """Tasks whose rows train nothing."""
        return tuple(name for name in self.tasks if self.train and name not in self.train)

    def apply(self, model: nn.Module) -> dict[str, Any]:
        """Wrap the targets in place and freeze the rest; the model's outputs do not change. See `components.adapters.base.inject`.

        A layer has r in + n out r + T blocks r^2 + T n parameters (T blocks r for diagonals).
        """
        splits = fused_rows(model, self.fused, self.chosen(model)) if self.split_fused else {}

        def wrap(name: str, base: nn.Module, ids: TaskIds, r: int, scale: float) -> MTLLoRALayer:
            rows = splits.get(name, ())
            return MTLLoRALayer(base, ids, r, scale, self.dropout, self.n_up, self.tau, self.lambda_type, self.w_init, rows)

        report = self.wrap_targets(model, wrap, self.tasks)
        if not self.train:
            return report
        model.requires_grad_(False)
        for _, layer in _layers(model):
            layer.set_apart(len(self.tasks) - len(self.train))
        return count_parameters(model)

    def _shape(self) -> dict[str, Any]:
        """What a folder must agree on, by its names in the configuration."""
        keys = ("r", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "n_up", "tau", "lambda_type", "split_fused")
        return {key: getattr(self, key) for key in keys}

    def save(self, model: nn.Module, folder: Path | str) -> None:
        """Write adapter_model.safetensors, with the tensors by parameter name, and adapter_config.json.

        Raises UserError beside another adapter.
        """
        self.check_alone(model)
        state = _joined(adapter_state(model))
        config = {"peft_type": "MTL_LORA", **self._shape(), "fused": _blocks(model), "dropout": self.dropout}
        config["tasks"] = list(_holder(model).names)
        write_folder(Path(folder), config, state)

    def load(self, model: nn.Module, folder: Path | str) -> None:
        """Read such a folder into a model that `apply` has wrapped. Tasks go by name, so that their order may differ.

        A file is taken as one of the published code, see `load_reference`.
        Raises UserError when a file is missing or unreadable, or keys, shapes, tasks, or what decides the forward pass differ.
        """
        if Path(folder).is_file():
            return self.load_reference(model, folder)
        config, state = read_folder(Path(folder))
        if config.get("peft_type") != "MTL_LORA":
            raise UserError(f"{folder}: peft_type is {config.get('peft_type')}; only MTL_LORA can be read by this adapter")
        for key, own in self._shape().items():
            if config.get(key) != own:
                raise UserError(f"{folder}: {key} is {config.get(key)}; this adapter has {own}")
        for name, own in _blocks(model).items():
            if (rows := config.get("fused", {}).get(name, own)) != own:
                raise UserError(f"{folder}: {name} has blocks of {rows} rows; that of this model has {own}")
        names = _holder(model).names
        found = config.get("tasks")
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise UserError(f"{folder}: tasks is {found!r}; a list of names is needed")
        if sorted(found) != sorted(names):
            raise UserError(f"{folder}: its tasks are {', '.join(found)}; this adapter has {', '.join(names)}")
        order = [found.index(name) for name in names]
        for name, tensor in state.items():
            if name.endswith(PER_TASK) and tensor.shape[:1] == (len(order),):
                state[name] = tensor[order]
        load_adapter_state(model, _parted(model, state), str(folder))

    def take_over(self, model: nn.Module, state: dict[str, Tensor], names: Sequence[str], source: str) -> None:
        """Go on with an adapter of the same shape and its tasks; model: wrapped by `apply`. Tasks go by name, new ones begin at `new_from`.

        state, names: its tensors by parameter name, and its tasks. source: what to blame in the UserError for tasks that this one lacks.
        """
        if gone := [name for name in names if name not in self.tasks]:
            raise UserError(
                f"adapter.tasks: {', '.join(self.tasks)}, but the adapter of {source}, which is gone on with, has {', '.join(gone)} too; "
                "keep its tasks, others may come behind them"
            )
        if self.new_from not in ("mean", *names):
            near = difflib.get_close_matches(self.new_from, names, 1)
            raise UserError(
                f"adapter.new_from: {self.new_from!r}; allowed are mean, and the tasks of {source}, {', '.join(names)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        start = None if self.new_from == "mean" else list(names).index(self.new_from)
        state = _joined(state)
        for name, rows in state.items():
            if name.endswith(PER_TASK):
                found = [rows[[list(names).index(task)]] if task in names else _start(rows, start) for task in self.tasks]
                state[name] = torch.cat(found)
        load_adapter_state(model, _parted(model, state), source)

    def load_reference(self, model: nn.Module, file: Path | str) -> None:
        """Read a .pt file of the published code (pUmpKin-Co/MTL-LoRA); its tasks are taken in the order of this adapter's.

        lora_A may have a leading 1, names a leading `module.`. Raises UserError for anything else than tensors by name, and as `load` does.
        """
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch raises RuntimeError, UnpicklingError, OSError, EOFError ..., and advises to read it unsafely
            raise UserError(f"{file}: is no file of tensors by name that torch.save wrote") from None
        if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
            raise UserError(f"{file}: holds other things than tensors by name")
        state = {name.removeprefix("module."): tensor for name, tensor in found.items()}
        for name, tensor in state.items():
            if name.endswith("lora_A") and tensor.dim() == 3 and len(tensor) == 1:
                state[name] = tensor[0]
        load_adapter_state(model, _parted(model, state), str(file))

    def export_peft(self, model: nn.Module, task: int | str, folder: Path | str) -> None:
        """Write one task as a plain LoRA that PEFT and vLLM read: A as it is, B := B_t Lambda_t, same rank and scale; exact.

        Lambda_t goes to B and not to A, since so the blocks of a fused projection need no more rank, and all tasks share one A.
        """
        chosen = _holder(model).index(task)
        self.check_alone(model)
        if chosen < 0:
            raise UserError(f"adapter.task: {task} means no adapter; there is nothing to export")
        state = {name: tensor for name, tensor in adapter_state(model).items() if ".lora_" not in name}
        for name, layer in _layers(model):
            up, down = layer.factors(chosen)
            state |= {f"{name}.lora_A.weight": down.detach(), f"{name}.lora_B.weight": up.detach()}
        self.write_lora(model, folder, state)

    def add_task(self, model: nn.Module, name: str, init_from: str) -> None:
        """Give the model one more task and freeze all but what is its own: a row of Lambda and of w in each layer.

        init_from: the task to start from, or `mean` of all. The other tasks' outputs do not change by a bit, then or by training: the new
        rows are parameters of their own, so that no optimizer touches the old. `save` writes all rows together.
        Raises UserError for a name that is taken, a task that is not there, or another adapter, which would not know of the new task.
        """
        holder = _holder(model)
        self.check_alone(model, "which would have no such task; add it to a model with this adapter alone")
        if name in holder.names or name == "mean":
            raise UserError(f"adapter.tasks: {name!r} is taken; the tasks are {', '.join(holder.names)}")
        source = None if init_from == "mean" else holder.index(init_from)
        model.requires_grad_(False)
        for _, layer in _layers(model):
            layer.add_row(source)
        holder.names = (*holder.names, name)
        self.tasks = holder.names


def _layers(model: nn.Module) -> list[tuple[str, MTLLoRALayer]]:
    return [(name, layer) for name, layer in adapter_layers(model) if isinstance(layer, MTLLoRALayer)]


def _start(rows: Tensor, source: int | None) -> Tensor:
    """The first row of a new task, (1, ...): a copy of the row `source`, or the mean of all."""
    return rows.mean(0, keepdim=True) if source is None else rows[source : source + 1]


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name with the rows that are trained alone behind the others."""
    apart = {name.removesuffix("_new"): tensor for name, tensor in state.items() if name.endswith("_new")}
    return {name: torch.cat([old, apart[name]]) if name in apart else old for name, old in state.items() if not name.endswith("_new")}


def _parted(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite, as this model has them."""
    parted = dict(state)
    for name, own in adapter_state(model).items():
        old = name.removesuffix("_new")
        if old != name and old in state and len(state[old].shape) == own.dim():
            parted[old], parted[name] = state[old][: -len(own)], state[old][-len(own) :]
    return parted


def _blocks(model: nn.Module) -> dict[str, list[int]]:
    """{module name: rows of each block} of what has several."""
    return {name: list(layer.splits) for name, layer in _layers(model) if len(layer.splits) > 1}


def _holder(model: nn.Module) -> TaskIds:
    holder = task_ids(model)
    if holder is None:
        raise UserError("adapter: the model has none; apply it first")
    return holder
