"""Kill -9 at any moment, then resume: the same losses and the same weights, bit for bit."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from commands import SMALL, history, only_run, run, shakespeare_like, start, state, wait_for_step

LONG = [
    *SMALL,
    "trainer.max_steps=60",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_steps=20",
    "validate.every_steps=15",
    "samples.every_steps=30",
]

KILLED_IN_WRITE = """
import os, signal, sys
import train
replace, count = os.replace, 0
def dying_replace(source, target):
    global count
    count += str(target).endswith('.ckpt')
    if count == 2:
        with open(source, 'r+b') as file:
            file.truncate(os.path.getsize(source) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)
os.replace = dying_replace
sys.exit(train.main())
"""


def final_weights(run_dir):
    newest = max((run_dir / "checkpoints").glob("step*.ckpt"))
    return newest.name, torch.load(newest, weights_only=True, map_location="cpu")["state_dict"]


def assert_same_run(one, other):
    assert history(one) == history(other)
    (name, weights), (other_name, other_weights) = final_weights(one), final_weights(other)
    assert name == other_name and weights.keys() == other_weights.keys()
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), key


def finish(folder):
    done = run(folder, f"resume={only_run(folder)}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    text = shakespeare_like(folder / "text.txt")
    done = run(folder, *LONG, f"data.path={text}")
    assert done.returncode == 0, done.stderr[-2000:]
    return text, only_run(folder)


STEPS = sorted(random.Random(20261123).sample(range(2, 59), 4))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_kill_at_a_random_step_then_resume_is_bit_identical(uninterrupted, tmp_path, step):
    text, whole = uninterrupted
    process = start(tmp_path, *LONG, f"data.path={text}")
    wait_for_step(process, tmp_path, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    wandb_id = state(only_run(tmp_path))["wandb_id"]
    finish(tmp_path)
    assert_same_run(whole, only_run(tmp_path))
    assert state(only_run(tmp_path))["wandb_id"] == wandb_id and state(only_run(tmp_path))["status"] == "done"


@pytest.mark.slow
def test_kill_during_a_checkpoint_write_then_resume_is_bit_identical(uninterrupted, tmp_path):
    text, whole = uninterrupted
    killed = run(tmp_path, *LONG, f"data.path={text}", code=KILLED_IN_WRITE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    finish(tmp_path)
    assert_same_run(whole, only_run(tmp_path))


@pytest.mark.slow
def test_resume_auto_and_resume_of_a_finished_run(uninterrupted):
    _, whole = uninterrupted
    folder = whole.parents[2]
    done = run(folder, f"resume={whole}")
    assert done.returncode == 0 and "finished" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_says_how_to_resume_and_continues_exactly(uninterrupted, tmp_path, number, code):
    text, whole = uninterrupted
    process = start(tmp_path, *LONG, f"data.path={text}")
    wait_for_step(process, tmp_path, 33)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err[-2000:]
    assert "resume=" in out + err and "Traceback" not in err
    assert state(only_run(tmp_path))["status"] == "interrupted"
    done = run(tmp_path, "resume=auto")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(whole, only_run(tmp_path))
