"""Runs of two processes from the command line, against one process at the same global batch."""

from __future__ import annotations

import csv
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMALL, only_run, run, shakespeare_like, start, state, wait_for_step

from framework.logging import read_rows

TWO = "trainer=ddp_cpu"
RELATIVE = 1e-5
# 30 steps in float32; Muon's iterations too: rounded to bfloat16 they turn the last bit of a gradient into 5e-5 of the loss.
STEPS = ["trainer.precision=32-true", "trainer.max_steps=30", "optimizer.ns_dtype=float32", "logger=none", "samples.every_steps=0"]
OFTEN = ["validate.every_steps=10", "checkpoint.every_steps=10"]


def words(folder: Path, batch: int, *more: str) -> list[str]:
    text = folder / "text.txt"
    if not text.exists():
        shakespeare_like(text, 20)
    return [*SMALL, f"data.path={text}", f"data.batch_size={batch}", *STEPS, *OFTEN, *more]


def weights(folder: Path, step: int = 30) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"step{step:06d}.ckpt", weights_only=True)["state_dict"]


def assert_same_values(first: Path, second: Path, relative: float) -> None:
    """Losses, gradient norms and final weights agree within `relative`; 0 means bit for bit."""
    a, b = read_rows(first), read_rows(second)
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(1, 31))
    for x, y in zip(a, b, strict=True):
        assert x["tokens"] == y["tokens"]
        for key in ("train/loss", "val/loss", "val/bits_per_byte"):
            assert (key in x) == (key in y), (key, x["step"])
            assert key not in x or abs(x[key] - y[key]) <= relative * abs(x[key]), (key, x["step"])
    ours, theirs = weights(first), weights(second)
    for name, w in ours.items():
        assert (w - theirs[name]).norm() <= relative * w.norm(), name


def leftovers(folder: Path) -> list[str]:
    """Command lines of live processes that work on something in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (process / "cwd").readlink().as_posix() and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_text())
        except (OSError, ValueError):
            continue
    return found


def logs_and_folders(folder: Path) -> tuple[list[Path], list[Path]]:
    """Logs that other ranks left, and run directories."""
    return sorted(folder.rglob("rank*.log")), sorted(p.parent for p in folder.rglob("run_state.json"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The run of one process that all others are compared with: batches of 4."""
    folder = tmp_path_factory.mktemp("one")
    done = run(folder, *words(folder, 4))
    assert done.returncode == 0, done.stderr
    return only_run(folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, one_process) -> Path:
    """Two processes with batches of 2 each, on the same text."""
    folder = tmp_path_factory.mktemp("two")
    done = run(folder, *words(one_process.parents[2], 2, TWO))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out bits per byte") == 1  # one of them talks
    assert "2 processes" in done.stdout
    assert not leftovers(folder)
    return only_run(folder)


@pytest.mark.slow
def test_two_processes_equal_one(one_process, two_processes):
    assert_same_values(one_process, two_processes, RELATIVE)


@pytest.mark.slow
def test_matrices_shared_out_equal_one_process(tmp_path, one_process):
    """COSMOS: each of the two processes steps half of the matrices; the checkpoint holds the state of all.

    Rank 2, since a block of x_proj has 3 rows: in more directions than a gradient has, the update is rounding noise of the gradient, up to
    1e-7 / rel_floor = 1e-2 of it, and two halves of a batch round otherwise than the whole.
    """
    runs = []
    for name, batch, more in (("one", 4, ()), ("shared", 2, (TWO,)), ("each_all", 2, (TWO, "optimizer.shard=none"))):
        (tmp_path / name).mkdir()
        done = run(tmp_path / name, *words(one_process.parents[2], batch, "optimizer=cosmos", "optimizer.rank=2", *more))
        assert done.returncode == 0, done.stderr
        runs.append(only_run(tmp_path / name))
    one, shared, each_all = runs
    assert_same_values(shared, each_all, RELATIVE)
    assert_same_values(one, shared, 1e-4)  # 6.7e-6 measured; the two above to the last bit
    states = [torch.load(r / "checkpoints" / "step000030.ckpt", weights_only=True)["optimizer_states"][0]["state"] for r in (one, shared)]
    assert list(states[0]) == list(states[1])
    for ours, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.slow
def test_only_the_first_process_writes(two_processes):
    logs, runs = logs_and_folders(two_processes.parents[2])
    assert logs == [] and runs == [two_processes]
    assert sorted(p.name for p in (two_processes / "checkpoints").iterdir()) == ["step000020.ckpt", "step000030.ckpt"]
    assert state(two_processes)["status"] == "done"
    with open(two_processes / "metrics.csv") as file:
        assert len(list(csv.reader(file))) == 31


@pytest.mark.slow
def test_ddp_inside_a_sweep(tmp_path, one_process, two_processes):
    """Neither sweep nor folders are made again by the second process; job 2 forms a group of its own."""
    shared = words(one_process.parents[2], 2, TWO, "logger=wandb")
    done = run(tmp_path, "-m", *shared, "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    logs, runs = logs_and_folders(tmp_path)
    assert logs == [] and len(runs) == 2 and {r.parent for r in runs} == {tmp_path / "sweep"}
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "multirun").exists()
    assert [state(r)["seed"] for r in runs] == [1, 2]
    assert len({state(r)["wandb_id"] for r in runs}) == 2
    assert [len(list((r / "wandb").glob("offline-run-*"))) for r in runs] == [1, 1]
    assert_same_values(two_processes, runs[0], 0.0)
    assert read_rows(runs[1])[0]["train/loss"] != read_rows(runs[0])[0]["train/loss"]
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_place_among_processes_does_not_leak_into_the_next_job(tmp_path, one_process):
    """A job of two processes, then one of a single process, in one sweep: LOCAL_RANK left behind would make the second wait or lie."""
    text = one_process.parents[2]
    done = run(tmp_path, "-m", *words(text, 4), "trainer=ddp_cpu,cpu", "trainer.precision=32-true", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    _, runs = logs_and_folders(tmp_path)
    assert [read_rows(r)[0]["tokens"] for r in runs] == [512.0, 256.0]
    assert_same_values(one_process, runs[1], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, one_process, two_processes, number):
    """A stop asked of the first process stops both; what goes on from there is the same run to the last bit."""
    shared = words(one_process.parents[2], 2, TWO)
    process = start(tmp_path, *shared)
    wait_for_step(process, tmp_path, 12)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    kept = state(only_run(tmp_path))
    assert kept["status"] == ("interrupted" if number == signal.SIGTERM else "running")
    assert 10 <= kept["step"] < 30
    done = run(tmp_path, *shared, "resume=auto")  # which would name another run once this one is locked
    assert done.returncode == 0, done.stderr
    assert_same_values(two_processes, only_run(tmp_path), 0.0)
    logs, _ = logs_and_folders(tmp_path)
    assert logs == [] and not leftovers(tmp_path)


@pytest.mark.slow
def test_death_of_the_other_process_ends_the_run_with_one_line(tmp_path, one_process):
    process = start(tmp_path, *words(one_process.parents[2], 2, TWO), "trainer.max_steps=2000")
    wait_for_step(process, tmp_path, 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"further_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "process 1 was killed by signal 9" in line and "resume=" in line
    assert process.returncode == 2
    assert state(only_run(tmp_path))["status"] == "failed"


@pytest.mark.slow
def test_not_finite_in_two_processes_is_one_line(tmp_path, one_process):
    done = run(tmp_path, *words(one_process.parents[2], 2, TWO), "optimizer.lr=1e30", "optimizer.adamw_lr=1e30")
    assert done.returncode == 2
    assert sum("is not finite at step" in line for line in done.stderr.splitlines()) == 1
    assert state(only_run(tmp_path))["status"] == "diverged"
    assert logs_and_folders(tmp_path)[0] == []


@pytest.mark.slow
def test_processes_that_torchrun_started(tmp_path, one_process, two_processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = f"import runpy, sys; sys.argv[1:1] = ['--nproc-per-node=2', '--master-addr=127.0.0.1', '--master-port={port}', "
    launcher += f"{str(ROOT / 'train.py')!r}]; runpy.run_module('torch.distributed.run', run_name='__main__')"
    done = run(tmp_path, *words(one_process.parents[2], 2, TWO), f"hydra.run.dir={tmp_path / 'run'}", code=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out bits per byte") == 1
    assert_same_values(two_processes, tmp_path / "run", 0.0)
    assert logs_and_folders(tmp_path) == ([], [tmp_path / "run"])


def test_fsdp_without_a_gpu_is_refused_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(tmp_path, "model/size=test", "trainer=fsdp")
    assert done.returncode == 2
    assert done.stderr == "error: trainer.accelerator: 'gpu' but no CUDA device was found; use trainer=cpu\n"


@pytest.mark.slow
def test_experts_that_no_row_of_a_step_uses_stand_still(tmp_path):
    """Rows of one mode each: in most steps some expert has no gradient, in one process or in both, and no decay or momentum may move it."""
    modes = ["copy", "sort", "reverse", "rotate"]
    rows = ["model/size=test", "data=transforms", f"data.tasks=[{','.join(modes)}]", "optimizer=adamw", "optimizer.weight_decay=0.5"]
    experts = "+adapter.experts={a:{r:2,alpha:4,dropout:0},b:{r:2,alpha:4,dropout:0},c:{r:2,alpha:4,dropout:0}}"
    rules = "+adapter.rules={copy:null,sort:a,reverse:b,rotate:c}"
    steps = [word for word in STEPS if not word.startswith("optimizer.")]
    runs = []
    for name, more in (("one", ["data.batch_size=2"]), ("two", ["data.batch_size=1", TWO])):
        (tmp_path / name).mkdir()
        done = run(tmp_path / name, *rows, "adapter=moe_lora", "adapter.router=modality", experts, rules, *steps, *OFTEN, *more)
        assert done.returncode == 0, done.stderr
        runs.append(only_run(tmp_path / name))
    assert_same_values(*runs, 1e-4)
