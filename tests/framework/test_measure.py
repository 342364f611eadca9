"""task=measure gives the figures that the training run gave at its end, and those of another rule for the same weights."""

from __future__ import annotations

import pytest

from components.contracts import UserError
from framework.inherit import take_model
from framework.runs import read_state
from tests.framework.training import config, train

LENGTHS = "data.eval_lengths=[32,250]"


def test_it_says_again_what_the_run_said(tmp_path):
    trained = train(config(tmp_path, LENGTHS, "model=phi4mini"), tmp_path / "run")

    def measure(name: str, *words: str) -> dict[str, float]:
        words = ("task=measure", f"ckpt={tmp_path / 'run'}", LENGTHS, *words)
        composed = config(tmp_path, *words)
        take_model(composed, list(words))
        return train(composed, tmp_path / name)

    measured = measure("again")
    wanted = [key for key in trained if key.startswith(("val/", "eval/"))]
    assert len(wanted) == 6
    for key in wanted:
        assert measured[key] == pytest.approx(trained[key], rel=1e-6), key  # the same numbers but for the order of the sums
    assert read_state(tmp_path / "again")["status"] == "done" and not (tmp_path / "again" / "checkpoints").exists()
    stretched = measure("linear", "rope=linear", "rope.factor=8")
    assert abs(stretched["eval/length_250/loss"] - trained["eval/length_250/loss"]) > 1e-5  # hardly trained: attention is nearly even


def test_what_it_would_pass_over_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ema\.enabled: True; this task trains and evaluates nothing"):
        train(config(tmp_path, "task=measure", "ema.enabled=true"), tmp_path / "run")
