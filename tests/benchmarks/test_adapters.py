"""The benchmark of adapters runs, compares and counts before it times, and judges and keeps what it found."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import adapters, common

CONF = Path(__file__).parents[2] / "conf/adapter"


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Where rows would go."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path / "results"


def test_it_runs_and_writes_nothing(results, capsys):
    pytest.importorskip("peft")
    adapters.main(["--smoke"])
    out = capsys.readouterr().out
    for line in (
        "mtl_lora, 8 tasks / mtl_lora, 1 task: ",
        "at most 1.05 is wanted",
        "mtl_lora, 8 tasks / PEFT LoRA: ",
        "at most 1.15 is wanted",
        "losses and gradients of PEFT's LoRA and ours differ by ",
        "64 adapters by row, 128 tokens: grouped ",
        "64 adapters by token, 128 tokens: grouped ",
    ):
        assert line in out
    assert not results.exists()


def test_the_row_holds_ratios_and_bytes_without_peft_too(results, capsys, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(adapters, "import_module", absent)
    adapters.main(["--size", "test", "--batch", "4", "--length", "8", "--rounds", "1", "--threads", "1", "--rank", "4"])
    assert "PEFT LoRA: not measured: not installed (peft)" in capsys.readouterr().out
    row = json.loads((results / "adapters.jsonl").read_text())
    seconds = {name: side["seconds"]["median"] for name, side in row["sides"].items()}
    several = (adapters.MTL_8, adapters.MTL_TOKENS)
    assert row["ratios"] == {f"{side} / {adapters.MTL_1}": pytest.approx(seconds[side] / seconds[adapters.MTL_1]) for side in several}
    assert row["absent"].keys() == {adapters.PEFT} and row["difference"] is None
    # phi4mini test: two layers of qkv 48 -> 64 + 2 * 32, o 64 -> 48, gate_up 48 -> 2 * 128, down 128 -> 48, by hand at r = 4
    weights = [(48, 128), (64, 48), (48, 256), (128, 48)]
    lora = 2 * sum(4 * (i + o) for i, o in weights)
    mtl = 2 * sum(4 * i + 3 * 4 * o + 8 * (4 * 4 * blocks + 3) for (i, o), blocks in zip(weights, (3, 1, 2, 1)))
    for name, count in ((adapters.OURS, lora), (adapters.MTL_8, mtl)):
        assert row["sides"][name]["bytes"] == {"adapter": 4 * count, "gradient": 4 * count, "state": 8 * count}


def test_wrong_counts_and_sides_that_differ_are_not_timed(monkeypatch):
    pytest.importorskip("peft")
    real = adapters.parameters_by_formula
    monkeypatch.setattr(adapters, "parameters_by_formula", lambda *args: {**real(*args), adapters.MTL_8: 1})
    with pytest.raises(SystemExit, match=r"mtl_lora, 8 tasks: .* nothing was timed"):
        adapters.main(["--smoke"])
    loop = adapters.loop
    monkeypatch.setattr(adapters, "loop", lambda y, x, a, b, scales, ids: loop(y, x, a, b, [1.01 * s for s in scales], ids))
    with pytest.raises(SystemExit, match="grouped product and loop differ"):
        adapters.grouped(64, "test", 1, True, torch.device("cpu"), common.wall_seconds)
    options = adapters.options_of
    monkeypatch.setattr(adapters, "options_of", lambda r, dropout: {**options(r, dropout), "alpha": 2.01 * r})
    with pytest.raises(SystemExit, match="PEFT's LoRA and ours differ"):
        adapters.main(["--smoke"])


def test_ours_are_set_as_the_shipped_options():
    sides = adapters.adapters(8, 0.05)
    for side, option in ((adapters.OURS, "lora"), (adapters.MTL_8, "mtl_lora"), (adapters.MOE_TOKEN, "moe_lora")):
        shipped = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"), resolve=False)
        for key in shipped.keys() - {"_target_", "tasks", "targets", "aux", "train"}:
            assert getattr(sides[side], key) == shipped[key], (side, key)
