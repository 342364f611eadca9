"""What `ckpt=` brings into a new run: weights, also when that run is resumed before it had a checkpoint, under the rule that was chosen."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from framework.build import load_run
from framework.parts import build_parts
from tests.framework.training import config as training_config
from tests.framework.training import train

MODEL = ["model=phi4mini"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with a rule of its own."""
    folder = tmp_path_factory.mktemp("source")
    train(training_config(folder, *MODEL, "rope=linear", "trainer.max_steps=1"), folder / "run")
    return folder


def parts(source, run_dir, *words, resuming=False):
    return build_parts(training_config(source, *MODEL, f"ckpt={source / 'run'}", *words), run_dir, resuming)


def test_the_rope_rule_that_was_chosen_is_the_one_that_turns(source, tmp_path):
    chosen = parts(source, tmp_path, "rope=yarn", "rope.factor=8").model.rope_spec
    assert (chosen.rule, chosen.target_len) == ("yarn", 8 * 32)
    assert parts(source, tmp_path, "rope=linear").model.rope_spec == load_run(source / "run").model.rope_spec


def test_a_value_that_follows_another_key_of_the_new_run(source, tmp_path):
    """As in experiments of several stages, where the rule's numbers come from keys that the source has not."""
    config = training_config(source, *MODEL, f"ckpt={source / 'run'}", "rope=yarn", "rope.factor=8")
    OmegaConf.update(config, "stage", {"factor": 4.0}, force_add=True)
    config.rope.factor = "${stage.factor}"
    assert build_parts(config, tmp_path, False).model.rope_spec.target_len == 4 * 32


def test_a_run_resumed_before_its_first_checkpoint_has_the_weights_again(source, tmp_path):
    wanted = load_run(source / "run").model.state_dict()
    for resuming in (False, True):
        found = parts(source, tmp_path, "rope=linear", resuming=resuming)
        assert found.resume_file is None and found.start_step == 0
        for name, weight in found.model.state_dict().items():
            assert torch.equal(weight, wanted[name]), name


def test_a_run_resumed_from_its_own_checkpoint_does_not_read_the_source_again(source, tmp_path):
    train(training_config(source, *MODEL, f"ckpt={source / 'run'}", "rope=linear", "trainer.max_steps=2"), tmp_path / "run")
    gone = training_config(source, *MODEL, "ckpt=gone", "rope=linear")
    found = build_parts(gone, tmp_path / "run", resuming=True)
    assert found.resume_file is not None and found.start_step == 2
