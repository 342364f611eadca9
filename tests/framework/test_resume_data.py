"""A run is resumed on the data that it began on: another corpus is refused in one line, and never by mistake."""

import shutil

import pytest

from components.contracts import UserError
from framework.runs import read_state, write_state
from tests.framework.training import config, train


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("framework.train.loss_curve", lambda *args: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with a run of 4 steps, its data and its cache."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.train.loss_curve", lambda *args: None)
        train(config(folder, "trainer.max_steps=4"), folder / "run")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path


def change(file):
    file.write_text(file.read_text().replace("7 times 7 is 49", "7 times 7 is 94").replace("5003 times", "5003 timex"))


def resume(folder, *overrides, changed=None):
    cfg = config(folder, "trainer.max_steps=6", *overrides)
    if changed:
        change(folder / changed)
    return train(cfg, folder / "run", resuming=True)


@pytest.mark.parametrize(("file", "what"), [("train.txt", "training text"), ("val.txt", "held-out text")])
def test_other_text_of_the_same_length_is_refused(folder, file, what):
    before = (folder / "run" / "run_state.json").read_text()
    with pytest.raises(
        UserError, match=rf"resume: the data changed since .*run began: {what} \(data.path=.*train.txt\); .*resume_force=true"
    ) as e:
        resume(folder, changed=file)
    assert "\n" not in str(e.value)
    assert (folder / "run" / "run_state.json").read_text() == before


def test_the_same_text_in_another_place_goes_on(folder):
    assert resume(folder)["step"] == 6  # other paths and another cache than the run began with


def test_force_goes_on_and_remembers_the_new_data(folder):
    old = read_state(folder / "run")["data"]
    assert resume(folder, "resume_force=true", changed="train.txt")["step"] == 6
    new = read_state(folder / "run")["data"]
    assert new["train"] != old["train"] and new["val"] == old["val"]


def test_a_run_from_before_the_fingerprint_goes_on(folder):
    write_state(folder / "run", data=None)
    assert resume(folder, changed="train.txt")["step"] == 6
    assert read_state(folder / "run")["data"]["epoch_rows"] == 4000 // 32
