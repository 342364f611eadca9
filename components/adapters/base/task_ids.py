"""Which task each row, or each token, belongs to: one holder that all wrappers of a model share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from components.contracts import Batch, UserError
from components.decode_state import DecodeState

OFF = -1  # the id of a row or token that the adapter leaves alone
# Of ids: autograd's number for its next node when they were taken, and the version of their tensor then. A node of an earlier forward has a
# smaller number, so that in the backward it can be told whose forward is recomputed.
Mark = tuple[int, int | None]
Taken = tuple[Tensor | None, bool, Mark]  # ids, some_off and their mark


class TaskIds:
    """Set before each forward and never cleared before the backward is done, since activation checkpointing reads it again there.

    A plain attribute, because a ContextVar breaks torch.compile(fullgraph=True).

    Several forwards with other ids may come before one backward: our models checkpoint with `segment`, which keeps the ids with each block.
    A model of somebody else that checkpoints without it is refused in the backward where the ids have been replaced since, see `now`.

    names: of the tasks; their order fixes the ids. A model without tasks has none, and its wrappers do not ask.
    ids: () for all rows, (B,) by row or (B, T) by token, int64; OFF where the adapter is to add nothing. None: not said.
    some_off: whether OFF may be among them.
    said: both, as `set` left them; a batch without ids goes by them, whatever batch was before it.
    merged: id of the task that is merged into the weights.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self.ids: Tensor | None = None
        self.some_off = False
        self.said: tuple[Tensor | None, bool] = (None, False)
        self.merged: int | None = None
        self._mark: Mark = (0, None)  # of `ids`
        self._said_mark: Mark = (0, None)
        self._outside: list[Taken] = []  # what goes on after recomputations, the innermost last

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose tensors have not been filled anew yet."""
        self.__dict__.update(state, _mark=(0, _version(state["ids"])), _said_mark=(0, _version(state["said"][0])), _outside=[])

    def __len__(self) -> int:
        return len(self.names)

    def index(self, task: int | str) -> int:
        """Id of a task by name or id. Raises UserError for another, with the nearest name."""
        if isinstance(task, str) and task in self.names:
            return self.names.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and OFF <= task < len(self.names):
            return task
        near = difflib.get_close_matches(str(task), self.names, 1)
        known = ", ".join(f"{name} ({i})" for i, name in enumerate(self.names)) or "none"
        raise UserError(f"adapter.task: {task!r}; the tasks are {known}" + (f"; did you mean {near[0]}?" if near else ""))

    def set(self, task: int | str | Tensor | None) -> None:
        """Say which task what follows belongs to: an id or a name for all rows, ids (B,) by row or (B, T) by token; None: not said.

        Raises UserError for an id that no task has, and for another task than the merged one.
        """
        if task is None:
            self._hold(None, False)
        else:
            self._hold(*self._checked(task if isinstance(task, Tensor) else torch.tensor(self.index(task))))
        self.said, self._said_mark = (self.ids, self.some_off), self._mark

    def go_on(self, state: DecodeState) -> None:
        """Remember in `state` which task its rows are read for; keys and values of one task mean nothing to another.

        Raises UserError for a row that was read for another task so far.
        """
        now, rows = self.ids, state.batch_size
        if now is None or (now.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        now = (now[:, -1] if now.dim() == 2 else now.reshape(-1)).to(state.length.device)
        if rows % len(now):
            return  # `of` says what is wrong
        now = now.repeat_interleave(rows // len(now))
        if state.task_ids is not None and bool((changed := (now != state.task_ids) & (state.length > 0)).any()):
            row = int(changed.nonzero()[0])
            before, after = ("none" if task == OFF else self.names[task] for task in (int(state.task_ids[row]), int(now[row])))
            raise UserError(f"adapter.task: {after}, but row {row} was read for {before} so far; read it anew to change in mid-generation")
        state.task_ids = now

    def of_batch(self, task_ids: Tensor | None) -> None:
        """The ids of one batch; None: as `set` said. Raises UserError as `set` does; in a compiled model it is a RuntimeError."""
        ids, some_off = self.said if task_ids is None else self._checked(task_ids)
        if _backward_node() is None:
            self._hold(ids, some_off)
        else:  # of a forward that is recomputed as a whole
            self.ids, self.some_off = ids, some_off
            self._mark = self._said_mark if task_ids is None else (0, _version(ids))

    def segment(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """`context_fn` of torch.utils.checkpoint (use_reentrant=False): what is recomputed goes by the ids of now."""
        return nullcontext(), _Recomputation(self, (self.ids, self.some_off, (0, self._mark[1])))  # 0: they are its own, whatever node asks

    def go_inside(self, taken: Taken | None = None) -> None:
        """Go by other ids, or by those of a batch that follows, until `go_outside`."""
        self._outside.append((self.ids, self.some_off, self._mark))
        if taken is not None:
            self.ids, self.some_off, self._mark = taken

    def go_outside(self) -> None:
        """Go by what was before `go_inside`; without it nothing happens."""
        if self._outside:
            self.ids, self.some_off, self._mark = self._outside.pop()

    def now(self) -> Tensor | None:
        """The ids that a layer is to go by; None: not said.

        Raises UserError where activation checkpointing recomputes a forward whose ids have been replaced since, or filled anew.
        """
        if (node := _backward_node()) is None:
            return self.ids
        since, version = self._mark
        if node._sequence_nr() < since:
            raise UserError(
                "task_ids: the backward recomputes a forward whose ids have been replaced since; go backward before the next forward, "
                "or checkpoint with use_reentrant=False and context_fn=task_ids(model).segment"
            )
        if _version(self.ids) != version:
            raise UserError(
                "task_ids: the backward recomputes a forward whose ids were filled anew in place since; give each forward its own tensor"
            )
        return self.ids

    def _hold(self, ids: Tensor | None, some_off: bool) -> None:
        """Go by these ids from here on; the same tensor with the same values goes on."""
        if not torch.compiler.is_compiling() and (ids is not self.ids or _version(ids) != self._mark[1]):
            self._mark = (torch.autograd._get_sequence_nr(), _version(ids))  # a graph has the ids of its recomputations among its inputs
        self.ids, self.some_off = ids, some_off

    def _checked(self, task: Tensor) -> tuple[Tensor, bool]:
        """The ids as int64, and whether OFF may be among them."""
        if not torch.compiler.is_compiling():  # one glance at the values a forward; a graph cannot stop for it, and checks by itself
            return task.long(), self._check(task)
        allowed = (task >= OFF) & (task < len(self.names)) if self.merged is None else task == self.merged
        torch._assert_async(allowed.all(), "task_ids: an id that no task has, or of another task than the merged one")
        return task.long(), True

    def _check(self, ids: Tensor) -> bool:
        """Whether OFF is among them."""
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() > 2 or not ids.numel():
            raise UserError(f"task_ids: {ids.dtype} of shape {tuple(ids.shape)}; whole numbers of shape (B,) or (B, T) are allowed")
        low, high = (int(end) for end in ids.aminmax())
        if low < OFF or high >= len(self.names):
            raise UserError(
                f"task_ids: from {low} to {high}; allowed are 0 to {len(self.names) - 1} ({', '.join(self.names)}), "
                f"and {OFF} for no adapter"
            )
        if self.merged is not None and (low != self.merged or high != self.merged):
            other = low if low != self.merged else high
            raise UserError(f"task_ids: {other}, but {self.names[self.merged]} ({self.merged}) is merged into the weights; unmerge it")
        return low == OFF

    def of(self, x: Tensor) -> Tensor:
        """Ids of the rows or tokens of the activations x: (B,) for x (B, ..., d), or (B, T) for x (B, T, d), (N,) for x (N, d).

        x may have k rows for each row of the ids (beams, samples): row b of the ids then stands for rows b*k .. b*k + k - 1.
        Without ids the only task is meant. Raises UserError when there are several, for any other ratio of rows, and as `now` does.
        """
        if (ids := self.now()) is None:
            if len(self.names) > 1:
                raise UserError(
                    f"task_ids: missing, and the adapter has {len(self.names)} tasks ({', '.join(self.names)}); set adapter.task, "
                    "or use data with tasks"
                )
            return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        if ids.device != x.device:
            ids = self._move(ids, x.device)
        if ids.dim() == 0:
            return ids.expand(x.shape[0])
        if x.dim() == 2 and ids.dim() == 2 and x.shape[0] == ids.numel():  # tokens of all rows in one dimension
            return ids.flatten()
        copies, rest = divmod(x.shape[0], ids.shape[0])
        flat = x.dim() == 2 and (ids.dim() == 2 or copies > 1)  # rows or tokens: cannot be told
        if rest or not copies or flat or (ids.dim() == 2 and x.shape[1] != ids.shape[1]):
            raise UserError(
                f"task_ids: of shape {tuple(ids.shape)} for activations of shape {tuple(x.shape)}; give one a row, or one a token"
            )
        return ids if copies == 1 else ids.repeat_interleave(copies, 0)

    def _move(self, ids: Tensor, device: torch.device) -> Tensor:
        """Once, and not again in each wrapper."""
        here, compiling = ids.to(device), torch.compiler.is_compiling()
        if self.said[0] is ids:
            self.said = (here, self.said[1])
            if not compiling:
                self._said_mark = (self._said_mark[0], _version(here))
        self.ids = here
        if not compiling:
            self._mark = (self._mark[0], _version(here))
        return here


class _Recomputation:
    """Inside, what is recomputed goes by the ids of its forward. May be entered again: a graph can be kept for a second backward."""

    def __init__(self, holder: TaskIds, taken: Taken) -> None:
        self._holder, self._taken = holder, taken

    def __enter__(self) -> None:
        self._holder.go_inside(self._taken)

    def __exit__(self, *args: object) -> None:
        self._holder.go_outside()


def _version(ids: Tensor | None) -> int | None:
    """Grows with every change in place; None where nobody counts."""
    return None if ids is None or ids.is_inference() else ids._version


def _backward_node() -> Any:
    """The node of the graph that a backward is at, None outside of one. A recomputation runs at a node of what it recomputes."""
    return None if torch.compiler.is_compiling() else torch._C._current_autograd_node()


def read_batch(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Forward pre-hook of an adapted model: a batch brings its task ids. One without goes by what was set by hand."""
    batch = args[0] if args else kwargs.get("batch")
    holder: TaskIds = model.adapter_task_ids  # type: ignore[assignment]
    if _backward_node() is not None:  # somebody recomputes the whole model
        holder.go_inside()
    if isinstance(batch, Batch) and len(holder):
        holder.of_batch(batch.task_ids)
        state = args[1] if len(args) > 1 else kwargs.get("state")
        if isinstance(state, DecodeState) and not torch.compiler.is_compiling():
            holder.go_on(state)


def after_recomputation(model: nn.Module, args: tuple[object, ...], output: object) -> None:
    """Forward hook of an adapted model, called whatever happens: after a forward inside a backward the ids are those from before it."""
    if _backward_node() is not None:
        model.adapter_task_ids.go_outside()  # type: ignore[operator, union-attr]
