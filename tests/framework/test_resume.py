"""A run that died and was resumed equals one that never died: every logged number and the final state, bit for bit."""

import json
import os
import signal

import pytest
import torch

from components.contracts import UserError
from framework.checkpoint import FOLDER, checkpoints, newest_intact
from framework.runs import newest_run, read_state
from framework.runtime import Interrupted
from framework.tasks.lm import LanguageModelTask
from tests.framework.training import Killed, assert_same_run, config, final_state, history, same, train

FAST = ("after a checkpoint with validation", "inside a window", "epoch of 4 batches, checkpoint at its last", "average")
DROPOUT = ("adapter=lora", "adapter.dropout=0.2")  # draws from the global generator


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """The curve takes longer to draw than these runs to train; test_training_outputs.py looks at it."""
    monkeypatch.setattr("framework.train.loss_curve", lambda *args: None)


def die_at(monkeypatch, batch, action=None):
    """Die (or act) when training reaches micro-batch `batch`, counted from 0 over the whole run."""
    original = LanguageModelTask.training_step

    def step(self, b, batch_idx):
        if batch_idx == batch:
            if action is None:
                raise Killed
            action()
        return original(self, b, batch_idx)

    monkeypatch.setattr(LanguageModelTask, "training_step", step)


CASES = {
    "between checkpoints": ((), 6, 4000),
    "right after a checkpoint": ((), 4, 4000),
    "after a checkpoint with validation": (("validate.every_steps=4",), 5, 4000),
    "after a best checkpoint outside the interval": (("validate.every_steps=5",), 7, 4000),
    "last step": ((), 11, 4000),
    "dropout": (DROPOUT, 6, 4000),
    "inside a window": (("trainer.accumulate_grad_batches=3", *DROPOUT), 3 * 6 + 1, 4000),
    "epoch of 4 batches, checkpoint at its last": ((), 6, 4 * 128 + 40),
    "epoch of 5 batches": ((), 6, 5 * 128 + 40),
    "epoch that does not fill its last window": (("trainer.accumulate_grad_batches=2",), 2 * 9 + 1, 5 * 128 + 40),
    "workers": (("data.num_workers=2", *DROPOUT), 6, 5 * 128 + 40),
    "fp32": (("trainer.precision=32-true",), 6, 4000),
    "average": (("ema.enabled=true", "ema.decay=0.9", "validate.every_steps=4"), 6, 4000),
    "muon": (("optimizer=muon", "trainer.precision=32-true"), 6, 4000),
    "compared with samples drawn": (("samples.every_steps=3", "samples.max_new_tokens=4", *DROPOUT), 6, 4000),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, case):
    overrides, batch, size = CASES[case]
    cfg = config(tmp_path, *overrides, train_bytes=size)
    train(cfg, tmp_path / "straight")
    with monkeypatch.context() as patch:
        die_at(patch, batch)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "killed")
    assert read_state(tmp_path / "killed")["status"] == "failed"
    train(cfg, tmp_path / "killed", resuming=True)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert read_state(tmp_path / "killed")["status"] == "done"


@pytest.mark.slow
def test_samples_do_not_change_the_run(tmp_path):
    train(config(tmp_path, *DROPOUT), tmp_path / "without")
    train(config(tmp_path, "samples.every_steps=2", "samples.max_new_tokens=4", *DROPOUT), tmp_path / "with")
    assert_same_run(tmp_path / "without", tmp_path / "with")


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_starts_over_in_the_same_run(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    train(cfg, tmp_path / "straight")
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "killed")
    created = read_state(tmp_path / "killed")["created"]
    train(cfg, tmp_path / "killed", resuming=True)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert read_state(tmp_path / "killed")["created"] == created


def test_killed_while_validating_validates_again(tmp_path, monkeypatch):
    cfg = config(tmp_path, "validate.every_steps=4")
    train(cfg, tmp_path / "straight")
    original = LanguageModelTask.validation_step
    with monkeypatch.context() as patch:

        def step(self, batch, batch_idx):
            if self.trainer.global_step == 8:
                raise Killed
            return original(self, batch, batch_idx)

        patch.setattr(LanguageModelTask, "validation_step", step)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "killed")
    assert newest_intact(tmp_path / "killed").name == "step000004.ckpt"
    train(cfg, tmp_path / "killed", resuming=True)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_killed_after_the_last_checkpoint_still_ends(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    train(cfg, tmp_path / "straight")
    with monkeypatch.context() as patch:

        def die(*args):
            raise Killed

        patch.setattr("framework.train.write_summary", die)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "killed")
    metrics = train(cfg, tmp_path / "killed", resuming=True)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert metrics["val/loss"] == history(tmp_path / "straight")[-1]["val/loss"]
    assert json.loads((tmp_path / "killed" / "metrics.json").read_text())["tokens"] == 12 * 128


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_skipped_with_one_line(tmp_path, monkeypatch, capsys):
    cfg = config(tmp_path)
    train(cfg, tmp_path / "straight")
    with monkeypatch.context() as patch:
        die_at(patch, 10)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "killed")
    newest = tmp_path / "killed" / FOLDER / "step000008.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    capsys.readouterr()
    train(cfg, tmp_path / "killed", resuming=True)
    assert capsys.readouterr().err.count("step000008.ckpt: damaged or truncated, skipped") == 1
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_inside_a_window_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch, number):
    cfg = config(tmp_path, "trainer.accumulate_grad_batches=3", "checkpoint.every_steps=100")
    train(cfg, tmp_path / "straight")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        die_at(patch, 3 * 4 + 1, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=f"resume={tmp_path / 'stopped'}") as stop:
            train(cfg, tmp_path / "stopped")
    assert stop.value.signal == number
    assert signal.getsignal(number) == before
    assert [p.name for p in checkpoints(tmp_path / "stopped")] == ["step000005.ckpt"]
    assert read_state(tmp_path / "stopped")["status"] == "interrupted"
    assert newest_run(tmp_path, unfinished=True) == tmp_path / "stopped"
    train(cfg, tmp_path / "stopped", resuming=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_nan_stops_before_the_weights_and_saves_the_state_of_the_step_before(tmp_path, monkeypatch, accumulate):
    import framework.tasks.lm as lm

    cfg = config(tmp_path, f"trainer.accumulate_grad_batches={accumulate}", *DROPOUT)
    train(cfg, tmp_path / "straight")
    bad, calls, original = 6 * accumulate, [], lm.next_token_loss
    with monkeypatch.context() as patch:

        def loss(*args):
            calls.append(1)
            return original(*args) * (float("nan") if len(calls) > bad else 1.0)

        patch.setattr(lm, "next_token_loss", loss)
        expected = "batch " + ", ".join(str(bad + i) for i in range(accumulate))
        with pytest.raises(UserError, match=f"loss is not finite at step 7, {expected}; the state before it is in .*step000006.ckpt"):
            train(cfg, tmp_path / "nan")
    assert read_state(tmp_path / "nan")["status"] == "diverged"
    saved = final_state(tmp_path / "nan", 6)
    assert all(torch.isfinite(w).all() for w in saved["state_dict"].values() if w.is_floating_point())
    train(cfg, tmp_path / "nan", resuming=True)
    assert_same_run(tmp_path / "straight", tmp_path / "nan")


@pytest.mark.slow
def test_changed_settings_count_after_resume_force_only(tmp_path, monkeypatch):
    cfg = config(tmp_path, "optimizer=adamw", "schedule=constant", "optimizer.lr=0.001")
    train(cfg, tmp_path / "run")
    for force, rate in ((False, 0.001), (True, 0.0001)):
        longer = config(
            tmp_path, "optimizer=adamw", "schedule=constant", "optimizer.lr=0.0001", "trainer.max_steps=16", f"resume_force={force}"
        )
        (tmp_path / "run" / FOLDER / "step000016.ckpt").unlink(missing_ok=True)
        train(longer, tmp_path / "run", resuming=True)
        assert history(tmp_path / "run")[-1]["opt/lr/adamw"] == pytest.approx(rate)
        assert history(tmp_path / "run")[-1]["step"] == 16


def test_other_architecture_is_refused_by_name_and_shape(tmp_path):
    train(config(tmp_path), tmp_path / "run")
    with pytest.raises(UserError, match=r"resume: .*step000012.ckpt' is of another architecture: .* is \(.*\) there, \(.*\) here"):
        train(config(tmp_path, "model.intermediate_size=64"), tmp_path / "run", resuming=True)


def test_same_ignores_nothing():
    assert same({"a": [torch.ones(2)]}, {"a": [torch.ones(2)]})
    assert not same({"a": [torch.ones(2)]}, {"a": [torch.ones(2) + 1e-7]})
