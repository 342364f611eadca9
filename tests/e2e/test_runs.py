"""Ways in which runs follow one another, through main(argv) in one process: requeueing, fine-tuning, debug options, prompts."""

from __future__ import annotations

import csv
import json

import pytest
from commands import SMALL, shakespeare_like
from omegaconf import OmegaConf

import generate
import train
from framework.runs import choices, newest_run, read_state, write_state

QUICK = ["logger=none", "trainer.max_steps=4", "samples.every_steps=1000", "validate.every_steps=1000", "checkpoint.every_steps=2"]


class Desk:
    def __init__(self, folder):
        self.folder = folder
        text = shakespeare_like(folder / "text.txt", kilobytes=20)
        self.roots = [f"paths.root={folder / 'outputs'}", f"paths.cache_dir={folder / 'cache'}"]
        self.words = [*SMALL, *QUICK, f"data.path={text}"]

    def train(self, *words, small=True):
        chosen = [w for w in (self.words if small else QUICK) if not any(w.split("=")[0] == x.split("=")[0] for x in words)]
        return train.main([*self.roots, *chosen, *words])

    def newest(self, name):
        return newest_run(self.folder / "outputs" / name)

    def rows(self, name):
        with open(self.newest(name) / "metrics.csv") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    desk = Desk(tmp_path_factory.mktemp("desk"))
    assert desk.train("name=base") == 0
    return desk


def test_one_command_line_starts_a_run_and_requeues_it(desk):
    words = ["name=queue", "resume=auto", "model=samba", "optimizer=adamw", "trainer.max_steps=6"]
    assert desk.train(*words) == 0
    run = desk.newest("queue")
    write_state(run, status="running", step=4)
    (run / "checkpoints" / "step000006.ckpt").unlink()
    assert desk.train(*words) == 0
    assert desk.newest("queue") == run and [int(row["step"]) for row in desk.rows("queue")] == [1, 2, 3, 4, 5, 6]
    assert read_state(run)["status"] == "done"


def test_forced_changes_on_resume_take_effect(desk):
    assert desk.train("name=forced") == 0
    run = desk.newest("forced")
    words = [f"resume={run}", "trainer.max_steps=6", "optimizer.lr=1e-5", "optimizer.adamw_lr=1e-5", "schedule=constant", "logger=none"]
    assert train.main([*desk.roots, *words]) == 2
    assert train.main([*desk.roots, *words, "resume_force=true"]) == 0
    rates = [float(row["opt/lr/adamw"]) for row in desk.rows("forced")]
    assert len(rates) == 6 and rates[-2:] == [1e-5, 1e-5] and min(rates[1:3]) > 1e-4


def test_fine_tuning_starts_from_a_run_with_an_adapter(desk, capfd):
    base = desk.newest("base")
    assert desk.train("name=tuned", f"ckpt={base}", "adapter=lora", "optimizer=adamw") == 0
    tuned = desk.newest("tuned")
    assert desk.train("name=again", f"ckpt={tuned}") == 0
    assert "merged into a copy of its weights; the run is as it was" in capfd.readouterr().out
    weights = json.loads((desk.newest("again") / "metrics.json").read_text())
    assert weights["params/total"] == json.loads((base / "metrics.json").read_text())["params/total"]


def test_a_run_from_a_checkpoint_is_named_after_what_it_is(desk):
    assert desk.train(f"ckpt={desk.newest('base')}", "name=named", "optimizer=adamw", "model/size=test") == 0
    run = desk.newest("named")
    assert "samba-test-adamw" in run.name and choices(run)["model/size"] == "test"


def test_a_size_that_contradicts_the_checkpoint_is_refused(desk, capfd):
    assert desk.train(f"ckpt={desk.newest('base')}", "name=refused", "model/size=small") == 2
    assert "contradicts" in capfd.readouterr().err


def test_a_checkpoint_may_go_on_with_another_rope_rule(desk):
    """Short rows first, then longer ones under a rule that starts from the short length."""
    words = ["name=longer", "rope=linear", "rope.factor=2", "data.seq_len=64", "data.window_mix={short_len: 32, long_share: 0.5}"]
    assert desk.train(f"ckpt={desk.newest('base')}", *words, "trainer.max_steps=2") == 0
    run, base = desk.newest("longer"), desk.newest("base")
    config, before = (OmegaConf.load(folder / "config.yaml") for folder in (run, base))
    assert config.rope.factor == 2 and config.data.seq_len == 64 and config.model.max_length == before.model.max_length
    assert choices(run)["rope"] == "linear" and "linear" in run.name


def test_debug_overfit_repeats_its_batches(desk):
    assert desk.train("name=overfit", "debug=overfit", "trainer.max_steps=60", "schedule=constant", "trainer.precision=32-true") == 0
    losses = [float(row["train/loss"]) for row in desk.rows("overfit")]
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < 0.8 * min(losses[:20])


def test_debug_profile_shows_its_table(desk, capfd):
    assert desk.train("name=profile", "debug=profile", "trainer.max_steps=3") == 0
    assert "Total time" in capfd.readouterr().out


def test_a_diverged_run_is_not_picked_up_again(desk, capfd):
    words = [
        "name=diverged",
        "optimizer=adamw",
        "optimizer.lr=1e30",
        "schedule=constant",
        "trainer.max_steps=20",
        "trainer.precision=32-true",
    ]
    assert desk.train(*words) == 2
    err = capfd.readouterr().err
    assert "is not finite at step" in err and "batch" in err
    assert newest_run(desk.folder / "outputs" / "diverged", unfinished=True) is None


@pytest.mark.parametrize("prompt", ['a, [b] {c}=d "q" \'s ${x} \\ é', "${seed}", "", "null"])
def test_any_prompt_is_text(desk, capfd, prompt):
    assert generate.main([*desk.roots, f"ckpt={desk.newest('base')}", f"prompt={prompt}", "max_new_tokens=2"]) == 0
    out = capfd.readouterr().out
    assert prompt in out or prompt == "null"


def test_flags_may_follow_words(desk, capfd):
    assert desk.train("--cfg", "job", "--resolve") == 0
    assert "max_steps: 4" in capfd.readouterr().out
