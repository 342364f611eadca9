"""The benchmark of LoRA's forms compares before it times, and keeps what it found."""

import json

import pytest
import torch

from benchmarks import common, lora_epilogue


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Where rows would go."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path / "results"


def test_it_runs_and_writes_nothing(results, capsys):
    lora_epilogue.main(["--smoke"])
    out = capsys.readouterr().out
    assert all(f"{form} / behind: " in out for form in ("addmm", "in place", "concatenated")) and "at most 0.95 is wanted" in out
    assert not results.exists()


def test_the_row_holds_the_ratios(results, capsys):
    lora_epilogue.main(["--size", "test", "--batch", "2", "--length", "8", "--rounds", "1", "--rank", "2", "--dropouts", "0.1"])
    row = json.loads((results / "lora_epilogue.jsonl").read_text())
    found = row["dropout"]["0.1"]
    assert found["seconds"].keys() == {"qkv", "o", "gate_up", "down"}
    total = {form: sum(sides[form]["median"] for sides in found["seconds"].values()) for form in lora_epilogue.FORMS}
    assert found["ratios"] == {form: pytest.approx(seconds / total["behind"]) for form, seconds in total.items()}
    assert 0 < row["difference"] < lora_epilogue.TOLERANCE


@pytest.mark.parametrize("form", ["addmm", "in place", "concatenated"])
def test_a_form_that_is_wrong_is_not_timed(form, monkeypatch):
    right = lora_epilogue.FORMS[form]
    monkeypatch.setitem(lora_epilogue.FORMS, form, lambda x, dropped, w, a, b: right(x, dropped, w, a, 1.01 * b))
    with pytest.raises(SystemExit, match="nothing was timed"):
        lora_epilogue.main(["--smoke"])
