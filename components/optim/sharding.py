"""Where the matrices are when several processes train one model, and what the processes tell each other.

`HybridOptimizer` sees from its parameters which of two cases it has.

Whole parameters (DDP): each matrix parameter belongs to one process, which alone keeps its state and steps it, and tells the others the new
weights (ZeRO, stage 1). What is no matrix is stepped everywhere alike. The processes are those of the default group.

Row shards (FSDP2): each process holds some rows of every matrix. No trainer option does this; from Python:

    from torch.distributed.fsdp import fully_shard
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = Cosmos(named_parameters(model), **options)  # after fully_shard, which makes new parameters

Checkpoints of the second case are those of torch.distributed.checkpoint.state_dict (`get_optimizer_state_dict` and its counterpart), which
write whole tensors that a run of any number of processes reads. Run with gloo on CPUs; neither case has been run with NCCL on GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from components.contracts import UserError
from components.optim.cosmos_update import Settings, WholeMatrices
from kernels.newton_schulz import GRAM_STEPS, gram_factor

SHARD = ("auto", "none")
Shape = tuple[int, ...]
ABSENT, FINITE, BAD, SPARSE = 0, 1, 2, 3  # a gradient, as the processes tell each other


class RowShards(WholeMatrices):
    """Rows of one matrix, shared out in order to the processes of a group; every method is to be called in all of them.

    group: of the processes. counts: rows at each, in the order of the group; 0 is allowed.
    Sums over rows travel, (n, r) and (r, r); the rows themselves only where a matrix is wider than high.
    """

    def __init__(self, group: dist.ProcessGroup, counts: Sequence[int]) -> None:
        self.group, self.counts = group, list(counts)

    def rows(self, local: int) -> int:
        return sum(self.counts)

    def sum(self, partial: Tensor) -> Tensor:
        return _reduced(partial, dist.ReduceOp.SUM, self.group)

    def max(self, partial: Tensor) -> Tensor:
        return _reduced(partial, dist.ReduceOp.MAX, self.group)

    def whole(self, part: Tensor) -> Tensor:
        """All rows (b, m, n), from those that are here."""
        padded = part.new_zeros(part.shape[0], max(self.counts), part.shape[-1])  # messages of a group are of one size
        padded[:, : part.shape[1]] = part
        pieces = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(pieces, padded, group=self.group)
        return torch.cat([piece[:, :count] for piece, count in zip(pieces, self.counts, strict=True)], dim=1)

    def own(self, whole: Tensor) -> Tensor:
        """The rows of (b, m, n) that are here."""
        return whole.split(self.counts, dim=1)[dist.get_rank(self.group)]

    def newton_schulz(self, x: Tensor, size: Tensor, settings: Settings) -> Tensor:
        """x: (b, rows here, n), size: norm of the whole. By the n x n Gram matrix where that is no larger than the matrix."""
        if self.rows(x.shape[1]) < x.shape[2]:
            return self.own(super().newton_schulz(self.whole(x), size, settings))
        x = x / size.clamp(min=torch.finfo(x.dtype).tiny)
        done, left = x.to(_gram_dtype(x, settings.ns_dtype)), settings.ns_steps
        while left > 0:
            some = min(left, GRAM_STEPS)
            done = done @ gram_factor(self.sum(done.mT @ done), some, settings.ns_coefficients)
            left -= some
        return done.to(x.dtype)


def _reduced(partial: Tensor, op: Any, group: dist.ProcessGroup) -> Tensor:
    total = partial.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op, group=group)
    return total


def _gram_dtype(x: Tensor, ns_dtype: torch.dtype | None) -> torch.dtype:
    """A Gram matrix needs products in full float32 (bfloat16 loses orthogonality): where the user allowed TF32, float64 it is."""
    backend = torch.backends.cuda if x.device.type == "cuda" else torch.backends.mkldnn
    full = backend.matmul.fp32_precision in ("ieee", "none")
    return x.dtype if full and ns_dtype != torch.float64 else torch.float64


def is_shard(tensor: Tensor) -> bool:
    """Is it a DTensor? Asked without importing it, which costs half a second."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is here: under no_grad the very tensor that a DTensor holds, else the tensor itself."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def check_layout(kind: str, name: str, p: Tensor, by_rows: bool) -> None:
    """Raise UserError for a matrix whose shards this optimizer cannot step. by_rows: can the method of this kind step shards at all?"""
    if not is_shard(p):
        return
    if not by_rows:
        raise UserError(
            f"optimizer: {kind} needs whole matrices, and {name} is in pieces; use trainer=ddp or optimizer=cosmos, muon or adamw"
        )
    placements = p.placements  # type: ignore[attr-defined]
    if len(placements) != 1 or repr(placements[0]) != "Shard(dim=0)" or p.ndim > 3:
        raise UserError(
            f"optimizer: {name} of shape {tuple(p.shape)} is laid out as {tuple(placements)}; shard matrices by rows, stacks (E, m, n) by "
            "matrices, over a mesh of one dimension: fully_shard with no other parallelism, or optimizer=adamw"
        )
    here, (_, counts) = local(p).shape[0], row_counts(p)
    if here != counts[dist.get_rank(_group(p))]:
        raise UserError(f"optimizer: {name} has {here} rows here where fully_shard puts {counts}; use fully_shard, or optimizer=adamw")


def _group(p: Tensor) -> dist.ProcessGroup:
    return p.device_mesh.get_group()  # type: ignore[attr-defined, no-any-return]


def row_counts(p: Tensor) -> tuple[list[int], list[int]]:
    """First row, and number of rows, at each process, of a parameter sharded on its first dimension (as torch.chunk does it)."""
    rows, ranks = p.shape[0], dist.get_world_size(_group(p))
    size = -(-rows // ranks)
    starts = [min(k * size, rows) for k in range(ranks)]
    return starts, [min(size, rows - start) for start in starts]


def row_blocks(p: Tensor, splits: Sequence[int]) -> list[tuple[slice, RowShards]]:
    """For each fused block of a sharded matrix (one if it has none): its rows among those that are here, and where the others are."""
    group, (starts, counts) = _group(p), row_counts(p)
    here, first, blocks = dist.get_rank(group), 0, []
    for rows in splits or [p.shape[0]]:
        begins = [min(max(first - start, 0), count) for start, count in zip(starts, counts, strict=True)]
        ends = [min(max(first + rows - start, 0), count) for start, count in zip(starts, counts, strict=True)]
        lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
        blocks.append((slice(begins[here], ends[here]), RowShards(group, lengths)))
        first += rows
    return blocks


def state_zeros(p: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Zeros of this whole shape for the state of a parameter: sharded as it is where they have as many dimensions, else whole."""
    if not is_shard(p) or len(shape) != p.ndim:
        return torch.zeros(shape, dtype=dtype, device=p.device)
    return _sharded(p, torch.zeros((local(p).shape[0], *shape[1:]), dtype=dtype, device=p.device), shape)


def state_like(p: Tensor, value: Tensor) -> Tensor:
    """A loaded piece of state in the layout of `state_zeros`: of a whole one the rows that are here."""
    if not is_shard(p) or is_shard(value) or value.ndim != p.ndim or p.placements[0].is_replicate():  # type: ignore[attr-defined]
        return value
    starts, counts = row_counts(p)
    here = dist.get_rank(_group(p))
    return _sharded(p, value[starts[here] : starts[here] + counts[here]].clone(), tuple(value.shape))


def _sharded(p: Tensor, part: Tensor, shape: Shape) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride)  # type: ignore[attr-defined]


def process_groups(params: Sequence[Tensor], shard: str) -> list[dist.ProcessGroup | None]:
    """Groups whose members step these parameters together; None is the default group, and an empty list means alone."""
    meshes = {id(p.device_mesh): p.device_mesh for p in params if is_shard(p)}  # type: ignore[attr-defined]
    if meshes:
        return [group for mesh in meshes.values() for group in mesh.get_all_groups()]
    return [None] if sharing_processes(params, shard) > 1 else []


def sharing_processes(params: Sequence[Tensor], shard: str) -> int:
    """Processes that whole matrices are shared out to; 1 where each steps all."""
    if shard == "none" or not (dist.is_available() and dist.is_initialized()) or any(map(is_shard, params)):
        return 1
    return dist.get_world_size()


def agree(states: Tensor, groups: Sequence[dist.ProcessGroup | None]) -> Tensor:
    """What all processes say of each gradient: the worst that one of them says. states: (parameters,) of the four.

    Raises RuntimeError, in all of them, for a gradient that only some have: their weights would part.
    """
    both = torch.cat([states, -states])
    for group in groups:
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    most, least = both.chunk(2)
    if groups and bool(((most != ABSENT) & (least == -ABSENT)).any()):
        raise RuntimeError("optimizer: some processes have a gradient that others lack; see trainer.strategy.find_unused_parameters")
    return most


def matrix_cost(shape: Shape, splits: Sequence[int]) -> int:
    """What a step of a parameter costs, in units of s^2 l summed over its matrices: s the shorter side, l the longer."""
    n = shape[-1]
    heights = list(splits) or [shape[-2]] * prod(shape[:-2])
    return sum(min(m, n) ** 2 * max(m, n) for m in heights)


def share_out(costs: Sequence[int], ranks: int) -> list[int]:
    """The process of each item: the dearest first, each to the one that has least. The same list in every process.

    >>> share_out([5, 9, 4, 1], 2)
    [1, 0, 1, 0]
    """
    owners, loads = [0] * len(costs), [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += costs[i]
    return owners


def broadcast_weights(params: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Give every process the values that each parameter has at its owner; one message for each owner, dtype and device."""
    messages: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p, owner in zip(params, owners, strict=True):
        messages[owner, p.dtype, p.device].append(p)
    here, flying = dist.get_rank(), []
    for (owner, dtype, device), members in messages.items():
        if owner == here:
            flat = torch.cat([p.reshape(-1) for p in members])
        else:
            flat = torch.empty(sum(p.numel() for p in members), dtype=dtype, device=device)
        flying.append((dist.broadcast(flat.view(torch.uint8), owner, async_op=True), owner, flat, members))
    for work, owner, flat, members in flying:
        work.wait()
        if owner != here:
            pieces = flat.split([p.numel() for p in members])
            torch._foreach_copy_(members, [piece.view(p.shape) for piece, p in zip(pieces, members, strict=True)])


def gather_states(own: Mapping[int, Mapping[str, Tensor]], device: torch.device) -> dict[int, dict[str, Tensor]]:
    """The states that the processes keep, by parameter, all of them in every process. own: what is kept here.

    Those of others arrive one tensor at a time and are moved to the CPU, so that a device holds one of them more, not all.
    """
    tables: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tables, {i: {key: (tuple(v.shape), v.dtype) for key, v in state.items()} for i, state in own.items()})
    whole: dict[int, dict[str, Tensor]] = {}
    for owner, table in enumerate(tables):
        mine = owner == dist.get_rank()
        for index, entries in table.items():
            whole[index] = {}
            for key, (shape, dtype) in entries.items():
                value = own[index][key] if mine else torch.empty(shape, dtype=dtype, device=device)
                message = value.to(device).contiguous()
                dist.broadcast(message.reshape(-1).view(torch.uint8), owner)
                whole[index][key] = value if mine else message.cpu()
    return whole
