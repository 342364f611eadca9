"""Two steps of training by hand, for the interchange matrix: what moved, what a checkpoint carries, what the step costs."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from components.adapters.base import adapter_layers, parameter_roles
from components.contracts import Batch, Data
from components.losses.lm import next_token_loss
from framework import build
from framework.callbacks.exact_state import rng_state, set_rng_state
from framework.checkpoint import mismatch
from framework.runtime import compute_dtype


class Trial:
    """One cell in training: what `framework.train` builds, stepped by hand (Lightning's Trainer would cost more than the steps)."""

    def __init__(self, config: DictConfig, data: Data, seed: int) -> None:
        pl.seed_everything(seed, verbose=False)
        self.model: Any = build.build_model(config, data.tokenizer.vocab_size)
        build.build(config.adapter).apply(self.model)
        self.optimizer = build.build_optimizer(config, self.model)
        self.schedule = build.build(config.schedule)(self.optimizer, total_steps=config.trainer.max_steps)
        self.stream = data.train_stream(config.seed)
        self.dtype, self.clip = compute_dtype(config.trainer.precision), config.trainer.gradient_clip_val
        self.received: set[str] = set()  # parameters that had a gradient other than zero
        self.kept_bytes = 0  # by the backward of the measured step, beyond the weights

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states (B, T, D) of a batch in the mode of evaluation."""
        self.model.eval()
        with torch.no_grad(), torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model(batch).hidden
        self.model.train()
        return hidden

    def step(self, measure: bool = False) -> float:
        """One optimizer step on the next batch; returns its loss. measure: also the bytes that the backward keeps."""
        batch = next(iter(self.stream))
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # a node that keeps its own output would hold itself

        hooks: Any = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor) if measure else contextlib.nullcontext()
        with hooks, torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(batch)
            loss = next_token_loss(output.hidden, self.model.head_weight, batch.labels, batch.loss_tokens)  # type: ignore[arg-type]
            loss = loss + sum(output.aux_losses.values())
        if measure:
            own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
            self.kept_bytes = sum(size for place, size in kept.items() if place not in own)
        loss.backward()
        parameters = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        self.received |= {name for name, p in parameters.items() if p.grad.any()}
        if self.clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self) -> io.BytesIO:
        """A checkpoint in memory."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule", "stream")}
        file = io.BytesIO()
        torch.save({**parts, "rng": rng_state()}, file)
        file.seek(0)
        return file

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in ("model", "optimizer", "schedule", "stream"):
            getattr(self, name).load_state_dict(state[name])
        set_rng_state(state["rng"])

    def weights(self) -> dict[str, Tensor]:
        """A copy of every parameter by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def memory_bytes(self) -> int:
        """Weights, a gradient of each trainable one, optimizer state, and what the backward of the measured step kept."""
        parameters = list(self.model.parameters())
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        tensors = [*parameters, *(p for p in parameters if p.requires_grad), *state]
        return self.kept_bytes + sum(t.numel() * t.element_size() for t in tensors)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors and numbers; NaN equals nothing."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def moved_wrongly(trial: Trial, before: dict[str, Tensor], may_stand_still: list[str]) -> list[str]:
    """Problems with what two steps changed: with an adapter its own parameters and no others, else every trainable one.

    before: the weights at the start. may_stand_still: regexes of whole names. What only weight decay moved has not been trained.
    """
    now, roles = trial.weights(), parameter_roles(trial.model)
    trainable = {name for name, p in trial.model.named_parameters() if p.requires_grad}
    adapted = any(True for _ in adapter_layers(trial.model))
    wanted = {name for name, role in roles.items() if role == "adapter"} if adapted else trainable
    moved = {name for name in now if not torch.equal(now[name], before[name])}
    idle = {name for name in wanted - (moved & trial.received) if not any(re.fullmatch(pattern, name) for pattern in may_stand_still)}
    found = {"trainable although the adapter should freeze it": trainable - wanted, "moved": moved - wanted, "never trained": idle}
    if not wanted:
        return ["nothing is trainable"]
    return [f"{what}: {', '.join(sorted(names)[:3])} ({len(names)} in all)" for what, names in found.items() if names]


def resumed_wrongly(
    straight: Trial, other: Trial, file: io.BytesIO, probe: Batch, hidden: Tensor, second_loss: float
) -> list[str]:  # fmt: skip
    """Problems of a rebuilt cell (`other`, of another seed) that goes on from the first step's checkpoint.

    It must hold the same state, give the same hidden states (B, T, D) for `probe`, and take the same second step, bit for bit.
    """
    problems = []
    state = torch.load(file, weights_only=True)  # as a run reads its own
    if difference := mismatch(other.model, state["model"]):
        return [f"state dict: {difference}"]
    other.load(state)
    if not same(state["model"], other.model.state_dict()):
        problems.append("state dict: differs after loading")
    if not torch.equal(other.forward(probe), hidden):
        problems.append("state dict: the loaded model computes something else")
    set_rng_state(state["rng"])
    if (loss := other.step()) != second_loss:
        problems.append(f"resume: loss {loss!r} at the second step, {second_loss!r} without interruption")
    for what in ("model", "optimizer", "schedule"):
        if not same(getattr(straight, what).state_dict(), getattr(other, what).state_dict()):
            problems.append(f"resume: the {what} ends in another state than without interruption")
    return problems
