"""What the processes of test_sharding.py do: each scenario is a function of (rank, ranks, folder) that asserts."""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from components.contracts import NamedParameter, UserError
from components.optim.cosmos import Cosmos
from components.optim.groups import named_parameters
from components.optim.muon import Muon
from components.optim.soap import Soap
from tests.components.optim.helpers import COSMOS, MUON, SOAP

FULL = StateDictOptions(full_state_dict=True)
OPTIMIZERS = {
    "cosmos": lambda model, **more: Cosmos(named_parameters(model), **{**COSMOS, "rank": 3, "ns_dtype": "float32", **more}),
    "muon": lambda model, **more: Muon(named_parameters(model), **{**MUON, "ns_dtype": "float32", **more}),
    "soap": lambda model, **more: Soap(named_parameters(model), **{**SOAP, "precondition_frequency": 3, **more}),
}


SHAPES = {"tall": (23, 8), "wide": (7, 20), "square": (9, 9), "fused": (13, 8), "low": (2, 8), "stack": (5, 6, 4), "norm": (8,)}
ROLES = {"tall": "gate_up", "wide": "down", "square": "o", "fused": "qkv", "low": "x_proj", "stack": "in_proj", "norm": "norm"}


class Matrices(nn.Module):
    """One of each: tall, wide, square, fused with blocks that no even sharding respects, few rows, a stack, a vector.

    No two matrices of different parameters have one shape: what is in one product does not depend on who owns what, nor do bits.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))

    def roles(self) -> dict[str, str]:
        return ROLES

    def fused_splits(self) -> dict[str, list[int]]:
        return {"fused": [6, 4, 3]}


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same in every process: a decaying spectrum that drifts, as real ones have."""
    found = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        fixed, fresh = (torch.Generator().manual_seed(seed) for seed in (i, 1000 + 100 * i + step))
        base = torch.randn(shape, generator=fixed, dtype=torch.float64)
        decay = 0.6 ** torch.arange(shape[-1], dtype=torch.float64)
        found[name] = ((base + 0.5 * torch.randn(shape, generator=fresh, dtype=torch.float64)) * decay).to(dtype)
    return found


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with those gradients, sharded where the parameters are."""
    for step in steps:
        for name, grad in gradients(step, next(model.parameters()).dtype).items():
            p = getattr(model, name)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if hasattr(p, "placements") else grad
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def relative(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(((whole(p) - whole(q)).norm() / whole(q).norm()).item() for p, q in pairs)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    locals_ = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.untyped_storage().nbytes() for t in locals_)


def shared_out(kind: str, rank: int, ranks: int, folder: Path) -> None:
    """Equal to one process, the same in all processes, and each matrix' state at one of them."""
    ours, alone = Matrices(), Matrices()
    shared, single = OPTIMIZERS[kind](ours), OPTIMIZERS[kind](alone, shard="none")
    advance(ours, shared, range(20))
    advance(alone, single, range(20))
    assert_equal(ours, alone)
    for p in ours.parameters():
        others = [torch.empty_like(p) for _ in range(ranks)]
        dist.all_gather(others, p.detach())
        assert all(torch.equal(other, p) for other in others)
    keeps = torch.tensor([float(p in shared.state) for p in ours.parameters()])
    dist.all_reduce(keeps)
    assert keeps.tolist() == [1.0] * 6 + [ranks]  # the vector's is everywhere
    total = torch.tensor(float(held_bytes(shared)))
    dist.all_reduce(total)
    matrices, rest = (sum(single.state_bytes(g) for g in single.param_groups if (g["kind"] == "adamw") == vectors) for vectors in (0, 1))
    assert total == matrices + ranks * rest and held_bytes(shared) < 0.8 * held_bytes(single)


def zero_cosmos(rank: int, ranks: int, folder: Path) -> None:
    shared_out("cosmos", rank, ranks, folder)


def zero_muon(rank: int, ranks: int, folder: Path) -> None:
    shared_out("muon", rank, ranks, folder)


def zero_soap(rank: int, ranks: int, folder: Path) -> None:
    shared_out("soap", rank, ranks, folder)


def zero_narrow_weights(rank: int, ranks: int, folder: Path) -> None:
    """bfloat16 parameters: what travels is the rounded weight, and the float32 copy stays with its owner."""
    ours, alone = Matrices(torch.bfloat16), Matrices(torch.bfloat16)
    shared, single = (OPTIMIZERS["cosmos"](m, shard=s, master_weights=True) for m, s in ((ours, "auto"), (alone, "none")))
    advance(ours, shared, range(5))
    advance(alone, single, range(5))
    assert relative(ours, alone) < 2**-8  # one rounding of a bfloat16 may fall otherwise
    assert all(("master" in shared.state[p]) for p in ours.parameters() if p in shared.state)


def zero_checkpoint(rank: int, ranks: int, folder: Path) -> None:
    """A whole state in every process, which one process and many continue from to the last bit."""
    straight = Matrices()
    optimizer = OPTIMIZERS["cosmos"](straight)
    advance(straight, optimizer, range(4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(straight.state_dict())
    assert list(saved["state"]) == list(range(7))
    everywhere = [torch.cat([v.flatten().double() for s in saved["state"].values() for v in s.values()])]
    gathered = [torch.empty_like(everywhere[0]) for _ in range(ranks)]
    dist.all_gather(gathered, everywhere[0])
    assert all(torch.equal(other, everywhere[0]) for other in gathered)
    if rank == 0:
        torch.save({"model": weights, "optimizer": saved}, folder / f"zero{ranks}.ckpt")
    advance(straight, optimizer, range(4, 7))
    for shard in ("auto", "none"):
        again = Matrices()
        again.load_state_dict(weights)
        second = OPTIMIZERS["cosmos"](again, shard=shard)
        second.load_state_dict(copy.deepcopy(saved))
        assert len(second.state) == (7 if shard == "none" else len(optimizer.state))
        advance(again, second, range(4, 7))
        assert_equal(again, straight)


def zero_decides_together(rank: int, ranks: int, folder: Path) -> None:
    """One process alone sees a NaN, then lacks a gradient: all skip, all raise."""
    model = Matrices()
    optimizer = OPTIMIZERS["cosmos"](model)
    advance(model, optimizer, range(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, grad in gradients(2).items():
        getattr(model, name).grad = grad
    if rank == ranks - 1:
        model.tall.grad[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("gradient of tall;" in str(w.message) for w in caught)
    assert torch.equal(model.tall, before["tall"]) and not torch.equal(model.wide, before["wide"])
    optimizer.nonfinite = "raise"
    raises(FloatingPointError, "gradient of tall; nothing was changed", optimizer.step)
    model.tall.grad = None if rank == 0 else gradients(2)["tall"]
    raises(RuntimeError, "others lack", optimizer.step)
    model.tall.grad = None
    optimizer.step()  # absent everywhere: it waits


def raises(kind: type[Exception], words: str, action, *arguments, **more) -> None:
    try:
        action(*arguments, **more)
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"no {kind.__name__}")


def row_sharded(kind: str, dtype: torch.dtype, tolerance: float, steps: int, **more) -> None:
    """fully_shard: weights equal to those of one process, and no process holds more than its share."""
    ours, alone = Matrices(dtype), Matrices(dtype)
    fully_shard(ours)
    shared, single = OPTIMIZERS[kind](ours, **more), OPTIMIZERS[kind](alone, shard="none", **more)
    advance(ours, shared, range(steps))
    advance(alone, single, range(steps))
    assert relative(ours, alone) <= tolerance, relative(ours, alone)
    start = Matrices(dtype)
    assert all(not torch.equal(p, q) for p, q in zip(alone.parameters(), start.parameters(), strict=True))
    ranks = dist.get_world_size()
    whole_bytes, here = held_bytes(single), held_bytes(shared)
    kept = sum(t.untyped_storage().nbytes() for s in shared.state.values() for k, t in s.items() if not hasattr(t, "to_local"))
    assert here - kept < 1.4 * (whole_bytes - kept) / ranks, (here, kept, whole_bytes)  # 1.4: rows do not divide evenly
    sizes = [sum(shared.state_bytes(g) for g in shared.param_groups), sum(single.state_bytes(g) for g in single.param_groups)]
    assert sizes[0] == sizes[1] == whole_bytes  # the formula is of the whole


def rows_cosmos(rank: int, ranks: int, folder: Path) -> None:
    """Relative differences found with 2 and 3 processes: 2.4e-15 in float64, 4.1e-7 in float32."""
    row_sharded("cosmos", torch.float64, 1e-12, 6, ns_dtype="float64", nesterov=False, ns_steps=7)  # more than one Gram matrix serves
    row_sharded("cosmos", torch.float32, 1e-6, 20)


def rows_muon(rank: int, ranks: int, folder: Path) -> None:
    """Every process orthogonalises what one process would."""
    row_sharded("muon", torch.float32, 0.0, 20)


def rows_not_finite(rank: int, ranks: int, folder: Path) -> None:
    """The NaN is in one process' rows; all leave the matrix alone."""
    model = Matrices()
    fully_shard(model)
    optimizer = OPTIMIZERS["cosmos"](model)
    advance(model, optimizer, range(2))
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    for name, grad in gradients(2).items():
        grad = grad.clone()
        if name == "tall":
            grad[0, 0] = float("inf")
        p = getattr(model, name)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("gradient of tall;" in str(w.message) for w in caught)
    assert torch.equal(whole(model.tall), before["tall"]) and not torch.equal(whole(model.low), before["low"])


def rows_checkpoint(rank: int, ranks: int, folder: Path) -> None:
    """torch's state-dict tools: whole tensors out, shards back in; also a whole state straight into load_state_dict."""
    straight, alone = Matrices(), Matrices()
    fully_shard(straight)
    optimizer, single = OPTIMIZERS["cosmos"](straight), OPTIMIZERS["cosmos"](alone, shard="none")
    advance(straight, optimizer, range(4))
    advance(alone, single, range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(straight, optimizer, options=FULL))  # U and S in it are those of the optimizer
    weights = {name: whole(p).clone() for name, p in straight.named_parameters()}
    for index, name in enumerate(n for g in single.param_groups for n in g["parameter_names"]):
        theirs = single.state_dict()["state"][index]
        assert {k: v.shape for k, v in saved["state"][name].items()} == {k: v.shape for k, v in theirs.items()}
        for key, value in theirs.items():
            assert (saved["state"][name][key] - value).norm() <= 1e-3 * value.norm(), (name, key)
    if rank == 0:
        torch.save({"model": weights, "optimizer": saved}, folder / f"rows{ranks}.ckpt")
    advance(straight, optimizer, range(4, 7))
    again = restored(weights, saved)
    advance(*again, range(4, 7))
    assert_equal(again[0], straight)
    plain = OPTIMIZERS["cosmos"](into := sharded(weights))
    plain.load_state_dict({**single.state_dict(), "state": {
        i: saved["state"][n] for i, n in enumerate(n for g in single.param_groups for n in g["parameter_names"])
    }})  # fmt: skip
    advance(into, plain, range(4, 7))
    assert_equal(into, straight)


def sharded(weights: dict[str, Tensor]) -> Matrices:
    model = Matrices()
    model.load_state_dict(weights)
    fully_shard(model)
    return model


def restored(weights: dict[str, Tensor], saved: dict) -> tuple[Matrices, torch.optim.Optimizer]:
    """A sharded model and its optimizer as torch's tools restore it."""
    model = sharded(weights)
    optimizer = OPTIMIZERS["cosmos"](model)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved), options=FULL)
    return model, optimizer


def rows_really_trained(rank: int, ranks: int, folder: Path) -> None:
    """Forward and backward of fully_shard, different data in each process, against one process with all of it."""
    from tests.components.optim.helpers import TinyModel

    ours, alone = TinyModel(), TinyModel()
    fully_shard(ours)
    options = {**COSMOS, "rank": 3, "ns_dtype": "float32"}
    optimizers = [Cosmos(named_parameters(ours), **options), Cosmos(named_parameters(alone), **{**options, "shard": "none"})]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(10, (2 * ranks, 6), generator=generator)
        for model, rows in ((ours, ids[2 * rank : 2 * rank + 2]), (alone, ids)):
            model.zero_grad()
            nn.functional.cross_entropy(model(rows).flatten(0, 1), rows.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert relative(ours, alone) < 1e-5, relative(ours, alone)


def refusals(rank: int, ranks: int, folder: Path) -> None:
    model = Matrices()
    fully_shard(model)
    raises(UserError, "optimizer: soap needs whole matrices, and tall is in pieces; use trainer=ddp", OPTIMIZERS["soap"], model)
    mesh = init_device_mesh("cpu", (ranks,))
    columns = Matrices()
    columns.wide = nn.Parameter(distribute_tensor(columns.wide.detach(), mesh, [Shard(1)]))
    raises(UserError, "wide of shape (7, 20) is laid out as (Shard(dim=1),)", OPTIMIZERS["cosmos"], columns)
    deep = Matrices()
    grid = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("replicas", "shards"))
    fully_shard(deep, mesh=grid)
    raises(UserError, "over a mesh of one dimension", OPTIMIZERS["cosmos"], deep)
    for original in (True, False):
        flat = FullyShardedDataParallel(Matrices(), device_id=torch.device("cpu"), use_orig_params=original)
        items = [NamedParameter(name, p, "o") for name, p in flat.named_parameters()]
        raises(UserError, "is a flat shard of FSDP1", Cosmos, items, **COSMOS)


def leave() -> None:
    """End the process group together: one that leaves while another still talks to it takes that one down."""
    dist.barrier()
    dist.destroy_process_group()


def end() -> None:
    """End the process at once, results are in files: clearing up an interpreter with threads of gloo in it aborted once (SIGABRT)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def number_of_processes_changes(rank: int, ranks: int, folder: Path) -> None:
    """State that went with the other processes is missed, not silently made anew. Last: it ends the group."""
    model = Matrices()
    optimizer = OPTIMIZERS["cosmos"](model)
    advance(model, optimizer, range(2))
    leave()
    raises(RuntimeError, "processes shared its state, now there are 1", optimizer.state_dict)


SCENARIOS = [
    zero_cosmos, zero_muon, zero_soap, zero_narrow_weights, zero_checkpoint, zero_decides_together, rows_cosmos, rows_muon, rows_not_finite,
    rows_checkpoint, rows_really_trained, refusals, number_of_processes_changes,
]  # fmt: skip


def go_on(rank: int, ranks: int, folder: str) -> None:
    """Three more steps from zero.ckpt and rows.ckpt, which another number of processes wrote; the weights go to *_done.ckpt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{folder}/store_again")
    zero, rows = (torch.load(Path(folder, f"{name}.ckpt"), weights_only=True) for name in ("zero", "rows"))
    model = Matrices()
    model.load_state_dict(zero["model"])
    optimizer = OPTIMIZERS["cosmos"](model)
    optimizer.load_state_dict(zero["optimizer"])
    advance(model, optimizer, range(7, 10))
    cut, cut_optimizer = restored(rows["model"], rows["optimizer"])
    advance(cut, cut_optimizer, range(7, 10))
    whole_rows = {name: whole(p) for name, p in cut.named_parameters()}
    if rank == 0:
        torch.save(model.state_dict(), Path(folder, "zero_done.ckpt"))
        torch.save(whole_rows, Path(folder, "rows_done.ckpt"))
    leave()
    end()


def run(rank: int, ranks: int, folder: str) -> None:
    """All scenarios in one of the processes; what failed goes to a file, since one start of the processes serves all tests."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{folder}/store")
    failures = {}
    for scenario in SCENARIOS:
        try:
            scenario(rank, ranks, Path(folder))
        except Exception:
            failures[scenario.__name__] = traceback.format_exc()
    Path(folder, f"failures{rank}.json").write_text(json.dumps(failures))
    end()
