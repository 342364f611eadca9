"""Is a LoRA cheaper inside the base's product than behind it? Forward and backward of one wrapped projection, in four forms.

`python -m benchmarks.lora_epilogue` (three minutes on one core at size small). Shapes are the four projections of phi4mini, 8 rows of 512
tokens; W is frozen, the gradients are those of x, A and B. Forms, which agree with float64 before anything is timed:

* behind: y = x W^T, then y + (s x A^T) B^T, as `LoRALayer` does;
* addmm: the same with the sum inside the second product (`torch.addmm`), so that y is read and written once less;
* in place: one autograd function that adds into y in the forward, and into the gradient of x in the backward, without a temporary;
* concatenated: one product, [x | s x A^T] [W | B]^T, with both sides joined anew each step.

With dropout the adapter reads another x than the base, whose gradients then meet in one more pass.

Written before it was run: a form becomes the default where it takes at most 0.95 of the first one's time, summed over the projections, with
the shipped dropout and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.adapters import prepared, step_parser
from benchmarks.common import (
    Clock,
    append_row,
    environment,
    interleaved,
    model_shape,
    relative_rms,
    spread,
    table,
    verdict,
)

BEHIND, ADDMM, IN_PLACE, CONCATENATED = "behind", "addmm", "in place", "concatenated"
BOUND = 0.95  # of BEHIND's time
TOLERANCE = 1e-5  # relative RMS of fp32 outputs and gradients against float64
SCALE = 2.0  # alpha / r
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def behind(x: Tensor, dropped: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x (N, in) as the base reads it, dropped as the adapter does, w (out, in), a (r, in), b (out, r). Returns (N, out)."""
    return F.linear(x, w) + F.linear(SCALE * F.linear(dropped, a), b)


def addmm(x: Tensor, dropped: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See `behind`."""
    return torch.addmm(F.linear(x, w), F.linear(dropped, a), b.T, alpha=SCALE)


def concatenated(x: Tensor, dropped: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See `behind`."""
    return F.linear(torch.cat([x, SCALE * F.linear(dropped, a)], 1), torch.cat([w, b], 1))


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        z = dropped @ a.T  # (N, r)
        ctx.save_for_backward(dropped, w, a, b, z)
        ctx.same = x is dropped
        return F.linear(x, w).addmm_(z, b.T, alpha=SCALE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, w, a, b, z = ctx.saved_tensors
        dz = (dy @ b).mul_(SCALE)  # (N, r)
        db, da = (dy.T @ z).mul_(SCALE), dz.T @ dropped
        dx = dy @ w
        return (dx.addmm_(dz, a), None, None, da, db) if ctx.same else (dx, dz @ a, None, da, db)


def in_place(x: Tensor, dropped: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See `behind`."""
    return _InPlace.apply(x, dropped, w, a, b)  # type: ignore[no-any-return]


FORMS: dict[str, Form] = {BEHIND: behind, ADDMM: addmm, IN_PLACE: in_place, CONCATENATED: concatenated}


def projections(size: str) -> dict[str, tuple[int, int]]:
    """(in, out) of the four projections of phi4mini."""
    keys = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    width, inner, heads, kv_heads, head_dim = model_shape("phi4mini", size, *keys).values()
    return {
        "qkv": (width, (heads + 2 * kv_heads) * head_dim),
        "o": (heads * head_dim, width),
        "gate_up": (width, 2 * inner),
        "down": (inner, width),
    }


def inputs_of(tokens: int, shape: tuple[int, int], rank: int, device: torch.device) -> list[Tensor]:
    """x, w, a, b and the gradient of y."""
    inside, out = shape
    sizes = ((tokens, inside), (out, inside), (rank, inside), (out, rank), (tokens, out))
    return [torch.randn(*dims, device=device) / dims[1] ** 0.5 for dims in sizes]


def step(form: Form, inputs: list[Tensor], dropout: float) -> tuple[Tensor, ...]:
    """y, and the gradients of x, A and B."""
    x, w, a, b, dy = inputs
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    dropped = F.dropout(x, dropout) if dropout else x
    y = form(x, dropped, w, a, b)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def difference(shapes: dict[str, tuple[int, int]], rank: int) -> float:
    """Greatest relative RMS of a form's output or gradient against float64, on 64 tokens, with the same dropout and without."""
    worst = 0.0
    for shape in shapes.values():
        inputs = inputs_of(64, shape, rank, torch.device("cpu"))
        for dropout in (0.0, 0.5):
            wide = [tensor.detach().double() for tensor in inputs]
            for form in FORMS.values():
                torch.manual_seed(1)
                found = step(form, inputs, dropout)
                torch.manual_seed(1)
                expected = step(behind, wide, dropout)
                worst = max(worst, *(relative_rms(one, other.detach()) for one, other in zip(found, expected)))
    return worst


def measure(options: argparse.Namespace, shapes: dict[str, tuple[int, int]], dropout: float, device: torch.device, clock: Clock) -> Any:
    """{projection: {form: seconds}}."""
    found = {}
    for name, shape in shapes.items():
        torch.manual_seed(0)
        inputs = inputs_of(options.batch * options.length, shape, options.rank, device)
        runs = {form: (lambda call=call, inputs=inputs: step(call, inputs, dropout)) for form, call in FORMS.items()}
        seconds = interleaved(runs, dict.fromkeys(runs, options.rounds), clock=clock)
        found[name] = {form: spread(values) for form, values in seconds.items()}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Compare, measure, print tables and ratios, write the row."""
    parser = step_parser(__doc__, rounds=15)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.05])
    options, device, clock = prepared(parser, arguments)
    shapes = projections(options.size)
    worst = difference(shapes, options.rank)
    if worst > TOLERANCE:
        raise SystemExit(f"a form and float64 differ by {worst:.1e} (relative RMS), allowed is {TOLERANCE:.0e}: nothing was timed")
    print(f"phi4mini {options.size}, {options.batch} rows of {options.length} tokens, r = {options.rank}, fp32, forward and backward")
    results: dict[str, Any] = {}
    for dropout in options.dropouts:
        found = measure(options, shapes, dropout, device, clock)
        total = {form: sum(sides[form]["median"] for sides in found.values()) for form in FORMS}
        ratios = {form: total[form] / total[BEHIND] for form in FORMS}
        lines = [
            [name, *(f"{1e3 * sides[form]['median']:.1f}" for form in FORMS)]
            for name, sides in {**found, "all": {form: {"median": seconds} for form, seconds in total.items()}}.items()
        ]
        print(table([f"dropout {dropout}, ms", *FORMS], lines))
        for form in list(FORMS)[1:]:
            print(f"{form} / {BEHIND}: {ratios[form]:.3f}; {verdict(ratios[form], BOUND, at_least=False)}")
        results[str(dropout)] = {"seconds": found, "ratios": ratios}
    print(f"all forms differ from float64 by at most {worst:.1e} (relative RMS)")
    if not options.no_save:
        row = {**vars(options), **environment(), "dtype": "float32", "bound": BOUND, "difference": worst, "dropout": results}
        print(f"row appended to {append_row('lora_epilogue', row)}")


if __name__ == "__main__":
    main()
