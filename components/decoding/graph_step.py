"""One decode step in buffers that never move, so that a CUDA graph can replay it.

A decode step of a small batch is hundreds of short kernels and waits for their launches, not for the GPU: the paper's own figure for Samba
(arXiv 2406.07522: 31 ms a step at batch 16 on an A100) is of that kind. Replaying a recorded step costs one launch.

Note: the capture itself has not been run on a GPU. On other devices the same object runs the same step without a graph, and that is what
the tests compare with `model(batch, state)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from components.contracts import Batch, Model
from components.decode_state import DecodeState

_WARM_UP = 3  # steps before the capture, in which kernels are compiled and tuned and workspaces allocated; torch's own guide takes 3


class StaticStep:
    """Feeds one token to each of up to `capacity` rows: static input, state updated in place, static logits.

    Nothing that the host decides from a length may differ between steps. So the state must be of constant size (`constant_size`), and a
    loaded state must have read something: the model treats empty rows in another way. Rows beyond those loaded run along on token 0.
    Weights, the RoPE table and adapters are captured by their place in memory: make a new object when any of them was replaced.

    Args:
        model: in eval mode; called without gradients, under which a state is updated in place.
        like: a state of it, for the shapes and dtypes of the buffers.
        capacity: rows, B of every buffer.
        dtype: float32, or the dtype of autocast. Casts of weights are part of the step: a cast that autocast keeps would be freed under
            the graph.
        in_place: the first `capacity` rows of `like` are the buffers themselves, and all of them are fed; `take` says how many count.

    >>> step = StaticStep(model, state, capacity=4)  # doctest: +SKIP
    >>> step.load(state)  # doctest: +SKIP
    >>> logits = step(ids)  # doctest: +SKIP
    """

    def __init__(self, model: Model, like: DecodeState, capacity: int, dtype: torch.dtype = torch.float32, in_place: bool = False) -> None:
        if not like.constant_size:
            raise ValueError("static step: the state grows with the length, since an attention layer has no window")
        self.model, self.capacity, self.dtype = model, capacity, dtype
        self.device = like.length.device
        self._ids = torch.zeros(capacity, 1, dtype=torch.int64, device=self.device)
        self._logits = torch.zeros(capacity, model.vocab_size, dtype=torch.float32, device=self.device)
        with torch.inference_mode(False), torch.no_grad():
            self._whole = like.first(capacity, 1) if in_place else like.room(capacity)
        if not in_place:
            self._whole.count(1)  # no step is the first
        self.state = self._whole.first(0)
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            kept = self._whole.fork(1) if in_place else None
            self._capture()
            if kept is not None:
                self._whole.overwrite(kept)

    def load(self, state: DecodeState) -> None:
        """Take over the rows of `state`, as a copy; from now on `self.state` is what they have become.

        Raises: ValueError for more rows than the capacity, for rows that have read nothing, or for a state of another model.
        """
        rows = state.batch_size
        if rows > self.capacity:
            raise ValueError(f"static step: {rows} rows do not fit the capacity of {self.capacity}")
        if state.fresh:
            raise ValueError("static step: the state has read nothing yet; prefill it first")
        self.state = self._whole.first(rows)
        self.state.overwrite(state)

    def take(self, rows: int) -> None:
        """Let the first `rows` of buffers that are used in place be the rows of the next steps."""
        if self.state.batch_size != rows:
            self.state = self._whole.first(rows)

    def __call__(self, ids: Tensor) -> Tensor:
        """Append ids (B, 1), one token for each loaded row. Returns logits (B, V) float32, valid until the next call."""
        rows = self.state.batch_size
        if ids.shape != (rows, 1):
            raise ValueError(f"static step: ids is {tuple(ids.shape)}; expected ({rows}, 1), as many rows as were loaded")
        self._ids[:rows].copy_(ids)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        self.state.count(1)  # its tensors are views, its count is its own
        return self._logits[:rows]

    def _run(self) -> None:
        plain = self.dtype == torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=not plain, cache_enabled=False):
            hidden = self.model(Batch(self._ids), self._whole).hidden[:, -1]
            self._logits.copy_(self.model.logits(hidden))

    def _capture(self) -> None:
        """Record the step. The steps before it run on the empty buffers; what they leave there is overwritten by `load`."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()


class StaticSteps:
    """Static steps in the slots of a batch whose rows come and go, made when they are first needed: one for each power of two of rows.

    Args: model, dtype: as in `StaticStep`. Meant for one generation: a step captures where the weights lie.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = model, dtype
        self._slots: DecodeState | None = None
        self._steps: dict[int, StaticStep] = {}

    def __call__(self, ids: Tensor, slots: DecodeState) -> Tensor:
        """Append ids (B, 1) to the first B slots, a power of two in number. Returns logits (B, V), valid until the next call.

        Slots from B up to the next power of two are fed as well: what they held is lost.
        """
        if slots is not self._slots:
            self._slots, self._steps = slots, {}
        capacity = 1 << (len(ids) - 1).bit_length()
        step = self._steps.get(capacity)
        if step is None:
            step = self._steps[capacity] = StaticStep(self.model, slots, capacity, self.dtype, in_place=True)
        step.take(len(ids))
        return step(ids)
