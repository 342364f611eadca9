"""Next-token training: pretraining and supervised fine-tuning differ in their data's labels only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from components.contracts import IGNORE, Batch
from components.losses.lm import bits_per_byte, next_token_loss, nll_sum
from framework.callbacks.nan_guard import gradient_norm
from framework.distributed import reduced
from framework.likelihood import label_likelihood

LOSS_ON = ("all", "completion")
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]


class LanguageModelTask(pl.LightningModule):
    """Minimises the mean negative log-likelihood of the counted labels of each optimizer step, plus the model's own auxiliary losses."""

    takes_pairs = False  # of answers to compare, which the data must then hold
    loss_unit = "nats per token"

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, make_schedule: MakeSchedule, val_bytes: int, loss_on: str = "all"
    ) -> None:
        """
        Args:
            model: a `Model` of the contract, adapter applied; only its trainable parameters are trained.
            make_optimizer: model -> optimizer.
            make_schedule: (optimizer, total_steps) -> factor of the learning rate per step.
            val_bytes: UTF-8 bytes of the held-out text, for bits per byte; 0 where that makes no sense.
            loss_on: "all" or "completion"; the data reads it and marks what does not count.

        Raises:
            ValueError: unknown loss_on.
        """
        super().__init__()
        if loss_on not in LOSS_ON:
            raise ValueError(f"loss_on={loss_on!r}; one of {', '.join(LOSS_ON)}")
        self.model = model
        self.make_optimizer = make_optimizer
        self.make_schedule = make_schedule
        self.val_bytes = val_bytes
        self.loss_on = loss_on
        self.window_loss: Tensor = torch.zeros(())  # mean nll of the optimizer step so far, detached
        self.window_aux: dict[str, Tensor] = {}
        self.mean_loss: Tensor | None = None  # of the window over all processes, once it is asked for
        self.grad_norm: Tensor | None = None
        self.validation: dict[str, float] = {}
        self.own_settings = False  # on resume: learning rate and the like from the configuration, not from the checkpoint
        self.val_nll, self.val_tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)

    def configure_optimizers(self) -> Any:
        """One optimizer; its schedule advances once an optimizer step."""
        optimizer = self.make_optimizer(self.model)
        schedule = self.make_schedule(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A checkpoint brings its own learning rates; where the user changed them on purpose (resume_force), theirs count."""
        if not self.own_settings:
            return
        fresh = self.make_optimizer(self.model)
        for group, new in zip(self.trainer.optimizers[0].param_groups, fresh.param_groups):
            group.update({key: value for key, value in new.items() if key != "params"}, initial_lr=new["lr"])
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [group["lr"] for group in fresh.param_groups]
        for group, base, factor in zip(self.trainer.optimizers[0].param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
            group["lr"] = base * factor(scheduler.last_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, () float32."""
        accumulate = self.trainer.accumulate_grad_batches
        output = self.model(batch)
        labels = batch.labels
        assert labels is not None
        counted = batch.loss_tokens if batch.loss_tokens is not None else int((labels != IGNORE).sum()) * accumulate
        loss = next_token_loss(output.hidden, self.model.head_weight, labels, counted, accumulate, self.trainer.world_size)  # type: ignore[arg-type]
        if batch_idx % accumulate == 0:
            self.window_loss, self.window_aux, self.mean_loss = torch.zeros_like(loss), {}, None
        self.window_loss = self.window_loss + loss.detach() / accumulate
        for name, value in output.aux_losses.items():
            self.window_aux[name] = self.window_aux.get(name, 0.0) + value.detach() / accumulate
            loss = loss + value
        return loss

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm that was measured for logging anyway."""
        if self.grad_norm is None:
            self.grad_norm = gradient_norm(self)
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            parameters = [p for p in self.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), self.grad_norm)
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    def step_loss(self) -> Tensor:
        """Mean negative log-likelihood of the optimizer step over all processes, () float32. To be called in all of them or none."""
        if self.mean_loss is None:
            self.mean_loss = reduced(self.window_loss, "mean")
        return self.mean_loss

    def step_metrics(self) -> dict[str, float]:
        """Figures of the optimizer step that just ended: losses (mean over ranks), gradient norm before clipping, learning rates."""
        row = {"train/loss": float(self.step_loss())}
        row |= {f"train/{name}": float(reduced(value, "mean")) for name, value in self.window_aux.items()}
        if self.grad_norm is not None:
            row["opt/grad_norm"] = float(self.grad_norm)
        optimizer = self.trainer.optimizers[0]
        for group, rate in zip(optimizer.param_groups, self.rates_used()):
            row.setdefault(f"opt/lr/{group.get('kind', 'all')}", rate)
        return row

    def rates_used(self) -> Iterable[float]:
        """Learning rate of each group in the step that just ended: the schedule has moved on already."""
        config = self.trainer.lr_scheduler_configs[0]
        scheduler: Any = config.scheduler
        if not hasattr(scheduler, "lr_lambdas"):
            return [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        done = scheduler.last_epoch - 1
        return [base * factor(done) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss a label and accuracy, see `label_likelihood`. Whoever calls sets precision and evaluation mode."""
        found = label_likelihood(self.model, batches, self.device)
        return {key: found[key] for key in ("loss", "accuracy") if found}

    def on_validation_epoch_start(self) -> None:
        self.val_nll = torch.zeros((), dtype=torch.float64, device=self.device)
        self.val_tokens = torch.zeros((), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch of held-out tokens to the sums."""
        assert batch.labels is not None
        nll, tokens = nll_sum(self.model(batch).hidden, self.model.head_weight, batch.labels)  # type: ignore[arg-type]
        self.val_nll += nll
        self.val_tokens += tokens

    def on_validation_epoch_end(self) -> None:
        """Loss per token, and bits per byte of the text those tokens stand for; every process has a share of the text."""
        tokens, nll = int(reduced(self.val_tokens)), float(reduced(self.val_nll))
        if not tokens:
            return
        self.validation = {"val/loss": nll / tokens}
        if self.val_bytes:
            share = tokens / self.all_val_tokens() if self.validation_is_cut() else 1.0
            self.validation["val/bits_per_byte"] = bits_per_byte(nll, self.val_bytes * share)  # type: ignore[arg-type]
        self.log_dict(self.validation, logger=False, batch_size=1)  # for callbacks that watch a metric

    def validation_is_cut(self) -> bool:
        """Does `trainer.limit_val_batches` leave some out?"""
        return self.trainer.limit_val_batches != 1.0

    def all_val_tokens(self) -> int:
        """Labels of the whole held-out text."""
        batches: Iterable[Batch] = self.trainer.datamodule.data.val_batches()  # type: ignore[attr-defined]
        return sum(int((b.labels != IGNORE).sum()) for b in batches if b.labels is not None)

    def take_validation(self) -> dict[str, float]:
        """Metrics of the validation just done, {} when there was none; each is given out once."""
        metrics, self.validation = self.validation, {}
        return metrics
