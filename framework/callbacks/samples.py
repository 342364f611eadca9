"""Text that the model writes while it learns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import lightning.pytorch as pl

from components.adapters.base import task_ids
from components.contracts import Data, Model, SamplingParams, Tokenizer
from framework.callbacks.exact_state import rng_state, set_rng_state
from framework.callbacks.step import StepCallback
from framework.callbacks.throughput import Throughput
from framework.distributed import is_sharded
from framework.prompts import Renderer, held_out_prompt

TEMPERATURE, TOP_P = 0.8, 0.95
WeightsContext = Callable[[pl.LightningModule], AbstractContextManager[None]]


class Samples(StepCallback):
    """Calls `write` every `every_steps` steps and shows its text. Training goes on as if nothing had happened: generators are put back."""

    def __init__(
        self,
        every_steps: int,
        write: Callable[[], str],
        show: Callable[[str, str], None],
        clock: Throughput,
        weights: WeightsContext | None = None,
    ) -> None:
        """
        Args:
            every_steps: optimizer steps; 0: never.
            write: produces a sample.
            show: prints a title and the sample.
            clock: paused meanwhile.
            weights: context in which the model has the weights to sample from (the average, where there is one).
        """
        self.every_steps = every_steps
        self.write = write
        self.show = show
        self.clock = clock
        self.weights = weights or (lambda module: contextlib.nullcontext())

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        due = self.every_steps and step % self.every_steps == 0 and step < trainer.max_steps
        if due and trainer.is_global_zero and not is_sharded(trainer):
            self.show(f"sample at step {step}:", self.sample(module))

    def sample(self, module: pl.LightningModule) -> str:
        """One sample from the current weights."""
        state, training = rng_state(), module.training
        try:
            with self.clock.paused(), self.weights(module):
                module.eval()
                return self.write()
        finally:
            module.train(training)
            set_rng_state(state)


def sample_writer(model: Model, tokenizer: Tokenizer, data: Data, prompt: str | None, max_new_tokens: int, seed: int) -> Callable[[], str]:
    """A function that continues `prompt` (None: the beginning of the held-out text) with the model as it then is.

    Of an adapter with tasks the first one speaks.
    """

    def write() -> str:
        from framework.engines.native import NativeEngine

        holder, task = task_ids(model), None  # type: ignore[arg-type]
        if holder is not None and len(holder):
            before, task = holder.said[0], holder.names[0]
            holder.set(0)
        ids = held_out_prompt(data, task) if prompt is None else Renderer(tokenizer, data)(prompt)
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=seed)
        (completion,) = NativeEngine(model, tokenizer).generate([ids], params)
        if task is not None and holder is not None:
            holder.set(before)
        return f"{tokenizer.decode(ids[1:])}[...]{completion.text}"

    return write
