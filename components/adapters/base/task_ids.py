"""Which task each row, or each token, belongs to: one holder that all wrappers of a model share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.contracts import Batch, UserError
from components.decode_state import DecodeState

OFF = -1  # the id of a row or token that the adapter leaves alone


class TaskIds:
    """Set before each forward and never cleared before the backward is done, since activation checkpointing reads it again there.

    A plain attribute, because a ContextVar breaks torch.compile(fullgraph=True).

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
            self.ids, self.some_off = None, False
        else:
            self._take(task if isinstance(task, Tensor) else torch.tensor(self.index(task)))
        self.said = (self.ids, self.some_off)

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
        if task_ids is None:
            self.ids, self.some_off = self.said
        else:
            self._take(task_ids)

    def _take(self, task: Tensor) -> None:
        if not torch.compiler.is_compiling():  # one glance at the values a forward; a graph cannot stop for it, and checks by itself
            self._check(task)
        else:
            self.some_off = True
            allowed = (task >= OFF) & (task < len(self.names)) if self.merged is None else task == self.merged
            torch._assert_async(allowed.all(), "task_ids: an id that no task has, or of another task than the merged one")
        self.ids = task.long()

    def _check(self, ids: Tensor) -> None:
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
        self.some_off = low == OFF

    def of(self, x: Tensor) -> Tensor:
        """Ids of the rows or tokens of the activations x: (B,) for x (B, ..., d), or (B, T) for x (B, T, d), (N,) for x (N, d).

        x may have k rows for each row of the ids (beams, samples): row b of the ids then stands for rows b*k .. b*k + k - 1.
        Without ids the only task is meant. Raises UserError when there are several, and for any other ratio of rows.
        """
        if self.ids is None:
            if len(self.names) > 1:
                raise UserError(
                    f"task_ids: missing, and the adapter has {len(self.names)} tasks ({', '.join(self.names)}); set adapter.task, "
                    "or use data with tasks"
                )
            return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        if self.ids.device != x.device:
            here = self.ids.to(x.device)  # once, and not again in each wrapper
            if self.said[0] is self.ids:
                self.said = (here, self.some_off)
            self.ids = here
        ids = self.ids
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


def read_batch(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Forward pre-hook of an adapted model: a batch brings its task ids. One without goes by what was set by hand."""
    batch = args[0] if args else kwargs.get("batch")
    holder: TaskIds = model.adapter_task_ids  # type: ignore[assignment]
    if isinstance(batch, Batch) and len(holder):
        holder.of_batch(batch.task_ids)
        state = args[1] if len(args) > 1 else kwargs.get("state")
        if isinstance(state, DecodeState) and not torch.compiler.is_compiling():
            holder.go_on(state)
