"""The replay of a real run is bit-identical, and the comparison is strict enough to see a single bit."""

import shutil

import pytest
import torch

from components.contracts import UserError
from framework import verify
from framework.checkpoint import FOLDER, checkpoints
from framework.runs import locked, write_state
from framework.verify import choose, compare_checkpoints, compare_rows, equal
from tests.framework.training import config, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """12 steps with dropout and an average of the weights; checkpoints at 8 and 12."""
    folder, patch = tmp_path_factory.mktemp("verify"), pytest.MonkeyPatch()
    patch.setattr("framework.train.loss_curve", lambda *args: None)
    words = ("adapter=lora", "adapter.dropout=0.2", "ema.enabled=true", "ema.decay=0.9", "validate.every_steps=100")
    train(config(folder, *words), folder / "run")
    patch.undo()
    return folder / "run"


def one_thread(monkeypatch):
    """The replay is a process of its own: with as many threads as the run in this process had."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


def test_replay_of_a_real_run_is_bit_identical(run, monkeypatch, capfd):
    one_thread(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert verify.main([str(run)]) == 0
    out = capfd.readouterr().out
    assert "steps 9 to 12" in out and "bit-identical: 4 rows" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before  # only read


@pytest.mark.slow
def test_replay_from_the_beginning(run, monkeypatch, capfd):
    one_thread(monkeypatch)
    assert verify.main([str(run), "--start", "0", "--end", "8"]) == 0
    assert "bit-identical: 8 rows" in capfd.readouterr().out


@pytest.mark.slow
def test_one_bit_of_one_weight_is_seen(run, monkeypatch, tmp_path, capfd):
    one_thread(monkeypatch)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = checkpoints(copy)[0]
    checkpoint = torch.load(file, weights_only=True)
    name = next(n for n in checkpoint["state_dict"] if "lora_B" in n)
    checkpoint["state_dict"][name].view(-1)[0] += 1e-3
    torch.save(checkpoint, file)
    assert verify.main([str(copy)]) == 1
    out = capfd.readouterr().out
    assert "different: weights:" in out and "different: train/loss:" in out and "NOT bit-identical" in out


def test_rows_are_compared_by_step_and_without_the_clock():
    before = [
        {"step": 1.0, "train/loss": 9.0},
        {"step": 2.0, "train/loss": 1.0, "seconds": 1.0},
        {"step": 3.0, "train/loss": 0.5, "perf/mfu": 0.1},
    ]
    after = [{"step": 2.0, "train/loss": 1.0, "seconds": 7.0}, {"step": 3.0, "train/loss": 0.5}]
    assert compare_rows(before, after, 1, 3) == (2, [])
    after[1]["train/loss"] = 0.5 + 2**-53
    assert compare_rows(before, after, 1, 3)[1] == ["train/loss: 0.5 in the run, 0.5000000000000001 in the replay, first at step 3"]
    assert compare_rows(before, after[:1], 1, 3) == (1, ["metrics.csv: step 3 is only in the run"])


def test_every_part_of_a_checkpoint_counts():
    def checkpoint():
        return {
            "state_dict": {"model.w": torch.zeros(2)}, "optimizer_states": [{"m": torch.ones(1)}], "lr_schedulers": [{"last_epoch": 3}],
            "rng": {"torch": torch.arange(3)}, "callbacks": {"Ema": {"average": {"w": torch.ones(1)}}},
        }  # fmt: skip

    assert compare_checkpoints(checkpoint(), checkpoint()) == []
    for change, line in (
        (lambda c: c["state_dict"]["model.w"].__setitem__(0, 0.25), "weights: 1 of 1 tensors differ, by at most 0.25; the first is w"),
        (lambda c: c["optimizer_states"][0].update(m=torch.zeros(1)), "optimizer: the state differs"),
        (lambda c: c["lr_schedulers"][0].update(last_epoch=4), "schedule: the state differs"),
        (lambda c: c["rng"].update(torch=torch.arange(4)), "generators: the state differs"),
        (lambda c: c["callbacks"]["Ema"]["average"]["w"].mul_(2), "averaged weights: the state differs"),
    ):
        changed = checkpoint()
        change(changed)
        assert compare_checkpoints(checkpoint(), changed) == [line]


def test_equality_is_bitwise():
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert equal(nan, nan.clone()) and equal(float("nan"), float("nan"))
    assert not equal(zero, -zero) and not equal(zero, zero.double()) and not equal(1, 1.0) and not equal([1], [1, 2])


def test_which_checkpoints(run):
    assert [path and path.name for path in choose(run, None, None)] == ["step000008.ckpt", "step000012.ckpt"]
    assert [path and path.name for path in choose(run, 0, 8)] == [None, "step000008.ckpt"]


def test_what_cannot_be_replayed_is_one_line(run, tmp_path, capsys):
    single, empty, busy = tmp_path / "single", tmp_path / "empty", tmp_path / "busy"
    for copy in (single, empty, busy):
        shutil.copytree(run, copy)
    checkpoints(single)[0].unlink()
    for path in checkpoints(empty):
        path.write_bytes(b"damaged")
    for words, message in (
        ([str(tmp_path / "nowhere")], "is not a directory"), ([str(tmp_path)], "is not a run"),
        ([str(single)], "no readable checkpoint before step 12; replay from the beginning with --start 0"),
        ([str(empty)], "has no readable checkpoint"),
        ([str(run), "--start", "3"], "3 is not a step with a readable checkpoint; 0, 8, 12"),
        ([str(run), "--start", "12"], "not before the step"),
    ):  # fmt: skip
        assert verify.main(words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    with locked(busy), pytest.raises(UserError, match="another process is training it"):
        verify.verify(busy)


@pytest.mark.slow
def test_what_the_command_refuses_is_passed_on(run, tmp_path, capfd):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    write_state(copy, data={"train": "another text", "val": "x", "epoch_rows": 1})
    assert verify.main([str(copy)]) == 2
    err = capfd.readouterr().err
    assert "the replay stopped with code 2" in err and "the data changed" in err and (copy / FOLDER).is_dir()
