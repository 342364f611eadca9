"""What would be wrong without a word is refused in one line, and nothing has changed then."""

import json

import pytest
import torch

from components.adapters.base import adapter_state, disabled, merge, task_ids, unmerge
from components.adapters.base.peft_files import CONFIG
from components.contracts import UserError
from components.interop.adapters import adapter_usage
from tests.components.adapters.helpers import Toy, awaken, dora, ids, lora, mtl_lora
from tests.components.adapters.moe_helpers import moe


def said(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def adapted(make=lora, **changes):
    adapter, model = make(**changes), Toy()
    adapter.apply(model)
    return adapter, awaken(model).eval()


def edit(folder, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"])
def test_a_folder_whose_start_may_have_changed_the_base(tmp_path, start):
    adapter, model = adapted()
    adapter.save(model, tmp_path)
    edit(tmp_path, init_lora_weights=start)
    words = said(lambda: adapter.load(model, tmp_path))
    assert f"init_lora_weights is '{start}', which may have changed the base model too" in words and '"gaussian"' in words
    assert "init_lora_weights" in said(lambda: type(adapter).from_folder(tmp_path))


@pytest.mark.parametrize("key", ["use_bdlora", "kasa_config", "arrow_config", "monteclora_config"])
def test_a_folder_of_a_variant(tmp_path, key):
    adapter, model = adapted()
    adapter.save(model, tmp_path)
    edit(tmp_path, **{key: {"a": 1}})
    assert f"{key} is set, which is no plain LoRA" in said(lambda: adapter.load(model, tmp_path))


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_a_folder_whose_start_left_the_base(tmp_path, start):
    adapter, model = adapted()
    adapter.save(model, tmp_path)
    edit(tmp_path, init_lora_weights=start, use_bdlora=None, kasa_config=None)
    other = Toy()
    adapter.apply(other)
    adapter.load(other, tmp_path)
    assert torch.equal(other.eval()(ids()), model(ids()))


def test_peft_s_own_folder_of_pissa(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["o_proj"], init_lora_weights="pissa")
    peft.get_peft_model(Toy(), config).save_pretrained(tmp_path)
    assert "init_lora_weights is 'pissa'" in said(lambda: type(lora()).from_folder(tmp_path))


BESIDE = {
    "lora": lora,
    "dora": dora,
    "mtl_lora": mtl_lora,
    "task": lambda **changes: moe("task", tasks=["a", "b", "c"], **changes),
}


@pytest.mark.parametrize("first", BESIDE)
@pytest.mark.parametrize("second", BESIDE)
def test_beside_another_adapter_neither_is_saved(tmp_path, first, second):
    model = Toy()
    one, two = BESIDE[first](targets=["qkv_proj"]), BESIDE[second](targets=["o_proj"])
    one.apply(model)
    two.apply(model)
    for adapter, other in ((one, "o_proj"), (two, "qkv_proj")):
        words = said(lambda adapter=adapter: adapter.save(model, tmp_path / "folder"))
        assert words == f"adapter: blocks.0.{other} has another one, which no folder of this adapter holds; merge instead"
    assert not (tmp_path / "folder").exists()


def test_beside_another_adapter_nothing_is_exported_and_no_task_comes(tmp_path):
    model = Toy()
    tasks, experts = BESIDE["mtl_lora"](targets=["qkv_proj"]), BESIDE["task"](targets=["o_proj"])
    tasks.apply(model)
    experts.apply(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    assert "which no folder of this adapter holds" in said(lambda: tasks.export_peft(model, "a", tmp_path / "folder"))
    assert "blocks.0.o_proj has another one, which would have no such task" in said(lambda: tasks.add_task(model, "new", "a"))
    assert task_ids(model).names == tasks.tasks == ("a", "b", "c") and not (tmp_path / "folder").exists()
    assert model.state_dict().keys() == before.keys() and trained == [p.requires_grad for p in model.parameters()]
    by_mode, model = moe("modality", targets=["qkv_proj"]), Toy()
    by_mode.apply(model)
    lora(targets=["o_proj"]).apply(model)
    assert "which no folder of this adapter holds" in said(lambda: by_mode.save_expert(model, next(iter(by_mode.experts)), tmp_path))


def test_a_merge_that_outgrows_the_dtype():
    """B A is finite in float32, and the weight is float16."""
    adapter, model = lora(), Toy().half()
    adapter.apply(model)
    awaken(model).blocks[1].down_proj.lora_B.weight.data *= 1e6  # the last layer, so that others come before it
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = said(lambda: merge(model))
    assert words == "adapter.merge: the merged weight of blocks.1.down_proj is too large for torch.float16; nothing was merged"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", [lora, dora, lambda **changes: mtl_lora(tasks=["a"], **changes), lambda: moe("modality")])
def test_nothing_is_read_into_a_merged_adapter(tmp_path, make):
    adapter, model = adapted(make)
    adapter.save(model, tmp_path)
    holder = task_ids(model)
    if len(holder.names):
        holder.set(0)
    expected = model(ids())
    merge(model, 0 if holder.names else None)
    words = said(lambda: adapter.load(model, tmp_path))
    assert words == f"{tmp_path}: cannot be read into a merged adapter, whose weights would stay as they are; unmerge it first"
    unmerge(model)
    adapter.load(model, tmp_path)
    assert torch.equal(model(ids()), expected)


def test_an_adapter_that_is_switched_off_is_not_merged():
    _, model = adapted()
    with disabled(model):
        assert "the adapter is switched off" in said(lambda: merge(model))
        assert torch.equal(model(ids()), Toy()(ids()))
    assert merge(model)["modules"] == 8


def test_what_is_no_file_of_torch_is_told_in_our_words(tmp_path):
    adapter, model = adapted(mtl_lora)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    for content in (b"", b"text", b"\x80\x04cos\nsystem\n."):
        (tmp_path / "model.pt").write_bytes(content)
        words = said(lambda: adapter.load(model, tmp_path / "model.pt"))
        assert words == f"{tmp_path / 'model.pt'}: is no file of tensors by name that torch.save wrote"
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


@pytest.mark.parametrize(
    ("r", "pattern", "room"), [(2, {}, 8), (16, {}, 16), (17, {}, 32), (4, {"o_proj": 100}, 128), (300, {"o_proj": 3}, 320), (512, {}, 512)]
)
def test_the_command_for_vllm_has_room_for_the_largest_rank(tmp_path, r, pattern, room):
    for name, changes in (("a", {"r": 1}), ("b", {"r": r, "rank_pattern": pattern})):
        adapter, model = adapted(**changes)
        adapter.save(model, tmp_path / name)
    assert f"enable_lora=True, max_lora_rank={room}) and LoRARequest('a', 1," in adapter_usage("vllm", tmp_path, tmp_path / "a")
