"""Option task=measure: held-out loss of given weights as they are, under another RoPE rule or on other data. Trains nothing."""

from __future__ import annotations

import torch

from components.contracts import UserError
from components.losses.lm import bits_per_byte
from framework.build import read_config
from framework.likelihood import in_words, label_likelihood
from framework.procedure import Context, Procedure, autocast, refuse_unheard


class Measure(Procedure):
    """Measures the data's held-out batches and its further ones (`data.eval_lengths`), as a training run does at its end.

    Metrics: val/loss, val/bits_per_byte where the held-out text has bytes, eval/NAME/loss and eval/NAME/accuracy.

    Raises: UserError for a key that asks for something which would not happen, see ASKS.
    """

    def run(self, context: Context) -> dict[str, float]:
        """Measure and return the metrics."""
        refuse_unheard(read_config(context.run_dir), heard=("data.eval_lengths",))
        metrics: dict[str, float] = {}
        with torch.inference_mode(), autocast(context):
            held_out = label_likelihood(context.model, context.data.val_batches(), context.device)
            if not held_out:
                raise UserError("data: no held-out token counts in the loss, so that there is nothing to measure; see data.loss_on")
            context.progress(f"held-out loss {held_out['loss']:.4f}")
            metrics["val/loss"] = held_out["loss"]
            if context.data.val_bytes:
                metrics["val/bits_per_byte"] = bits_per_byte(held_out["loss"] * held_out["labels"], context.data.val_bytes)
            for name, batches in context.data.evaluations().items():
                found = label_likelihood(context.model, batches, context.device)
                context.progress(f"{name}: {in_words({key: found[key] for key in ('loss', 'accuracy')})}")
                metrics |= {f"eval/{name}/{key}": found[key] for key in ("loss", "accuracy")}
        context.log(metrics, 0)
        return metrics
