"""Weighted sums of LoRAs: by the task (MOELoRA, arXiv 2310.18339), and by each token (HydraLoRA, arXiv 2404.19245)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.adapters.base import OFF, AdapterLayer, TaskIds, adapter_layers
from components.adapters.base.low_rank import wide, widen
from components.adapters.mixture.matrices import new_matrix
from components.contracts import UserError


class _GatedLayer(AdapterLayer):
    """What the learned routers share: scaled A, gates in float32 outside autocast, and nothing added to rows or tokens that are OFF."""

    adapter_prefix = "lora_"

    def __init__(self, base: nn.Module, task_ids: TaskIds, r: int, scale: float, dropout: float) -> None:
        super().__init__(base, task_ids)
        self.lora_A = new_matrix(base, r, self.in_features, True)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out) in the dtype of the base output."""
        y = self.base_layer(x)
        if not self.adds:
            return y
        ids = self._ids(x)
        z = self.scale * F.linear(self.dropout(widen(x, self.lora_A.dtype)), self.lora_A)  # (..., r)
        added = (y + self._expand(z, x, ids)).to(y.dtype)
        return added if ids is None or not self.task_ids.some_off else torch.where(ids[..., None] == OFF, y, added)

    def _ids(self, x: Tensor) -> Tensor | None:
        """Task of each row or token, with as many dimensions as x (..., in) has before its last; None: not said, and not asked for."""
        ids = self.task_ids.of(x)
        return ids.reshape(*ids.shape, *(1,) * (x.dim() - 1 - ids.dim()))

    def _expand(self, z: Tensor, x: Tensor, ids: Tensor | None) -> Tensor:
        """What is added to the base output, (..., out)."""
        raise NotImplementedError


class TaskLayer(_GatedLayer):
    """y = W x + (alpha / r) sum_e g_e B_e A_e dropout(x), E experts of rank r / E, g = softmax(W_g embedding(task)) (MOELoRA).

    Rows e r/E to (e + 1) r/E of A, and those columns of B, are expert e. Note: the paper has one gate for all layers; here every layer has
    its own. The experts share one dropout mask.
    """

    def __init__(self, base: nn.Module, task_ids: TaskIds, r: int, scale: float, dropout: float, experts: int, embedding_dim: int) -> None:
        super().__init__(base, task_ids, r, scale, dropout)
        self.lora_B = new_matrix(base, self.out_features, r, False)
        self.lora_embedding = new_matrix(base, len(task_ids), embedding_dim, False)
        nn.init.normal_(self.lora_embedding)
        self.lora_gate = new_matrix(base, experts, embedding_dim, True)

    def gates(self) -> Tensor:
        """Weights of the experts for every task, (tasks, E)."""
        with torch.autocast(self.lora_gate.device.type, enabled=False):
            return F.linear(wide(self.lora_embedding), wide(self.lora_gate)).softmax(-1)

    def _by_rank(self, z_dtype: torch.dtype) -> Tensor:
        """The gates with each one as often as its expert has ranks, (tasks, r)."""
        experts, r = len(self.lora_gate), len(self.lora_A)
        return self.gates().repeat_interleave(r // experts, -1).to(z_dtype)

    def _expand(self, z: Tensor, x: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        return F.linear(z * self._by_rank(z.dtype)[ids], self.lora_B)  # the last task stands in for OFF, whose rows are not added to

    def delta_weight(self, task: int | None = None) -> Tensor:
        with torch.autocast(self.lora_A.device.type, enabled=False):
            a, b = wide(self.lora_A), wide(self.lora_B)
            return self.scale * ((b * self._by_rank(b.dtype)[task or 0]) @ a)  # (out, in)


class TokenLayer(_GatedLayer):
    """y = W x + (alpha / r) sum_e p_e(x) B_e A dropout(x): one A, E heads B_e, p = softmax(W_r x) for each token (HydraLoRA).

    top_k: only so many experts, their weights divided by their sum (as MixLoRA does, arXiv 2404.15159); None: all. aux: weights of two
    losses. balance: E sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4-6), f the share of choices (the k best, without top_k the
    best), P the mean of p, over the tokens that are not OFF. z: the mean of logsumexp(W_r x)^2 (ST-MoE, arXiv 2202.08906, eq. 5).
    """

    by_token = True

    def __init__(
        self, base: nn.Module, task_ids: TaskIds, r: int, scale: float, dropout: float, experts: int, top_k: int | None,
        aux: Mapping[str, float],
    ) -> None:  # fmt: skip
        super().__init__(base, task_ids, r, scale, dropout)
        heads = [new_matrix(base, self.out_features, r, False).data for _ in range(experts)]
        self.lora_B = nn.Parameter(torch.stack(heads))  # (E, out, r)
        self.lora_router = new_matrix(base, experts, self.in_features, True)
        self.top_k = top_k
        self.aux = dict(aux)
        self.recording = False
        self._losses: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}

    def gates(self, x: Tensor, off: Tensor | None = None) -> Tensor:
        """Weights of the experts for x (..., in): (..., E), float32 or wider. off: broadcasts to (...), tokens that no loss counts."""
        with torch.autocast(x.device.type, enabled=False):
            router = wide(self.lora_router)
            logits = F.linear(x.to(router.dtype), router)
            p = logits.softmax(-1)
            best, chosen = logits.topk(self.top_k or 1)
            if self.training and torch.is_grad_enabled():
                self._watch(logits, p, chosen, off)
            return p if self.top_k is None else torch.zeros_like(p).scatter(-1, chosen, best.softmax(-1))

    def _ids(self, x: Tensor) -> Tensor | None:
        return None if self.task_ids.now() is None else super()._ids(x)

    def _expand(self, z: Tensor, x: Tensor, ids: Tensor | None) -> Tensor:
        p = self.gates(x, None if ids is None else ids == OFF).to(z.dtype)
        heads = self.lora_B.transpose(0, 1).flatten(1)  # (out, E r)
        return F.linear((p[..., None] * z[..., None, :]).flatten(-2), heads)

    def _watch(self, logits: Tensor, p: Tensor, chosen: Tensor, off: Tensor | None) -> None:
        """Losses and statistics of logits and p (..., E) and choices (..., k). off: broadcasts to (...).

        Activation checkpointing runs this again in the backward, where autograd wants the same operations; what they give is kept only
        while the model itself runs.
        """
        experts = p.shape[-1]
        counts = torch.ones_like(p[..., 0]) if off is None else (~off).to(p.dtype).expand(p.shape[:-1])
        mean = lambda value: torch.tensordot(counts, value, counts.dim()) / counts.sum().clamp(min=1)  # noqa: E731
        share = mean(F.one_hot(chosen, experts).to(p.dtype).mean(-2))  # (E,)
        found = {"balance": lambda: experts * (share * mean(p)).sum(), "z": lambda: mean(logits.logsumexp(-1).square())}
        losses = {f"router_{name}": weight * found[name]() for name, weight in self.aux.items() if weight}
        if self.recording:
            self._losses = losses
            self._statistics = {"load": share, "entropy": mean(torch.special.entr(p.detach()).sum(-1))}

    def take_aux_losses(self) -> dict[str, Tensor]:
        taken, self._losses = self._losses, {}
        return taken

    def router_statistics(self) -> dict[str, Tensor]:
        """Of the newest training forward: load (E,), each expert's share of the choices, and entropy (), a token's mean one in nats."""
        return dict(self._statistics)

    def diagnostics(self) -> dict[str, float]:
        """The largest and the smallest load of an expert, and the mean entropy of a token's weights; {} before the first step."""
        if not self._statistics:
            return {}
        load, entropy = self._statistics["load"], self._statistics["entropy"]
        return {"max_load": load.max().item(), "min_load": load.min().item(), "entropy": entropy.item()}

    def delta_weight(self, task: int | None = None) -> Tensor:
        raise UserError("adapter.merge: true, but adapter.router=token weighs its experts anew for each token; leave it unmerged")


def watch_routers(model: nn.Module) -> None:
    """Make routers take losses and statistics while the model runs in training, and at no other time; twice is as good as once."""
    model.register_forward_pre_hook(_start)
    model.register_forward_hook(_stop, always_call=True)  # after the hook of `inject`, which takes the losses


def _start(model: nn.Module, args: tuple[object, ...]) -> None:
    _set_recording(model, True)


def _stop(model: nn.Module, args: tuple[object, ...], output: object) -> None:
    _set_recording(model, False)


def _set_recording(model: nn.Module, recording: bool) -> None:
    for _, layer in adapter_layers(model):
        if isinstance(layer, TokenLayer):
            layer.recording = recording and layer.training
            layer.take_aux_losses()  # nobody takes those of a model that returns no ModelOutput
