"""What users of such frameworks complain about most, one test each, named after the complaint. Where another file proves a point in depth,
its helpers are called here."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import components.optim
import train as command
from components.contracts import Batch, SamplingParams, UserError
from framework import overrides
from framework.build import compose, load_run
from framework.checkpoint import FOLDER
from framework.engines.native import NativeEngine
from framework.logging import read_rows
from framework.runs import read_state
from kernels import dispatch
from tests.e2e import test_ddp
from tests.framework import test_lm_task, test_resume, wandb_file
from tests.framework.training import Killed, assert_same_run, config, train
from tests.kernels import test_dispatch

ROOT = Path(__file__).resolve().parents[2]
one_process, two_processes = test_ddp.one_process, test_ddp.two_processes  # fixtures


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("framework.train.loss_curve", lambda *args: None)


def test_complaint_01_install_pins():
    """It installs today and breaks tomorrow: every dependency has a floor and a ceiling, and what is installed lies between them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.fullmatch(r">=3\.\d+,<3\.\d+", project["requires-python"])
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if requirement.name == project["name"]:  # an extra that contains others
            continue
        operators = {clause.operator for clause in requirement.specifier}
        assert operators >= {">=", "<"} or operators == {"=="}, f"{requirement} is not pinned on both sides"
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            version = metadata.version(requirement.name)
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{requirement.name} {version} is outside {requirement.specifier}"
            )


def test_complaint_02_the_saved_model_differs_from_the_trained_one(tmp_path, monkeypatch):
    """What generation loads gives, bit for bit, the logits of the model as it was in memory at the end, adapter included, and its text."""
    from framework import train as module

    kept, build_parts = [], module.build_parts
    monkeypatch.setattr(module, "build_parts", lambda *args: kept.append(build_parts(*args)) or kept[-1])
    train(config(tmp_path, "adapter=lora", "trainer.precision=32-true"), tmp_path / "run")
    trained, saved = kept[0].model.eval(), load_run(tmp_path / "run")
    ids = torch.tensor([kept[0].tokenizer.encode("7 times 7 is")])
    with torch.no_grad():
        outputs = [model.logits(model(Batch(ids)).hidden) for model in (trained, saved.model)]
    assert torch.equal(*outputs)
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3)
    texts = [NativeEngine(model, saved.tokenizer).generate([ids[0].tolist()], params)[0] for model in (trained, saved.model)]
    assert texts[0] == texts[1]


def test_complaint_03_resume_is_not_exact(tmp_path, monkeypatch):
    """A run that dies with dropout on, in the middle of an epoch, and is resumed equals one that never died: losses, weights, states."""
    cfg = config(tmp_path, *test_resume.DROPOUT)
    train(cfg, tmp_path / "straight")
    with monkeypatch.context() as patch:
        test_resume.die_at(patch, 6)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "killed")
    train(cfg, tmp_path / "killed", resuming=True)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_complaint_04_the_loss_changes_under_accumulation():
    """Rows with 1, 9, 0 and 10 counted tokens: one batch or micro-batches of any size are the same step (a mean of means is not)."""
    for sizes in ([1, 1, 1, 1], [1, 3]):
        test_lm_task.test_accumulated_gradients_equal_those_of_the_whole_batch(sizes, aux=0.01)
    test_lm_task.test_mean_of_means_would_fail_that_test()


NEW_MODULE = '''
"""Sign descent."""
import torch
from components.optim.groups import build_groups

class SignDescent(torch.optim.SGD):
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.data.sub_(p.grad.sign(), alpha=group["lr"])
        return loss

def sign_descent(parameters, lr: float):
    groups = build_groups(parameters, {"sign": {"lr": lr, "weight_decay": 0.0, "state_bytes": 0}}, lambda parameter: "sign")
    return SignDescent(groups, lr=lr)
'''


def test_complaint_05_adding_an_option_edits_the_core(tmp_path, monkeypatch, capfd):
    """One module and one YAML: the option is offered, checked, explained and trained without a line changed elsewhere."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "sign_descent.py").write_text(NEW_MODULE)
    shutil.copytree(overrides.CONF, tmp_path / "conf")
    (tmp_path / "conf" / "optimizer" / "sign.yaml").write_text(
        "_target_: components.optim.sign_descent.sign_descent\n_partial_: true\nlr: 1.0e-3\n"
    )
    monkeypatch.setattr(components.optim, "__path__", [*components.optim.__path__, str(tmp_path / "modules")])
    monkeypatch.setattr(overrides, "CONF", tmp_path / "conf")
    assert "sign" in overrides.group_options("optimizer")
    train(config(tmp_path, "optimizer=sign", "trainer.max_steps=2", "optimizer.lr=0.01"), tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    assert rows[-1]["step"] == 2 and rows[1]["train/loss"] < rows[0]["train/loss"]
    with pytest.raises(UserError, match=r"optimizer\.lr: 'fast' is not a number"):
        compose("train", ["optimizer=sign", "optimizer.lr=fast"])
    with pytest.raises(UserError, match=r"optimizer: 'sig' is not an option; one of adamw, .*sign.*did you mean 'sign'"):
        compose("train", ["optimizer=sig"])


@pytest.mark.slow
def test_complaint_06_ddp_inside_a_sweep(tmp_path, one_process, two_processes):
    """Two processes x two jobs: one folder and one W&B run a job, and the values of the run alone."""
    test_ddp.test_ddp_inside_a_sweep(tmp_path, one_process, two_processes)


def test_complaint_07_wandb_runs_are_merged_or_wrongly_finished(tmp_path, monkeypatch):
    """Two runs in one process, as in a sweep: the first dies and is finished as failed, the second is another run with its own history."""
    cfg = config(tmp_path, "logger=wandb", "logger.mode=offline", "trainer.max_steps=4")
    with monkeypatch.context() as patch:
        test_resume.die_at(patch, 2)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "first")
    train(cfg, tmp_path / "second")
    runs = [tmp_path / "first", tmp_path / "second"]
    assert len({read_state(run)["wandb_id"] for run in runs}) == 2
    for run, code, steps in zip(runs, (1, 0), (2, 4), strict=True):
        (file,) = wandb_file.files(run)
        assert read_state(run)["wandb_id"] in file.name
        assert wandb_file.history(file) == read_rows(run) and len(read_rows(run)) == steps
        assert [record.exit.exit_code for record in wandb_file.records(file) if record.HasField("exit")] == [code]


def test_complaint_08_configuration_errors_are_opaque(capfd):
    """Five mistakes in one line: five lines, each with the key, the value and what to write instead; no traceback; exit code 2."""
    words = ["model=sambaa", "optimizer.lrr=3", "trainer.max_steps=ten", "seed=abc", "+optimizer=adamw"]
    assert command.main(words) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) == 5
    for part in (
        "model: 'sambaa' is not an option", "did you mean 'samba'", "optimizer.lrr: unknown key; did you mean 'optimizer.lr'",
        "trainer.max_steps: 'ten' is not a whole number", "seed: 'abc' is not a whole number",
        "drop the plus sign and write optimizer=adamw",
    ):  # fmt: skip
        assert part in err, err


def test_complaint_09_there_is_no_cpu_path(tmp_path, monkeypatch):
    """Every kernel has an implementation for the CPU, and every model trains, saves and generates where there is no CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ops = [folder.name for folder in (ROOT / "kernels").iterdir() if (folder / "reference.py").is_file()]
    assert len(ops) >= 7
    for op in ops:
        assert dispatch.pick(op, "cpu").__name__.rpartition(".")[2] in ("cpu", "eager")
    for name in overrides.group_options("model"):
        train(config(tmp_path, f"model={name}", "trainer.max_steps=2"), tmp_path / name)
        assert json.loads((tmp_path / name / "metrics.json").read_text())["step"] == 2
        run = load_run(tmp_path / name / FOLDER / "step000002.ckpt")
        (answer,) = NativeEngine(run.model, run.tokenizer).generate([run.tokenizer.encode("7")], SamplingParams(max_new_tokens=3))
        assert len(answer.token_ids) == 3 or answer.finish_reason == "stop"


def test_complaint_10_it_falls_back_in_silence(tmp_path, monkeypatch, caplog):
    """No GPU, no fast kernel, no key, no network: each is refused or said, never just slower or elsewhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer.accelerator: 'gpu' but no CUDA device was found; use trainer=cpu"):
        compose("train", ["trainer=gpu"])
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_picked", {})
        test_dispatch.test_a_slower_backend_on_cuda_warns(patch)
    monkeypatch.setattr(dispatch, "_picked", {})
    caplog.set_level(logging.INFO, logger="kernels.dispatch")
    caplog.clear()
    dispatch.pick("swiglu", "cpu")
    assert [record.getMessage() for record in caplog.records] == ["kernels.swiglu on cpu: eager"]
    with pytest.raises(UserError, match="no such file"):  # text that is not there is not replaced by the default data
        train(config(tmp_path, "data.path=nowhere.txt"), tmp_path / "run")
