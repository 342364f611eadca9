"""One Mamba block, forward and backward: ours against transformers' MambaMixer, as shipped and with its time loop mended.

`python -m benchmarks.mamba_block` (two minutes, most of it the shipped one; --stock-rounds 0 leaves that out). All sides hold the same
weights and get the same input and output gradient; their outputs and gradients are compared before anything is timed. The shipped mixer
indexes a (B, D, L, N) tensor inside its loop over time, so that autograd fills a tensor of that size at every step and the backward grows
with the square of L; the mended one differs by `unbind` before the loop and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import append_row, environment, interleaved, model_shape, raise_allocator_thresholds, relative_rms, spread, table
from components.models.samba import MambaMixer

SHAPE = model_shape("samba", "small", "hidden_size", "state_size", "conv_kernel", "expand", "dt_rank")
TOLERANCE = 1e-4  # relative RMS; fp32 sums of up to L*D = 5e5 terms in different orders, measured below 2e-6


def stock_mixer(ours: MambaMixer) -> nn.Module:
    """transformers' mixer with the weights of `ours`."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as StockMixer

    config = MambaConfig(
        hidden_size=SHAPE["hidden_size"],
        state_size=SHAPE["state_size"],
        conv_kernel=SHAPE["conv_kernel"],
        expand=SHAPE["expand"],
        time_step_rank=ours.dt_rank,
        num_hidden_layers=1,
    )
    stock = StockMixer(config, layer_idx=0)
    with torch.no_grad():
        for theirs, tensor in pairs(stock, ours):
            theirs.copy_(tensor.view_as(theirs))
    return stock


def pairs(stock: nn.Module, ours: MambaMixer) -> list[tuple[Tensor, Tensor]]:
    """(theirs, ours) of every parameter."""
    return [
        (stock.in_proj.weight, ours.in_proj.weight),
        (stock.conv1d.weight, ours.conv_weight),
        (stock.conv1d.bias, ours.conv_bias),
        (stock.x_proj.weight, ours.x_proj.weight),
        (stock.dt_proj.weight, ours.dt_proj.weight),
        (stock.dt_proj.bias, ours.dt_bias),
        (stock.A_log, ours.A_log),
        (stock.D, ours.D),
        (stock.out_proj.weight, ours.out_proj.weight),
    ]


def unbound_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    **unused: object,
) -> Tensor:
    """The shipped scan's arithmetic with `unbind` in front of the loop. hidden_states, dt, z: (B, D, L); A: (D, N); B, C: (B, N, L)."""
    dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    decays = torch.exp(A[None, :, None] * dt[..., None]).unbind(2)  # L of (B, D, N)
    inputs = (dt[..., None] * B.transpose(1, 2)[:, None] * hidden_states[..., None]).unbind(2)
    state = torch.zeros_like(inputs[0])
    outputs = []
    for decay, new, read in zip(decays, inputs, C.unbind(2)):
        state = decay * state + new
        outputs.append(torch.matmul(state, read.unsqueeze(2)).squeeze(2))  # (B, D)
    y = torch.stack(outputs, dim=2) + hidden_states * D[:, None]
    return y * F.silu(z)


def mended(stock: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward of `stock` that scans with `unbound_scan`."""
    from transformers.models.mamba import modeling_mamba

    def forward(x: Tensor) -> Tensor:
        shipped = modeling_mamba.mamba_selective_scan
        modeling_mamba.mamba_selective_scan = unbound_scan
        try:
            return stock(x)
        finally:
            modeling_mamba.mamba_selective_scan = shipped

    return forward


def training_step(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """A call that runs forward and backward and leaves gradients on `x` and on the module's parameters."""

    def run() -> Tensor:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = forward(x)
        y.backward(dy)
        return y.detach()

    return run


def largest_difference(
    ours: MambaMixer, stock: nn.Module, our_run: Callable[[], Tensor], their_run: Callable[[], Tensor], x: Tensor
) -> float:
    """Greatest relative RMS difference among the output and all gradients."""
    y, dx = our_run(), x.grad.clone()
    grads = [tensor.grad.clone() for _, tensor in pairs(stock, ours)]
    their_y = their_run()
    errors = [relative_rms(y, their_y), relative_rms(dx, x.grad)]
    errors += [relative_rms(grad, theirs.grad) for grad, (theirs, _) in zip(grads, pairs(stock, ours))]
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=15, help="measured runs of ours and of the mended mixer")
    parser.add_argument("--stock-rounds", type=int, default=2, help="measured runs of the shipped mixer, about 20 s each; 0 leaves it out")
    options = parser.parse_args()
    raise_allocator_thresholds()
    torch.manual_seed(0)
    ours = MambaMixer(**SHAPE)
    stock = stock_mixer(ours).train()
    x = torch.randn(options.batch, options.length, SHAPE["hidden_size"], requires_grad=True)
    dy = torch.randn_like(x)
    sides = {
        "ours": training_step(ours, ours, x, dy),
        "transformers, mended": training_step(stock, mended(stock), x, dy),
        "transformers": training_step(stock, stock, x, dy),
    }
    difference = largest_difference(ours, stock, sides["ours"], sides["transformers, mended"], x)
    if difference > TOLERANCE:
        raise SystemExit(f"outputs or gradients differ by {difference:.1e} (relative RMS), allowed is {TOLERANCE:.0e}: nothing was timed")
    rounds = {"ours": options.rounds, "transformers, mended": options.rounds, "transformers": options.stock_rounds}
    sides = {name: run for name, run in sides.items() if rounds[name]}
    seconds = interleaved(sides, rounds)
    if "transformers" in sides:
        difference = max(difference, largest_difference(ours, stock, sides["ours"], sides["transformers"], x))
    results = {name: spread(values) for name, values in seconds.items()}
    base = results["ours"]["median"]
    lines = [
        [name, f"{r['median'] * 1e3:.1f}", f"{r['min'] * 1e3:.1f} - {r['max'] * 1e3:.1f}", str(r["runs"]), f"{r['median'] / base:.2f}x"]
        for name, r in results.items()
    ]
    print(table(["mixer", "median ms", "range ms", "runs", "time against ours"], lines))
    print(f"greatest relative RMS difference of output and gradients: {difference:.1e}")
    shape = {**SHAPE, "dt_rank": ours.dt_rank, "batch": options.batch, "length": options.length, "dtype": "float32"}
    row = {**environment("transformers"), "shape": shape, "seconds": results, "difference": difference}
    print(f"row appended to {append_row('mamba_block', row)}")


if __name__ == "__main__":
    main()
