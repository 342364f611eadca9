"""All stages of an experiment as commands: in order, each with the folders of those before it."""

from __future__ import annotations

import hydra
import pytest
from omegaconf import OmegaConf

from components.contracts import UserError
from framework import resolvers, stages
from framework.overrides import CONF, config_loader
from framework.stages import commands, made_by, main

resolvers.register()
STAGED = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml") if "\nmade_by:" in file.read_text())


def test_every_stage_gets_the_folders_of_those_before_it():
    found = commands("longrope2_vs_rules", {}, ["logger=none"], "NOW")
    base, search, last = (f"multirun/longrope2_vs_rules{part}/NOW" for part in ("_base", "_search", ""))
    assert [words for _, _, words in found] == [
        ["experiment=longrope2_vs_rules_base", f"hydra.sweep.dir={base}", "logger=none"],
        ["experiment=longrope2_vs_rules_search", f"hydra.sweep.dir={search}", f"stages.base={base}", "logger=none"],
        ["experiment=longrope2_vs_rules", f"hydra.sweep.dir={last}", f"stages.base={base}", f"stages.search={search}", "logger=none"],
    ]
    (only,) = commands("longrope2_midtrain", {"base": "A", "search": "B"}, [], "NOW")
    assert only[2] == [
        "experiment=longrope2_midtrain",
        "hydra.sweep.dir=multirun/longrope2_midtrain/NOW",
        "stages.base=A",
        "stages.search=B",
    ]


@pytest.mark.parametrize("experiment", STAGED)
def test_what_an_experiment_asks_for_is_made(experiment):
    """Each folder that it takes is made by an experiment there is, which takes no folder that is not made before."""
    made: list[str] = []
    for name, maker in made_by(experiment).items():
        assert set(made_by(maker)) <= set(made)
        made.append(name)
    assert made == list(OmegaConf.to_container(whole(experiment)["stages"]))


def whole(experiment):
    """The experiment as it composes, without what the command must give."""
    with config_loader():
        return hydra.compose("train", [f"experiment={experiment}"])


def test_a_failed_stage_ends_it_and_says_how_to_go_on(monkeypatch, capsys):
    ran = []

    def run(command, cwd):
        ran.append(command[2:])
        return type("Done", (), {"returncode": 3 if len(ran) == 2 else 0})

    monkeypatch.setattr(stages.subprocess, "run", run)
    assert main(["longrope2_vs_rules", "--", "seed=1"]) == 3
    assert len(ran) == 2 and ran[1][0] == "experiment=longrope2_vs_rules_search" and ran[1][-1] == "seed=1"
    said = capsys.readouterr().err
    assert "stage search failed; finish it: python train.py resume=multirun/longrope2_vs_rules_search/" in said
    assert "then: python -m framework.stages longrope2_vs_rules base=multirun/longrope2_vs_rules_base/" in said


def test_mistakes_are_one_line(capsys):
    for words, message in (
        (["longrope2_vs_rule"], "'longrope2_vs_rule' is no experiment; did you mean 'longrope2_vs_rules'?"),
        (["muon_vs_adamw"], "experiment muon_vs_adamw has no earlier stages"),
        (["longrope2_vs_rules", "bass=A"], "the stages of longrope2_vs_rules are base, search; did you mean 'base'?"),
        (["longrope2_vs_rules", "seed"], "seed: not understood; give STAGE=DIR"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    with pytest.raises(UserError):
        made_by("nowhere")
