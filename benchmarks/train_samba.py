"""Training tokens per second of Samba, with utilisation and peak memory, beside its peers at equal width.

`python -m benchmarks.train_samba --size tiny` (a minute on two cores; small takes about five). Sides: Samba; the same Samba, same
weights, with transformers' Mamba mixer in place of ours (its loop mended, see benchmarks/mamba_block.py: as shipped it is too slow to
train with); and the model of the same width whose mixers are all full attention. Losses and gradients of the first two are compared before
anything is timed. `--device cuda --size 421m --batch 8 --length 4096` trains in bf16 autocast with float32 weights, without the second
side; it has not been run on a GPU yet. Tokens are noise: cost does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    append_row,
    clock_of,
    environment,
    interleaved,
    model_shape,
    peak_memory,
    raise_allocator_thresholds,
    relative_rms,
    reset_peak_memory,
    spread,
    table,
)
from benchmarks.decode import PATTERNS, model_of
from benchmarks.mamba_block import mended, pairs
from benchmarks.roofline import card_found
from components.blocks import Decoder
from components.contracts import Batch
from components.losses.lm import next_token_loss
from components.models.samba import MambaMixer

TOLERANCE = 1e-4  # relative RMS of a gradient, fp32; the mixers alone differ by 2e-6
_SQUARE = {"cpu": 1024, "cuda": 8192}  # side of the matrix product that utilisation is measured against
TrainStep = Callable[[], Tensor]


class TheirMixer(nn.Module):
    """transformers' Mamba mixer with the weights of ours, in the place of ours."""

    def __init__(self, ours: MambaMixer) -> None:
        super().__init__()
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer as StockMixer

        channels, taps = ours.conv_weight.shape
        hidden = ours.in_proj.in_features
        config = MambaConfig(
            hidden_size=hidden,
            state_size=ours.state_size,
            conv_kernel=taps,
            expand=channels // hidden,
            time_step_rank=ours.dt_rank,
            num_hidden_layers=1,
        )
        self.stock = StockMixer(config, layer_idx=0).train()
        with torch.no_grad():
            for theirs, tensor in pairs(self.stock, ours):
                theirs.copy_(tensor.view_as(theirs))

    def forward(self, x: Tensor, document_start: Tensor | None = None, state: None = None) -> Tensor:
        if document_start is not None or state is not None:
            raise ValueError("TheirMixer: offers neither packed documents nor a decode state")
        return mended(self.stock)(x)


def with_their_mixers(model: Decoder) -> Decoder:
    """A copy of `model` that mixes with transformers' Mamba."""
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        if isinstance(block.mixer, MambaMixer):
            block.mixer = TheirMixer(block.mixer)
    return twin


def noise_batch(model: Decoder, rows: int, length: int, device: torch.device) -> Batch:
    ids = torch.randint(model.vocab_size, (rows, length + 1), device=device)
    return Batch(ids[:, :-1], labels=ids[:, 1:], loss_tokens=rows * length)


def loss_of(model: Decoder, batch: Batch, dtype: torch.dtype) -> Tensor:
    assert batch.labels is not None and batch.loss_tokens is not None
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        return next_token_loss(model(batch).hidden, model.head_weight, batch.labels, batch.loss_tokens)


def training_step(model: Decoder, batch: Batch, dtype: torch.dtype) -> TrainStep:
    """A call that makes one step of AdamW on the same batch, and returns the loss before it."""
    # lr 0 keeps the model from learning the one batch by heart, and costs the same.
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch, dtype)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def difference(ours: Decoder, theirs: Decoder, batch: Batch) -> float:
    """Greatest relative RMS between the gradients of the parameters outside the Mamba mixers, and of the losses."""
    losses = [loss_of(model, batch, torch.float32) for model in (ours, theirs)]
    grads: list[dict[str, Tensor]] = []
    for model, loss in zip((ours, theirs), losses):
        names = [name for name, _ in model.named_parameters()]
        grads.append(dict(zip(names, torch.autograd.grad(loss, list(model.parameters())))))
    shared = grads[0].keys() & grads[1].keys()
    return max(relative_rms(losses[0].detach(), losses[1].detach()), *(relative_rms(grads[0][n], grads[1][n]) for n in shared))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of one large matrix product, the best of five."""
    size = _SQUARE[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    clock = clock_of(device)
    a @ a
    return 2.0 * size**3 / min(clock(lambda: a @ a) for _ in range(5))


def training_flops(model: Decoder, length: int) -> float:
    """FLOPs a token of forward and backward, three times the forward's: what is computed again in the backward does not count."""
    return 3.0 * model.forward_flops(length)


def measure(
    models: dict[str, Decoder],
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    limit_seconds: float = 300.0,
) -> dict[str, dict[str, Any]]:
    """Tokens per second, FLOP rate, peak bytes and loss of every model; its share of the product rate, and of the card's peak if listed.

    Peaks are taken one model at a time, with the others' weights in memory: `held_bytes` says how much that is on a GPU.
    """
    first = next(iter(models.values()))
    batch = noise_batch(first, rows, length, device)
    steps = {name: training_step(model, batch, dtype) for name, model in models.items()}
    peaks, losses = {}, {}
    for name, step in steps.items():
        step()  # optimizer state, compiled kernels
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        reset_peak_memory(device)
        losses[name] = float(step())
        peaks[name] = {"peak_bytes": peak_memory(device), "held_bytes": held}
    seconds = interleaved(steps, dict.fromkeys(steps, rounds), warmup=1, clock=clock_of(device), limit_seconds=limit_seconds)
    product, card = product_rate(device, dtype), card_found(device)
    found = {}
    for name, model in models.items():
        rates = [rows * length / s for s in seconds[name]]
        # The twin with the other mixer computes the same function, so that its FLOPs are those of ours.
        flops = training_flops(model if not any(isinstance(b.mixer, TheirMixer) for b in model.blocks) else first, length)
        rate = spread(rates)["median"] * flops
        found[name] = {
            "tokens_per_second": spread(rates),
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops_per_second": rate,
            "share_of_product": rate / product,
            "share_of_peak": None if card is None else rate / card.peak_flops,
            "loss": losses[name],
            **peaks[name],
        }
    return found


def floor_shape(size: str) -> dict[str, int]:
    """The arguments of `roofline.samba_step_ms` for Samba of this size, but the number of parameters."""
    shape = model_shape("samba", size, "hidden_size", "intermediate_size", "state_size", "num_heads", "head_dim", "window", "num_layers")
    channels = model_shape("samba", size, "expand")["expand"] * shape["hidden_size"]
    return {**shape, "channels": channels}


def print_found(found: dict[str, dict[str, Any]]) -> None:
    base = next(iter(found.values()))["tokens_per_second"]["median"]
    lines = []
    for name, r in found.items():
        t = r["tokens_per_second"]
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.0f}"
        share = f"{r['share_of_product']:.1%}" + ("" if r["share_of_peak"] is None else f" ({r['share_of_peak']:.1%} of peak)")
        lines.append(
            [name, f"{r['parameters']:,}", f"{t['median']:,.0f} ({t['min']:,.0f} - {t['max']:,.0f})", f"{base / t['median']:.2f}x",
             f"{r['flops_per_second'] / 1e9:,.0f}", share, peak]
        )  # fmt: skip
    header = ["model", "parameters", "tokens/s", "Samba is faster by", "GFLOP/s", "of a matrix product", "peak MiB"]
    print(table(header, lines))


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print the table, write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="an option of model/size")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--no-save", action="store_true", help="write nothing under benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="size test, short rows, nothing written: does it run?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.size, options.batch, options.length, options.rounds = "test", 2, 24, 2
    raise_allocator_thresholds()
    device = torch.device(options.device)
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, options.dtype)
    samba = model_of(PATTERNS["samba"], options.size, device)
    models = {"samba": samba}
    worst = None
    if device.type == "cpu" and dtype == torch.float32:
        models["samba, transformers' mixer, mended"] = twin = with_their_mixers(samba).train()
        worst = difference(samba.train(), twin, noise_batch(samba, options.batch, min(64, options.length), device))
        if worst > TOLERANCE:
            raise SystemExit(f"losses or gradients differ by {worst:.1e} (relative RMS), allowed is {TOLERANCE:.0e}: nothing was timed")
    models["full attention"] = model_of(PATTERNS["full attention"], options.size, device)
    found = measure(models, options.batch, options.length, dtype, device, options.rounds)
    print(
        f"size {options.size}, {options.batch} rows of {options.length} tokens, {options.dtype}, {torch.get_num_threads()} threads, AdamW"
    )
    print_found(found)
    if worst is not None:
        print(f"greatest relative RMS difference of losses and gradients between the first two: {worst:.1e}")
    if not options.smoke and not options.no_save:
        row = {**environment("transformers"), **vars(options), "difference": worst, "models": found}
        print(f"row appended to {append_row('train_samba', row)}")


if __name__ == "__main__":
    main()
