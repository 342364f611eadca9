"""Words of the command line and exit codes."""

import errno
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from components.contracts import UserError
from framework.build import build
from framework.entry import describe, in_one_line, quoted
from framework.inherit import lay_over
from framework.resolvers import run_dir, slug
from framework.runs import is_locked, locked, newest_run, read_state, write_state
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


def test_resume_lays_only_what_was_typed_over_the_saved_configuration(tmp_path):
    """Words that began the run, or name what it has, are no change: one command line both starts a run and requeues it."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- seed=5\n- data=text\n")
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {model: samba, model/size: test, optimizer: adamw}}}")
    saved = OmegaConf.create(
        {"seed": 5, "model": {"hidden_size": 8}, "logger": {"mode": "x"}, "trainer": {"max_steps": 10}, "optimizer": {}}
    )
    composed = OmegaConf.create(
        {"seed": 1, "model": {"hidden_size": 16}, "logger": {}, "trainer": {"max_steps": 20}, "optimizer": {"a": 1}}
    )
    same = ["resume=auto", "logger=none", "seed=5", "data=text", "model=samba", "model/size=test"]
    assert lay_over(saved, composed, same, tmp_path) == []
    assert saved.seed == 5 and saved.logger == {} and saved.model.hidden_size == 8
    different = ["trainer.max_steps=20", "model.hidden_size=16", "optimizer=muon"]
    assert lay_over(saved, composed, different, tmp_path) == different
    with pytest.raises(UserError, match="debug=fast is a choice of a new run"):
        lay_over(saved, composed, ["debug=fast"], tmp_path)


def test_a_run_is_locked_while_a_process_works_on_it(tmp_path):
    write_state(tmp_path, created="1", status="running", last_checkpoint="x")
    with locked(tmp_path) as free:
        assert free and is_locked(tmp_path) and newest_run(tmp_path, unfinished=True) is None
        with locked(tmp_path) as again:
            assert not again
    assert not is_locked(tmp_path) and newest_run(tmp_path, unfinished=True) == tmp_path


@pytest.mark.parametrize("text", ["${seed}", "a ${x} \\ b", "$", "\\${y}", "\\\\${y} ${z", "\\"])
def test_text_that_looks_like_an_interpolation_stays_text(text):
    assert build({"_target_": "torch.nn.CrossEntropyLoss", "reduction": text}).reduction == text


def test_a_warning_of_ours_is_one_line_and_others_are_as_they_are():
    place = str(Path(describe.__code__.co_filename).with_name("generate.py"))
    assert in_one_line(UserWarning("too long"), UserWarning, place, 3) == "warning: too long\n"
    for category, file in ((UserWarning, "/elsewhere/x.py"), (RuntimeWarning, place)):
        assert file in in_one_line(category("odd"), category, file, 3)
