"""The pre-flight: what it counts against counts by hand, what it estimates against real runs, and every mistake at once."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import train as command
from components.optim.adamw import adamw
from framework import estimate
from framework import preflight as checks
from framework.build import build_model, compose
from framework.estimate import occurrences, trial
from framework.preflight import parameters_by_owner, preflight
from framework.runs import write_state
from tests.e2e import commands
from tests.framework.training import config


@pytest.fixture
def brief(monkeypatch):
    """A rehearsal of a second."""
    monkeypatch.setattr(estimate, "TRIAL_SECONDS", 0.2)


def test_figures_of_a_small_run(tmp_path, capsys, brief):
    cfg = config(tmp_path, "adapter=lora", "adapter.r=2", "optimizer=adamw", "trainer.max_steps=100", "trainer.accumulate_grad_batches=3")
    found = preflight(cfg, tmp_path / "run", {"model": "samba", "adapter": "lora"})
    out = capsys.readouterr().out
    assert found.tokens == 100 * 3 * 4 * 32 and found.processes == 1
    model = build_model(cfg, 257)
    assert found.flops_per_token > 3 * model.forward_flops(32)  # the adapter's products are counted too
    assert sum(total for (owner, _), (total, _) in found.parameters.items() if owner == "model") == sum(
        p.numel() for p in model.parameters()
    )
    assert {owner for (owner, _), (_, trainable) in found.parameters.items() if trainable} == {"adapter"}
    added = found.parameters["adapter", "adapter"]
    assert added[0] == added[1] > 0
    assert found.parts == [("model", "samba", "components.models.samba.Samba"), ("adapter", "lora", "components.adapters.lora.LoRA")]
    steps = found.rehearsal.step * 100
    assert found.rehearsal.steps >= estimate.LEAST_STEPS and found.cost.seconds == pytest.approx(steps, rel=0.5, abs=2.0)
    assert 2**27 < found.cost.memory_bytes < 2**35
    for words in ("components.adapters.lora.LoRA", f"this run takes {found.tokens:,}", "100 steps of", "nothing was trained"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_parts_are_those_of_the_run_that_is_started_from(tmp_path, monkeypatch):
    """Not the default model's, nor the values that it has at a size."""
    write_state(tmp_path, choices={"model": "phi4mini", "model/size": "test"})
    chosen = {
        "model": "samba",
        "model/size": "tiny",
        "model/overlay": "samba_tiny",
        "model/overlay@model": "samba_base_tiny",
        "data": "text",
    }
    hydra = SimpleNamespace(initialized=lambda: True, get=lambda: SimpleNamespace(runtime=SimpleNamespace(choices=chosen)))
    monkeypatch.setattr(checks, "HydraConfig", hydra)
    paths = {"root": str(tmp_path)}
    assert checks.typed_choices(OmegaConf.create({"ckpt": str(tmp_path), "paths": paths})) == {
        "model": "phi4mini", "model/size": "test", "data": "text",
    }  # fmt: skip
    assert checks.typed_choices(OmegaConf.create({"ckpt": None, "paths": paths})) == chosen


def test_shared_parameters_count_once_and_by_role(tmp_path):
    model = build_model(compose("train", ["model=phi4mini", "model/size=test"]), 257)
    counts = parameters_by_owner(model)
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())
    roles = model.roles()
    norms = sum(p.numel() for name, p in model.named_parameters() if roles[name] == "norm")
    assert counts["model", "norm"] == (norms, norms)


def test_how_often_things_happen():
    """By hand: 560 steps; validation after 250, 500 and at the end; samples after 250 and 500; checkpoints after 25, 50, ..., 550, 560."""
    assert occurrences(compose("train")) == {"step": 560, "validation": 3, "checkpoint": 23, "sample": 2}
    words = ["trainer.max_steps=500", "validate.at_start=true", "samples.every_steps=0"]
    assert occurrences(compose("train", words)) == {"step": 500, "validation": 3, "checkpoint": 20, "sample": 0}
    assert occurrences(compose("train", ["trainer.max_steps=500"]))["sample"] == 1  # none at the last step


@pytest.fixture
def place(tmp_path):
    (tmp_path / "train.txt").write_text("A few words of text. " * 200)
    return [
        "preflight=true", "model/size=test", "data=text", f"data.path={tmp_path / 'train.txt'}", "data.tokenizer.kind=bytes",
        "data.seq_len=32", "data.batch_size=4", "trainer.max_steps=20", "logger=none", f"paths.root={tmp_path / 'outputs'}",
        f"paths.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip


def refusals(capfd, words):
    """Lines of a refused command line."""
    assert command.main(words) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return [line.removeprefix("error: ") for line in err.splitlines()]


def test_the_command_trains_nothing_and_leaves_nothing(place, tmp_path, capfd, brief):
    assert command.main([*place, "optimizer=adamw"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^optimizer +adamw +components\.optim\.adamw\.adamw", out, re.MULTILINE)
    assert re.search(r"^time +\d+ s: 20 steps of", out, re.MULTILINE)
    assert not list((tmp_path / "outputs").rglob("*"))


def test_mistakes_of_every_kind_are_said_at_once(place, capfd):
    """A wrong type, an illegal pair, and what data, adapter, schedule and optimizer refuse when they are built."""
    lines = refusals(capfd, [*place, "model.num_kv_heads=3", "seed=abc", "data.path=nowhere.txt", "optimizer.lr=-1"])
    assert {line.split(":")[0] for line in lines} == {"model.num_kv_heads", "seed", "data.path"}
    lines = refusals(
        capfd, [*place, "adapter=lora", "adapter.targets=[nothing]", "data.path=nowhere.txt", "schedule.warmup_steps=-4", "optimizer.lr=-1"]
    )
    assert [line.split(":")[0].split(".")[0] for line in lines] == ["data", "adapter", "optimizer", "schedule"]


def test_it_is_about_one_new_run(place, capfd, tmp_path):
    assert refusals(capfd, [*place, f"resume={tmp_path}"]) == [
        f"preflight: true goes with a new run, not with resume='{tmp_path}', which was checked when it began; drop one"
    ]


def test_a_trial_with_an_optimizer_leaves_no_trace():
    model = build_model(compose("train", ["model/size=test"]), 257)
    from components.optim.groups import named_parameters

    make = compose("train", ["optimizer=adamw"]).optimizer
    settings = {key: make[key] for key in ("lr", "betas", "eps", "weight_decay", "no_decay_roles", "overrides", "fused")}
    before, state = {n: p.detach().clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    assert trial(model, 257, 2, 8, "32-true", adamw(named_parameters(model), **settings)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


CPU_CLOCK = """
import resource, sys, time
time.perf_counter = time.process_time  # other processes of the machine do not move it; with one thread it is the wall clock of an idle one
import train
code = train.main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("model=samba", "optimizer=muon"), ("model=phi4mini", "optimizer=adamw")])
def test_memory_at_size_tiny_is_within_a_fifth_of_the_measured_and_time_is_shown(tmp_path, parts):
    """The default data and size; 60 steps with what belongs to them. The second pre-flight finds the data cached, as the run does."""
    words = [*parts, "trainer.max_steps=60", "validate.every_steps=40", "samples.every_steps=40", "logger=none"]
    ahead = commands.run(tmp_path, "preflight=true", *words, code=CPU_CLOCK, timeout=500)
    assert ahead.returncode == 0, ahead.stderr
    seconds = float(re.search(r"^time +([\d,]+) s:", ahead.stdout, re.MULTILINE)[1].replace(",", ""))
    memory = float(re.search(r"^memory +([\d.]+) GiB", ahead.stdout, re.MULTILINE)[1])
    real = commands.run(tmp_path, *words, code=CPU_CLOCK, timeout=500)
    assert real.returncode == 0, real.stderr
    measured = json.loads((commands.only_run(tmp_path) / "metrics.json").read_text())["seconds"]
    peak = float(re.search(r"^PEAK ([\d.]+)", real.stdout, re.MULTILINE)[1])
    print(f"{parts}: {seconds:.0f} s against {measured:.1f} s, {memory:.2f} GiB against {peak:.2f} GiB")
    assert seconds > 0 and measured > 0  # how close they are depends on what else the machine does: printed, not asserted
    assert memory == pytest.approx(peak, rel=0.2)
