"""Words of the command line and exit codes."""

import errno

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from components.contracts import UserError
from framework.entry import describe, quoted
from framework.resolvers import run_dir, slug
from framework.run import lay_over
from framework.runs import newest_run, read_state, write_state
from framework.runtime import Interrupted

TEXTS = ["Hello, world (x): a=b", "it's", "back\\slash", "end\\", "q\\'x", 'say "hi"', "${seed}", "[a", "", "日本, {}", "a'b\\\\"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_arrives_as_typed(text):
    (override,) = OverridesParser.create().parse_overrides([quoted(f"prompt={text}")])
    assert OmegaConf.create({"seed": 3, "prompt": override.value()}).prompt == text


def test_other_words_and_quoted_prompts_are_left_alone():
    for word in ("optimizer.lr=1e-3", "prompt=null", "prompt='a, b'", "data.path=a.txt", "-m"):
        assert quoted(word) == word


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x"), 2),
        (Interrupted(15, "x"), 143),
        (Interrupted(2, "x"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "full", "f"), 2),
        (PermissionError(13, "no", "f"), 2),
        (RuntimeError("a defect"), 1),
    ],
)
def test_exit_codes(error, code):
    assert describe(error)[1] == code


def test_newest_run_looks_at_state_not_at_names(tmp_path):
    for name, created, status, checkpoint in (("b", "1", "done", "x"), ("a", "2", "running", "x"), ("c", "3", "done", None)):
        (tmp_path / name).mkdir()
        write_state(tmp_path / name, created=created, status=status, last_checkpoint=checkpoint)
    assert newest_run(tmp_path).name == "c"
    assert newest_run(tmp_path, unfinished=True).name == "a"
    assert newest_run(tmp_path, trained=True).name == "a"
    (tmp_path / "a" / "run_state.json").write_text("{")
    assert read_state(tmp_path / "a") == {} and newest_run(tmp_path, trained=True).name == "b"


def test_run_folder_names(tmp_path):
    choices = {"model": "m", "model/size": "tiny", "rope": "none", "adapter": "none", "optimizer": "o", "data": "d e/f"}
    assert slug(choices, 3) == "m-tiny-o-d-e-f-s3"
    assert run_dir(None, str(tmp_path), "n", "now", choices, 3) == str(tmp_path / "n" / "now_m-tiny-o-d-e-f-s3")
    (tmp_path / "n" / "old").mkdir(parents=True)
    write_state(tmp_path / "n" / "old", created="1", status="running")
    assert run_dir("auto", str(tmp_path), "n", "now", choices, 3) == str(tmp_path / "n" / "old")


def test_resume_lays_only_what_was_typed_over_the_saved_configuration():
    saved = OmegaConf.create({"seed": 5, "model": {"hidden_size": 8}, "logger": {"mode": "x"}, "trainer": {"max_steps": 10}})
    composed = OmegaConf.create({"seed": 1, "model": {"hidden_size": 16}, "logger": {}, "trainer": {"max_steps": 20}})
    assert lay_over(saved, composed, ["resume=auto", "logger=none"]) == []
    assert saved.seed == 5 and saved.logger == {} and saved.model.hidden_size == 8
    assert lay_over(saved, composed, ["trainer.max_steps=20", "model.hidden_size=16"]) == ["trainer.max_steps=20", "model.hidden_size=16"]
