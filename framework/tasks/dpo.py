"""Option task=dpo: learns from pairs of answers which one is preferred, held near the model that training starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.adapters.base import adapter_layers, disabled
from components.contracts import Batch, UserError
from components.losses.preference import dpo, sequence_logprobs
from framework.build import load_run
from framework.distributed import reduced
from framework.tasks.lm import LanguageModelTask, MakeOptimizer, MakeSchedule

FIGURES = ("accuracy", "margin", "chosen_reward", "rejected_reward")


class PreferenceTask(LanguageModelTask):
    """Minimises the mean DPO loss of the pairs of each optimizer step (Rafailov et al., arXiv 2305.18290), plus auxiliary losses.

    The reference is the run that training starts from, loaded once and frozen; with an adapter it is the model itself with the adapter
    switched off, which needs no second copy. Its log-probabilities are computed in the step. It is in no checkpoint: a resumed run loads it
    again, and refuses another.

    Logs, of training (train/...) and held-out pairs (val/...): loss; dpo/accuracy, the share of pairs whose chosen answer has the higher
    reward; dpo/margin, by how much; dpo/chosen_reward and dpo/rejected_reward, beta * (log policy - log reference).
    """

    takes_pairs = True
    loss_unit = "nats per pair"

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, make_schedule: MakeSchedule, val_bytes: int, reference: str | None,
        beta: float, label_smoothing: float, nll_weight: float, normalise: Literal["sum", "mean"],
    ) -> None:  # fmt: skip
        """
        Args:
            model, make_optimizer, make_schedule, val_bytes: see LanguageModelTask; a preference has no bytes.
            reference: run directory or checkpoint file, that of `ckpt=`.
            beta: weight of the log-ratios, above 0.
            label_smoothing: share of pairs thought to be labelled the wrong way round, in [0, 0.5).
            nll_weight: of the mean negative log-likelihood of a chosen answer's tokens, which is added to its pair's loss (alpha of
                arXiv 2404.19733, eq. 1): it keeps the chosen answers likely. 0: DPO itself.
            normalise: log-probability of an answer: the sum over its tokens, or their mean.

        Raises:
            UserError: no reference, or numbers out of range.
        """
        super().__init__(model, make_optimizer, make_schedule, val_bytes, "completion")
        if not reference:
            raise UserError("task.reference: null; it is the run that training starts from: ckpt=RUN_DIR")
        if not 0 < beta < float("inf"):
            raise UserError(f"task.beta: {beta}; must be a finite number above 0")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"task.label_smoothing: {label_smoothing}; must be at least 0 and below 0.5")
        if not 0 <= nll_weight < float("inf"):
            raise UserError(f"task.nll_weight: {nll_weight}; must be a finite number of at least 0")
        self.beta, self.label_smoothing, self.nll_weight = beta, label_smoothing, nll_weight
        self.normalise, self.path = normalise, reference
        self.hidden_reference: list[Any] = []  # in a list, so that it is no part of this module: not saved, trained, counted or sharded
        if not any(True for _ in adapter_layers(model)):
            self.hidden_reference.append(load_reference(reference))
        self.fingerprint = digest(self.hidden_reference[0]) if self.hidden_reference else None  # of the weights as they were read
        self.val_sums = torch.zeros(0)

    def on_fit_start(self) -> None:
        """Bring the reference to the device and dtype of the model."""
        for reference in self.hidden_reference:
            reference.to(self.device, next(self.model.parameters()).dtype)

    on_validation_start = on_fit_start  # before the first step there may be a validation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the pairs of one micro-batch, () float32; batch: 2B rows, see PreferenceData."""
        losses, figures, output = self.compare(batch)
        counted = figures["counted"]
        loss = losses[counted].sum() / max(1, int(counted.sum()))
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self.window_loss, self.window_aux, self.mean_loss = torch.zeros_like(loss), {}, None
        self.window_loss = self.window_loss + loss.detach() / accumulate
        for name in FIGURES:
            value = figures[name][counted].sum() / max(1, int(counted.sum()))
            self.window_aux[f"dpo/{name}"] = self.window_aux.get(f"dpo/{name}", 0.0) + value / accumulate
        for name, value in output.aux_losses.items():
            self.window_aux[name] = self.window_aux.get(name, 0.0) + value.detach() / accumulate
            loss = loss + value
        return loss

    def compare(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Losses (B,) of the pairs of 2B rows; FIGURES and `counted`, whether both answers have labels, each (B,); the model's output."""
        assert batch.labels is not None
        with torch.no_grad(), self.reference() as reference:
            before, _ = sequence_logprobs(reference(batch).hidden, reference.head_weight, batch.labels, self.normalise)  # (2B,)
        output = self.model(batch)
        now, labels = sequence_logprobs(output.hidden, self.model.head_weight, batch.labels, self.normalise)  # type: ignore[arg-type]
        pairs = len(now) // 2
        losses, chosen, rejected = dpo(now[:pairs], now[pairs:], before[:pairs], before[pairs:], self.beta, self.label_smoothing)
        if self.nll_weight:
            losses = losses - self.nll_weight * now[:pairs] / (labels[:pairs].clamp(min=1) if self.normalise == "sum" else 1)
        counted = (labels > 0).view(2, -1).all(dim=0)
        figures = {
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        return losses, {**figures, "counted": counted}, output

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The reference model, in eval mode."""
        if self.hidden_reference:
            yield self.hidden_reference[0]
            return
        training = self.model.training
        self.model.eval()
        try:
            with disabled(self.model):
                yield self.model
        finally:
            self.model.train(training)

    def on_validation_epoch_start(self) -> None:
        self.val_sums = torch.zeros(2 + len(FIGURES), dtype=torch.float64, device=self.device)  # pairs, loss, FIGURES

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch of held-out pairs to the sums."""
        losses, figures, _ = self.compare(batch)
        counted = figures["counted"]
        sums = [counted.sum(), losses[counted].sum(), *(figures[name][counted].sum() for name in FIGURES)]
        self.val_sums += torch.stack([value.double() for value in sums])

    def on_validation_epoch_end(self) -> None:
        """Means over all held-out pairs; every process has a share of them."""
        pairs, loss, *figures = reduced(self.val_sums).tolist()
        if not pairs:
            return
        self.validation = {"val/loss": loss / pairs, **{f"val/dpo/{name}": value / pairs for name, value in zip(FIGURES, figures)}}
        self.log_dict(self.validation, logger=False, batch_size=1)  # for callbacks that watch a metric

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which reference the run compares with; with an adapter its weights are in the checkpoint anyway."""
        if self.fingerprint is not None:
            checkpoint["reference"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the reference is not the one that the run began with.
        """
        if self.fingerprint is not None and checkpoint.get("reference") != self.fingerprint:
            raise UserError(
                f"resume: {self.path} no longer holds the weights that this run is compared with (was it trained further?); "
                "put them back, or start a new run"
            )


def load_reference(path: str) -> nn.Module:
    """The frozen model of a run, what its adapter learned included."""
    model = load_run(path).model
    model.requires_grad_(False)
    return model


def digest(model: nn.Module) -> str:
    """16 hex digits of a model's weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]
