"""The language-model task through Lightning: gradients, clipping, validation, averages; hand-computed or against a float64 reference."""

import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from components.contracts import IGNORE, Batch, ModelOutput, UserError
from components.losses.lm import bits_per_byte, next_token_loss, nll_sum
from framework.callbacks.ema import Ema
from framework.callbacks.step import LastStep
from framework.datamodule import EndlessLoader
from framework.tasks.lm import LanguageModelTask

VOCAB, WIDTH, LENGTH = 13, 8, 10


class TinyModel(nn.Module):
    """Embedding, one tanh layer, tied head: enough of the `Model` contract for the task."""

    def __init__(self, aux: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator) * 0.5)
        self.layer = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) * 0.5)
        self.aux = aux

    def forward(self, batch, state=None):
        hidden = torch.tanh(self.embedding[batch.input_ids] @ self.layer)
        return ModelOutput(hidden, {"size": self.aux * self.layer.square().sum()} if self.aux else {})

    @property
    def head_weight(self):
        return self.embedding


class ListStream:
    """Given micro-batches, epoch after epoch."""

    def __init__(self, batches):
        self.batches, self.epoch, self.position = batches, 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches[self.position :]:
            self.position += 1
            if self.position == len(self.batches):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


def uneven_rows() -> Batch:
    """Four rows with 1, 9, 0 and 10 counted labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCAB, (4, LENGTH), generator=generator)
    labels[0, 1:], labels[1, :1], labels[2] = IGNORE, IGNORE, IGNORE
    return Batch(torch.randint(VOCAB, (4, LENGTH), generator=generator), labels, loss_tokens=20)


def fit(batches, accumulate, steps=1, aux=0.0, val=(), val_bytes=0, callbacks=(), optimizer=None, **trainer):
    """Train a TinyModel through Lightning; returns the task."""
    make = optimizer or (lambda model: torch.optim.SGD(model.parameters(), lr=1.0))
    task = LanguageModelTask(TinyModel(aux), make, lambda o, n: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0), val_bytes)
    pl.Trainer(
        max_steps=steps, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=accumulate * steps, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, callbacks=[LastStep(), *callbacks], **trainer,
    ).fit(task, EndlessLoader(ListStream(batches), accumulate), ListStream(list(val)) if val else None)  # fmt: skip
    return task


def rows(batch, sizes):
    """Split a batch into micro-batches; each keeps the whole step's count of tokens."""
    parts = zip(batch.input_ids.split(sizes), batch.labels.split(sizes))
    return [Batch(ids, labels, loss_tokens=batch.loss_tokens, index=i) for i, (ids, labels) in enumerate(parts)]


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3]])
@pytest.mark.parametrize("aux", [0.0, 0.01])
def test_accumulated_gradients_equal_those_of_the_whole_batch(sizes, aux):
    batch = uneven_rows()
    whole, parts = fit([batch], 1, aux=aux), fit(rows(batch, sizes), len(sizes), aux=aux)
    start = TinyModel()
    for name, p in parts.model.named_parameters():
        step = dict(whole.model.named_parameters())[name] - dict(start.named_parameters())[name]
        assert (p - dict(whole.model.named_parameters())[name]).norm() <= 1e-6 * step.norm()  # fp32 sums in another order
    assert float(parts.window_loss) == pytest.approx(float(whole.window_loss), rel=1e-6)


def test_mean_of_means_would_fail_that_test():
    batch = uneven_rows()
    uneven = [replace(part, loss_tokens=4 * int((part.labels != IGNORE).sum())) for part in rows(batch, [1, 1, 1, 1])]
    whole, wrong = fit([batch], 1), fit(uneven, 4)
    assert (wrong.model.layer - whole.model.layer).norm() > 1e-2 * whole.model.layer.norm()


def test_step_equals_float64_reference():
    batch = uneven_rows()
    model = TinyModel().double()
    logits = model(batch).hidden @ model.head_weight.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)  # mean over the 20 labels
    loss.backward()
    task = fit([batch], 1)
    assert float(task.window_loss) == pytest.approx(loss.item(), rel=1e-6)
    moved = TinyModel().layer - task.model.layer  # SGD at rate 1: the gradient
    assert (moved - model.layer.grad).norm() <= 1e-5 * model.layer.grad.norm()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(task.grad_norm) == pytest.approx(norm.item(), rel=1e-5)


def test_clipping_uses_the_measured_norm():
    batch = uneven_rows()
    free, clipped = fit([batch], 1), fit([batch], 1, gradient_clip_val=0.01)
    assert float(clipped.grad_norm) == pytest.approx(float(free.grad_norm))  # logged before clipping
    moved = torch.cat([(a - b).flatten() for a, b in zip(clipped.model.parameters(), TinyModel().parameters())]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)  # (norm + 1e-6 in the denominator)
    by_value = fit([batch], 1, gradient_clip_val=0.001, gradient_clip_algorithm="value")
    assert max((a - b).abs().max() for a, b in zip(by_value.model.parameters(), TinyModel().parameters())) <= 0.001 + 1e-6


def test_no_counted_label_is_loss_zero_not_nan():
    batch = uneven_rows()
    batch.labels[:] = IGNORE
    batch.loss_tokens = 0
    task = fit([batch], 1)
    assert float(task.window_loss) == 0.0
    assert torch.equal(task.model.layer, TinyModel().layer)


def test_validation_is_the_sum_over_every_label_and_byte():
    batch = uneven_rows()
    val = rows(batch, [1, 2, 1])
    task = fit([batch], 1, val=val, val_bytes=37, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    model = TinyModel().double()
    logits = (model(batch).hidden @ model.head_weight.T).flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
    metrics = task.take_validation()
    assert metrics["val/loss"] == pytest.approx(total / 20, rel=1e-6)
    assert metrics["val/bits_per_byte"] == pytest.approx(total / math.log(2) / 37, rel=1e-6)
    assert task.take_validation() == {}


def test_bits_per_byte_of_a_uniform_model_is_the_log_of_its_vocabulary():
    nll, tokens = nll_sum(torch.zeros(1, 6, 4), torch.zeros(256, 4), torch.tensor([[1, 2, 3, IGNORE, 4, 5]]))
    assert int(tokens) == 5
    assert bits_per_byte(float(nll), 5) == pytest.approx(8.0)


def test_frozen_head_gets_no_gradient():
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    next_token_loss(hidden, head, torch.randint(7, (2, 3)), 6).backward()
    assert hidden.grad is not None and head.grad is None


def test_unknown_loss_on_is_refused():
    with pytest.raises(ValueError, match="one of all, completion"):
        LanguageModelTask(TinyModel(), None, None, 0, loss_on="answer")


def test_average_is_the_recurrence_and_validation_uses_it():
    batch, seen = uneven_rows(), []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(module.model.layer.detach().double().clone())

        def on_validation_batch_start(self, trainer, module, *args):
            seen.append(module.model.layer.detach().double().clone())

    ema = Ema(0.5)
    task = fit([batch], 1, steps=6, val=[batch], callbacks=[ema, Spy()])
    average = TinyModel().layer.detach().double()
    for n, weights in enumerate(seen[:6]):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weights
    assert (ema.average["layer"] - average).norm() <= 1e-6 * average.norm()
    assert torch.equal(seen[6].float(), ema.average["layer"])  # inside validation
    assert torch.equal(task.model.layer.double(), seen[5])  # and back, bit for bit


def test_window_longer_than_an_epoch_is_refused():
    with pytest.raises(UserError, match=r"trainer.accumulate_grad_batches: 3 is more than the 2 batch\(es\)"):
        EndlessLoader(ListStream([uneven_rows()] * 2), 3)


def test_endless_loader_drops_what_fills_no_window_and_counts_epochs():
    loader = EndlessLoader(ListStream(list("abcde")), 2)
    iterator = iter(loader)
    assert [next(iterator) for _ in range(10)] == list("abcdabcdab")
    assert loader.state_dict() == {"epoch": 2, "position": 2}
    for taken in range(1, 12):
        first = EndlessLoader(ListStream(list("abcde")), 2)
        walk = iter(first)
        for _ in range(taken):
            next(walk)
        second = EndlessLoader(ListStream(list("abcde")), 2)
        second.load_state_dict(first.state_dict())
        again = iter(second)
        assert [next(again) for _ in range(9)] == [next(walk) for _ in range(9)]
