"""Checkpoint files under misfortune: killed while writing, disk full, damaged, of another model."""

import errno

import pytest
import torch
from torch import nn

from components.contracts import UserError
from framework import checkpoint as ck
from framework.runs import write_state
from tests.framework.training import Killed


def save(run, step, value=1.0):
    path = run / ck.FOLDER / ck.checkpoint_name(step)
    ck.AtomicCheckpointIO().save_checkpoint({"state_dict": {"model.weight": torch.full((64, 64), value)}, "global_step": step}, path)
    return path


def break_save(monkeypatch, error, after_bytes=2000):
    """torch.save writes some bytes and then fails with `error`."""

    def broken(obj, file):
        file.write(b"x" * after_bytes)
        file.flush()
        raise error

    monkeypatch.setattr(ck.torch, "save", broken)


def test_killed_while_writing_leaves_nothing_that_resume_would_take(tmp_path, monkeypatch):
    first = save(tmp_path, 10)
    break_save(monkeypatch, Killed())
    with pytest.raises(Killed):
        save(tmp_path, 20)
    assert len(list(first.parent.iterdir())) == 2  # the half-written file is there, as after kill -9
    assert ck.checkpoints(tmp_path) == [first]
    assert ck.newest_intact(tmp_path) == first


def test_killed_while_overwriting_keeps_the_old_content(tmp_path, monkeypatch):
    path = save(tmp_path, 10, value=1.0)
    break_save(monkeypatch, Killed())
    with pytest.raises(Killed):
        save(tmp_path, 10, value=2.0)
    assert ck.read_checkpoint(path)["state_dict"]["model.weight"].unique().tolist() == [1.0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, number):
    first = save(tmp_path, 10)
    break_save(monkeypatch, OSError(number, "full"))
    with pytest.raises(
        UserError, match=r"step000020.ckpt: no space left on device; free some, then resume \(earlier checkpoints are intact\)"
    ):
        save(tmp_path, 20)
    assert list(first.parent.iterdir()) == [first]


def test_what_torch_itself_raises_on_a_full_device_is_recognised(tmp_path):
    with pytest.raises((OSError, RuntimeError)) as caught, open("/dev/full", "wb") as file:
        torch.save({"weight": torch.ones(1 << 16)}, file)
    assert ck.is_out_of_space(caught.value, tmp_path)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    break_save(monkeypatch, OSError(errno.EIO, "broken disk"))
    with pytest.raises(OSError, match="broken disk"):
        save(tmp_path, 20)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text"])
def test_damaged_files_are_passed_over_and_refused_by_name(tmp_path, capsys, damage):
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 255
    second.write_bytes({"truncated": bytes(data[:-100]), "empty": b"", "flipped": bytes(data), "text": b"not a checkpoint"}[damage])
    assert ck.newest_intact(tmp_path) == first
    assert capsys.readouterr().err == f"{second}: damaged or truncated, skipped\n"
    if damage != "flipped":  # torch does not look at the checksums; newest_intact does
        with pytest.raises(UserError, match=r"step000020.ckpt' cannot be read: it is truncated, damaged or not a checkpoint"):
            ck.read_checkpoint(second)


def test_no_checkpoint_at_all_says_what_to_do(tmp_path):
    assert ck.newest_intact(tmp_path) is None
    with pytest.raises(UserError, match="has no readable checkpoint; train it further"):
        ck.newest_checkpoint(tmp_path)


def test_only_our_names_count(tmp_path):
    path = save(tmp_path, 10)
    for name in ("last.ckpt", "step10.ckpt", ".step000011.ckpt.tmp", "step000012.ckpt.bak", "epoch=0-step=7.ckpt"):
        (path.parent / name).write_bytes(path.read_bytes())
    assert ck.checkpoints(tmp_path) == [path]
    assert "=" not in ck.checkpoint_name(7)
    assert ck.checkpoint_step(tmp_path / ck.checkpoint_name(12345678)) == 12345678


def test_best_is_read_from_the_state_and_falls_back_to_the_newest(tmp_path):
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    assert ck.best_checkpoint(tmp_path) == second
    write_state(tmp_path, best_checkpoint=first.name)
    assert ck.best_checkpoint(tmp_path) == first
    first.unlink()
    assert ck.best_checkpoint(tmp_path) == second


def linear(inputs, outputs):
    layer = nn.Linear(inputs, outputs)
    return {"state_dict": {f"model.{n}": w.detach().clone() for n, w in layer.named_parameters()}, "global_step": 7}


def test_weights_load_strictly(tmp_path):
    path = tmp_path / "a.ckpt"
    kept = linear(3, 2)
    torch.save(kept, path)
    model = nn.Linear(3, 2)
    assert ck.load_weights(model, path) == 7
    assert torch.equal(model.weight, kept["state_dict"]["model.weight"])
    with pytest.raises(UserError, match=r"of another architecture: weight is \(2, 3\) there, \(2, 4\) here$"):
        ck.load_weights(nn.Linear(4, 2), path)
    with pytest.raises(UserError, match=r"bias is only there$"):
        ck.load_weights(nn.Linear(3, 2, bias=False), path)
    with pytest.raises(UserError, match=r"; and 3 more$"):
        ck.load_weights(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), path)


def test_the_average_is_what_others_load(tmp_path):
    checkpoint = linear(3, 2)
    checkpoint["callbacks"] = {"Ema": {"average": {"weight": torch.zeros(2, 3)}, "updates": 5}}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    model = nn.Linear(3, 2)
    ck.load_weights(model, tmp_path / "a.ckpt")
    assert not model.weight.any()
    assert torch.equal(model.bias, checkpoint["state_dict"]["model.bias"])


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w').close()",))

    torch.save({"state_dict": Evil(), "global_step": 0}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        ck.read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()
