"""Several processes: shares of the held-out text, what is sharded together, one decision for all, and nothing left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
import yaml
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from components.contracts import IGNORE, Batch, UserError
from framework import distributed
from framework.build import build, build_model, build_optimizer, compose
from framework.datamodule import Share

ROOT = Path(__file__).resolve().parents[2]


def batches(count: int) -> list[Batch]:
    return [Batch(torch.full((1, 2), i), labels=torch.full((1, 2), i), index=i) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("of", [2, 3])
def test_shares_hold_every_label_once_and_are_equally_long(count, of):
    shares = [Share(batches(count), rank, of) for rank in range(of)]
    given = [list(share) for share in shares]
    assert {len(g) for g in given} == {len(s) for s in shares} == {-(-count // of)}
    counted = [int(b.labels[0, 0]) for g in given for b in g if (b.labels != IGNORE).any()]
    assert sorted(counted) == list(range(count))
    assert [list(map(lambda b: b.index, share)) for share in shares] == [[b.index for b in g] for g in given]  # re-iterable


def model_of(*words: str) -> tuple:
    config = compose("train", ["model/size=test", *words])
    model = build_model(config, 300)
    build(config.adapter).apply(model)
    return config, model


@pytest.mark.parametrize("words", [["model=samba"], ["model=phi4mini"], ["model=samba", "adapter=lora"]])
def test_each_layer_is_gathered_by_itself_and_the_rest_at_the_root(words):
    _, model = model_of(*words)
    assert distributed.sharding_units(model) == [f"layers.{i}" for i in range(len(model.layers))]
    distributed.mark_units(model)
    wrapped = [path for path, module in model.named_modules() if distributed.is_unit(module, recurse=False, nonwrapped_numel=0)]
    assert wrapped == distributed.sharding_units(model)
    assert distributed.is_unit(model, recurse=True, nonwrapped_numel=0)


def test_a_parameter_of_layers_that_is_in_none_is_refused():
    _, model = model_of()
    roles = {**model.roles(), "stray.weight": "qkv"}
    model.roles = lambda: roles
    with pytest.raises(ValueError, match=r"stray.weight \(qkv\) is in no layer"):
        distributed.sharding_units(model)


def test_torch_wraps_the_units(tmp_path):
    """torch's own FSDP with the policy of conf/trainer/fsdp.yaml, as far as a CPU goes: what it wraps, not a step."""
    _, model = model_of()
    layers = len(model.layers)
    distributed.mark_units(model)
    node = yaml.safe_load((ROOT / "conf" / "trainer" / "fsdp.yaml").read_text())["strategy"]["auto_wrap_policy"]
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        wrapped = FSDP(model, auto_wrap_policy=build(node), use_orig_params=True, device_id=torch.device("cpu"))
        paths = [path.replace("_fsdp_wrapped_module", "").strip(".") for path, m in wrapped.named_modules() if isinstance(m, FSDP)]
    finally:
        distributed.leave_group()
    assert [path.replace("..", ".") for path in paths] == ["", *(f"layers.{i}" for i in range(layers))]


def test_whole_parameters_are_refused_where_there_are_pieces():
    config, model = model_of("optimizer=adamw")
    distributed.check_sharded(config, build_optimizer(config, model))
    for words, line in [
        (["optimizer=muon"], "optimizer: Muon needs whole matrices, and trainer=fsdp .* use trainer=ddp, .* or optimizer=adamw"),
        (["optimizer=cosmos"], "optimizer: Cosmos needs whole matrices, and trainer=fsdp .* use trainer=ddp"),
        (["optimizer=adamw", "ema.enabled=true"], "ema.enabled: true needs whole parameters"),
        (["optimizer=adamw", "compile.enabled=true"], "compile.enabled: true with trainer=fsdp"),
    ]:
        config, model = model_of(*words)
        with pytest.raises(UserError, match=line):
            distributed.check_sharded(config, build_optimizer(config, model))


def test_own_place_is_given_back(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MASTER_PORT", "7")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before, threads = dict(os.environ), torch.get_num_threads()
    with pytest.raises(RuntimeError), distributed.own_place(2):
        assert os.environ["LOCAL_RANK"] == "0" and os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_ADDR"] == "127.0.0.1"
        os.environ.pop("WORLD_SIZE")  # as Lightning does
        raise RuntimeError
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads


def test_other_ways_to_start_processes_are_refused():
    def trainer(nodes: int = 1, method: str = "popen") -> SimpleNamespace:
        return SimpleNamespace(num_nodes=nodes, strategy=SimpleNamespace(_start_method=method))

    distributed.check_launch(trainer())
    with pytest.raises(UserError, match=r"trainer\.num_nodes: 2; start the processes with torchrun or SLURM"):
        distributed.check_launch(trainer(nodes=2))
    with pytest.raises(UserError, match=r"trainer\.strategy: processes started by spawn"):
        distributed.check_launch(trainer(method="spawn"))


def others(folder: Path, monkeypatch, code: str) -> distributed.Others:
    """One further process that runs `code` instead of training."""
    monkeypatch.setattr(distributed, "CHILD", f"import sys, os, time; sys.stdin.read(); {code}")
    return distributed.Others(1, {}, folder)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("print('error: data.path: gone', file=sys.stderr); sys.exit(2)", "process 1: data.path: gone"),
        ("sys.exit(3)", "process 1 ended with code 3; go on with"),
        ("os.kill(os.getpid(), 9)", f"process 1 was killed by signal {int(signal.SIGKILL)}; is there enough memory"),
    ],
)
def test_a_death_before_the_first_step_is_one_line(tmp_path, monkeypatch, code, line):
    group = others(tmp_path, monkeypatch, code)
    with pytest.raises(UserError, match=line):
        group.wait_until_ready()
    group.stop()


def test_one_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0.2)
    group = others(tmp_path, monkeypatch, "print('ready', flush=True); time.sleep(100)")
    group.wait_until_ready()
    assert group.stop() is None
    assert group.processes[0].returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def agree(rank: int, folder: str) -> None:
    """In each of two processes: sum, mean and maximum of rank + 1; the tensor itself stays."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    own = torch.tensor(rank + 1.0)
    found = [float(distributed.reduced(own, op)) for op in ("sum", "mean", "max")]
    assert found == [3.0, 1.5, 2.0] and float(own) == rank + 1.0
    distributed.leave_group()
    assert not torch.distributed.is_initialized()
    os._exit(0)  # without clearing up, in which a process with threads of gloo may abort


@pytest.mark.slow
def test_reduced_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(agree, (str(tmp_path),), nprocs=2)


def test_reduced_alone_is_the_value():
    value = nn.Parameter(torch.tensor(2.0))
    assert distributed.reduced(value, "mean") is value
