"""The real W&B client, offline: what is in its files is what is in metrics.csv."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from components.contracts import UserError
from framework import wandb_logger
from framework.logging import read_rows
from framework.runs import read_state
from framework.tasks.lm import LanguageModelTask
from tests.framework import wandb_file
from tests.framework.training import Killed, config, train

OVERRIDES = ("logger=wandb", "logger.mode=offline", "logger.project=probe", "tags=[mine]")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("framework.train.loss_curve", lambda *args: None)
    for key in ("WANDB_API_KEY", "WANDB_MODE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


def wandb_processes() -> set[str]:
    """Ids of our own live wandb-core children."""
    listing = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listing.splitlines() if "wandb" in line}


def test_history_equals_metrics_csv_over_a_resume(tmp_path, monkeypatch, capsys):
    cfg, run = config(tmp_path, *OVERRIDES, "validate.every_steps=3"), tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    hydra = {"runtime": {"choices": {"model": "one", "experiment": None, "hydra/launcher": "basic"}}, "mode": "RUN", "sweep": {"dir": "s"}}
    (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    original = LanguageModelTask.training_step
    with monkeypatch.context() as patch:

        def step(self, batch, batch_idx):
            if batch_idx == 10:
                raise Killed
            return original(self, batch, batch_idx)

        patch.setattr(LanguageModelTask, "training_step", step)
        with pytest.raises(Killed):
            train(cfg, run)
    run_id = read_state(run)["wandb_id"]
    assert re.fullmatch(r"[a-z0-9]{8}", run_id)
    capsys.readouterr()
    metrics = train(cfg, run, resuming=True)
    printed = capsys.readouterr()
    assert f"wandb sync {run}/wandb/offline-run-*-{run_id}" in printed.out
    assert printed.err == ""

    first, second = wandb_file.files(run)
    assert all(run_id in path.name for path in (first, second))
    assert [row["step"] for row in wandb_file.history(second)] == [10.0, 11.0, 12.0]
    newest = {row["step"]: row for path in (first, second) for row in wandb_file.history(path)}
    assert [newest[step] for step in sorted(newest)] == read_rows(run)  # every value, exactly

    exits = [record.exit.exit_code for path in (first, second) for record in wandb_file.records(path) if record.HasField("exit")]
    assert exits == [1, 0]
    (started,) = (record.run for record in wandb_file.records(first) if record.HasField("run"))
    assert (started.run_id, started.project) == (run_id, "probe")
    assert set(started.tags) == {"mine", "model=one"}
    uploaded = {wandb_file.key_of(item) for item in started.config.update}
    assert {"model", "optimizer", "data", "params", "versions", "command"} <= uploaded
    summary = {wandb_file.key_of(i): i.value_json for r in wandb_file.records(second) if r.HasField("summary") for i in r.summary.update}
    assert float(summary["baseline/xz_bits_per_byte"]) == metrics["baseline/xz_bits_per_byte"]
    assert not list(Path.cwd().glob("wandb/offline-run-*" + run_id))
    assert not wandb_processes()


@pytest.mark.parametrize(
    ("mode", "environment", "reachable", "chosen"),
    [
        ("auto", {}, True, "offline"),
        ("auto", {"WANDB_API_KEY": "k" * 40}, True, "online"),
        ("auto", {"WANDB_API_KEY": "k" * 40}, False, "offline"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, True, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, True, "offline"),
        ("offline", {"WANDB_API_KEY": "k" * 40}, True, "offline"),
    ],
)
def test_mode_follows_key_and_network(monkeypatch, mode, environment, reachable, chosen):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(wandb_logger, "is_reachable", lambda: reachable)
    assert wandb_logger.choose_mode(mode) == chosen


def test_key_in_netrc_counts(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    assert not wandb_logger.has_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_logger.has_key()


def test_unreachable_server_is_found_out_at_once(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_logger.choose_mode("auto") == "offline"
    assert capsys.readouterr().out == "W&B: http://127.0.0.1:9 cannot be reached; logging offline\n"


def test_unknown_mode_is_refused(tmp_path):
    with pytest.raises((ValueError, UserError), match="mode"):
        train(config(tmp_path, "logger=wandb", "logger.mode=sometimes"), tmp_path / "run")
