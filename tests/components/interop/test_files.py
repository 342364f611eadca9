"""Checkpoint files of every kind, written, read back, and broken in every way that a person meets."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.contracts import UserError
from components.interop import layouts, read
from components.interop.files import INDEX, write_folder, write_pth
from tests.components.interop.models import reference_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor([1.5])}


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shard_bytes", [1, 25, 10**6])
def test_a_folder_is_read_as_it_was_written(tmp_path, shard_bytes):
    write_folder(tmp_path, TENSORS, {"model_type": "x"}, shard_bytes)
    source = read(tmp_path)
    assert equal(source.tensors, TENSORS) and source.about == {"model_type": "x"} and source.tokenizer is None
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == {1: 3, 25: 2, 10**6: 1}[shard_bytes]
    if len(shards) > 1:
        assert equal(read(tmp_path / INDEX).tensors, TENSORS)
        assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 36


def test_a_tied_tensor_is_written_once_and_views_are_written_whole(tmp_path):
    fused = torch.arange(12.0).view(4, 3)
    write_folder(tmp_path, {"q": fused[:2], "k": fused[2:], "again": fused[:2]}, {})
    found = read(tmp_path).tensors
    assert equal(found, {"q": fused[:2], "k": fused[2:]})


def test_a_reference_file_with_optimizer_and_hparams(tmp_path):
    w = {f"_forward_module.{name}": tensor for name, tensor in reference_checkpoint(layers=2).items()}
    content = {"model": w, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}}
    write_pth(tmp_path / "iter-1-ckpt.pth", content | {"hparams": {"model_name": "Samba_421M"}, "iter_num": 9, "step_count": 1})
    source = read(tmp_path / "iter-1-ckpt.pth")
    assert equal(source.tensors, reference_checkpoint(layers=2)) and source.about == {"model_name": "Samba_421M"}
    assert [layout.name for layout in layouts().values() if layout.matches(source.tensors)] == ["samba"]


def test_a_bare_state_dict_and_files_beside_it(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"d_model": 3}')
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        source = read(path)
        assert equal(source.tensors, TENSORS) and source.about == {"d_model": 3} and source.tokenizer == tmp_path / "tokenizer.json"


def refused(path, word):
    with pytest.raises(UserError) as caught:
        read(path)
    assert word in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_files_that_cannot_be_read(tmp_path):
    refused(tmp_path / "nowhere", "no such file")
    refused(tmp_path, "holds none of")
    for name, word in (("x.safetensors", "truncated, damaged"), ("x.pth", "cannot be read")):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        refused(tmp_path / name, word)
    save_file({"a": torch.zeros(1000)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-7])
    refused(tmp_path / "cut.safetensors", "truncated, damaged")
    torch.save({"model": {"a": 3}}, tmp_path / "numbers.pth")
    refused(tmp_path / "numbers.pth", "holds no state dict")
    (tmp_path / "config.json").write_text("{")
    save_file({"a": torch.zeros(1)}, tmp_path / "fine.safetensors")
    refused(tmp_path / "fine.safetensors", "config.json: cannot be read as JSON")


def test_no_code_is_run_from_a_pickle(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "code": Touch(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", "code would have to run")
    assert not (tmp_path / "ran").exists()


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_an_index_that_its_files_contradict(tmp_path):
    write_folder(tmp_path, TENSORS, {}, 1)
    index = json.loads((tmp_path / INDEX).read_text())

    def change(places, word):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        refused(tmp_path, word)

    places = index["weight_map"]
    change(places | {"d": places["c"]}, "names d, which no file holds")
    change(places | {"c": places["a.weight"]}, "names c, which no file holds")
    change({k: v for k, v in places.items() if k != "c"} | {"d": places["c"]}, "holds c")
    change(places | {"c": "../model.safetensors"}, "not a file beside it")
    change(places | {"c": "gone.safetensors"}, "gone.safetensors: no such file")
    change({}, "has no weight_map")


def test_weights_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be written \(.*\); is the disk full\?"):
        write_folder(tmp_path, {"w": torch.zeros(2)}, {})
