"""What a finished run leaves behind and says; what a run starts from."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from components.contracts import UserError
from framework import runtime
from framework.checkpoint import FOLDER, checkpoints
from framework.estimate import trial
from framework.logging import read_rows
from framework.plots import smoothed
from framework.runs import read_state
from tests.framework.training import BATCH_TOKENS, config, final_state, history, same, train

PROMISED = (
    "val/loss", "val/bits_per_byte", "baseline/order0_bits_per_byte", "baseline/order2_bits_per_byte", "baseline/xz_bits_per_byte",
    "perf/tokens_per_second", "tokens", "seconds", "seed",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder and what it printed."""
    import contextlib
    import io

    folder, out = tmp_path_factory.mktemp("finished"), io.StringIO()
    cfg = config(folder, "validate.every_steps=3", "validate.at_start=true", "checkpoint.keep_last=1", "checkpoint.every_steps=2")
    with contextlib.redirect_stdout(out):
        metrics = train(cfg, folder / "run")
    return folder / "run", metrics, out.getvalue()


def test_promised_files_and_numbers(finished):
    run, metrics, _ = finished
    saved = json.loads((run / "metrics.json").read_text())
    assert saved == metrics
    assert all(isinstance(saved[key], (int, float)) for key in PROMISED)
    assert saved["tokens"] == 12 * BATCH_TOKENS and saved["seed"] == 1
    assert 0 < saved["perf/mfu"] < 1
    assert saved["perf/flops_per_token"] > 6 * 50_000  # at least six a matmul parameter
    assert read_state(run)["status"] == "done" and read_state(run)["step"] == 12
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG" and (run / "loss.png").stat().st_size > 10_000
    saved_config = OmegaConf.load(run / "config.yaml")
    assert saved_config.model.vocab_size == 320
    assert "# versions:" in (run / "config.yaml").read_text()
    assert (run / "tokenizer" / "tokenizer.json").is_file()


def test_one_row_a_step_holds_training_and_validation(finished):
    run, metrics, _ = finished
    rows = read_rows(run)
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 3, 6, 9, 12]
    assert rows[0]["val/bits_per_byte"] > rows[12]["val/bits_per_byte"] == metrics["val/bits_per_byte"]
    assert [row["tokens"] for row in rows] == [BATCH_TOKENS * step for step in range(13)]
    assert rows[1]["opt/lr/adamw"] > 0


def test_retention_keeps_last_and_best(finished):
    run, _, _ = finished
    scores = {row["step"]: row["val/loss"] for row in read_rows(run) if "val/loss" in row and row["step"]}
    best = min(scores, key=scores.get)
    assert {p.name for p in checkpoints(run)} == {"step000012.ckpt", f"step{int(best):06d}.ckpt"}
    assert read_state(run)["best_checkpoint"] == f"step{int(best):06d}.ckpt"
    assert not list((run / FOLDER).glob(".*"))


def test_lines_say_cost_result_and_what_next(finished):
    run, metrics, out = finished
    first, last = out.splitlines()[0], out.splitlines()[-2:]
    assert "79,056 parameters (79,056 trainable)" in first and f"{12 * BATCH_TOKENS:,} in this run" in first
    assert "GiB" in first and "from one timed step" in first
    assert f"held-out bits per byte {metrics['val/bits_per_byte']:.4f}" in out and "xz" in out and "sample:\n" in out
    assert last[0].startswith(f"next: python generate.py ckpt={run}") and f"python train.py ckpt={run}" in last[1]


def test_two_runs_of_a_seed_are_equal_and_of_two_seeds_differ(finished, tmp_path):
    for seed in (1, 2):
        train(config(tmp_path, "validate.every_steps=3", "validate.at_start=true", f"seed={seed}"), tmp_path / f"run{seed}")
    assert history(tmp_path / "run1") == history(finished[0])
    assert history(tmp_path / "run2") != history(finished[0])


def test_weights_of_another_run_are_the_start(finished, tmp_path):
    run, _, _ = finished
    cfg = config(tmp_path, f"ckpt={run}", "optimizer=adamw", "optimizer.lr=0", "model.vocab_size=320")
    train(cfg, tmp_path / "tuned")
    assert same(final_state(tmp_path / "tuned")["state_dict"], final_state(run)["state_dict"])


def test_cut_validation_estimates_bits_per_byte_of_the_whole(tmp_path):
    base = ("optimizer.lr=0", "data.batch_size=1", "trainer.max_steps=1")
    whole = train(config(tmp_path, *base), tmp_path / "whole")
    cut = train(config(tmp_path, *base, "+trainer.limit_val_batches=5"), tmp_path / "cut")
    assert cut["val/loss"] != whole["val/loss"]
    ratio = whole["val/bits_per_byte"] / whole["val/loss"]
    assert cut["val/bits_per_byte"] == pytest.approx(ratio * cut["val/loss"], rel=1e-9)


def test_window_longer_than_the_data_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"trainer.accumulate_grad_batches: 100 is more than the \d+ batch"):
        train(config(tmp_path, "trainer.accumulate_grad_batches=100"), tmp_path / "run")


def test_trial_leaves_no_trace(tmp_path):
    torch.manual_seed(3)
    model = torch.nn.Module()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 4)
            self.dropout = torch.nn.Dropout(0.5)

        @property
        def head_weight(self):
            return self.embedding.weight

        def forward(self, batch):
            from components.contracts import ModelOutput

            return ModelOutput(self.dropout(self.embedding(batch.input_ids)))

    model, state = Model(), torch.get_rng_state()
    before = model.embedding.weight.detach().clone()
    assert trial(model, 11, rows=2, seq_len=5, precision="bf16-mixed") > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.embedding.weight, before) and model.embedding.weight.grad is None


def test_smoothing_of_a_constant_is_the_constant():
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([]) == []


def test_probe_is_plausible_and_named():
    peak, source = runtime.peak_flops(torch.device("cpu"), "32-true")
    assert 1e8 < peak < 1e15
    assert source.startswith("float32 matmul probe")
    assert runtime.matmul_peak("float32") is runtime.matmul_peak("float32")  # measured once


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32), ("16-mixed", torch.float16)])
def test_dtype_of_a_precision(precision, dtype):
    assert runtime.compute_dtype(precision) == dtype


def test_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal; from framework.runtime import StopSignals; s = StopSignals(); s.install();"
        "os.kill(os.getpid(), signal.SIGINT); assert s.received == signal.SIGINT; print('first', flush=True);"
        "os.kill(os.getpid(), signal.SIGINT); print('second')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "first\n"
    assert done.returncode == -signal.SIGINT


def test_allocator_thresholds_are_set_on_linux():
    assert runtime.raise_allocator_thresholds() == (sys.platform == "linux")


def test_facts_of_a_run():
    assert {"python", "torch", "lightning"} <= runtime.versions().keys()
    assert runtime.usable_cpus() >= 1
    git = runtime.git_state()
    assert not git or (len(git["sha"]) == 40 and isinstance(git["dirty"], bool))
