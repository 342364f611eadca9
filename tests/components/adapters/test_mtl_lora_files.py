"""MTL-LoRA (arXiv 2410.09437) in files: of ours, of PEFT and of the published code; tasks that come later."""

import json

import pytest
import torch

from components.adapters.base import adapter_state, task_ids
from components.adapters.lora import LoRA
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, ids, mtl_lora, relative

TASKS = ("a", "b", "c", "d")
PARTS = ["lora_A", "lora_lambdas", "lora_B", "lora_B_w"]


@pytest.mark.parametrize("changes", [{}, {"lambda_type": "diag", "use_rslora": True}, {"lambda_type": "none", "split_fused": False}])
def test_a_task_exported_is_the_same_lora_in_peft(tmp_path, changes):
    peft = pytest.importorskip("peft")
    adapter, model = mtl_lora(**changes), Toy()
    adapter.apply(model)
    awaken(model).eval()
    task_ids(model).set("b")
    expected = model(ids())
    adapter.export_peft(model, "b", tmp_path)
    theirs = peft.PeftModel.from_pretrained(Toy(), tmp_path).eval()
    assert theirs.peft_config["default"].r == 2
    assert relative(theirs(ids()), expected) < 1e-6
    ours, plain = Toy(), LoRA.from_folder(tmp_path)
    plain.apply(ours)
    plain.load(ours, tmp_path)
    assert relative(ours.eval()(ids()), expected) < 1e-6


def saved(tmp_path, **changes):
    adapter, model = mtl_lora(**changes), Toy()
    adapter.apply(model)
    adapter.save(awaken(model), tmp_path)
    return model


def outputs(model, names) -> list[torch.Tensor]:
    found = []
    for name in names:
        task_ids(model).set(name)
        found.append(model(ids()))
    return found


def test_folder_round_trip_goes_by_the_names_of_tasks(tmp_path):
    model = saved(tmp_path)
    expected = outputs(model, "abc")
    for order in ("abc", "cab"):
        adapter, other = mtl_lora(tasks=list(order)), Toy()
        adapter.apply(other)
        adapter.load(other, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(outputs(other, "abc"), expected, strict=True))
    assert sorted({name.rpartition(".")[2] for name in adapter_state(model)}) == sorted(PARTS)


def test_loading_is_strict(tmp_path):
    saved(tmp_path)

    def refused(words: str, **changes) -> None:
        adapter, other = mtl_lora(**changes), Toy()
        adapter.apply(other)
        before = {name: value.clone() for name, value in adapter_state(other).items()}
        with pytest.raises(UserError) as caught:
            adapter.load(other, tmp_path)
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in adapter_state(other).items())

    refused("its tasks are a, b, c; this adapter has a, b, d", tasks=["a", "b", "d"])
    refused("its tasks are a, b, c; this adapter has a, b", tasks=["a", "b"])
    refused("r is 2; this adapter has 3", r=3)
    refused("tau is 0.5; this adapter has 0.1", tau=0.1)
    refused("lambda_type is full; this adapter has diag", lambda_type="diag")
    refused("split_fused is True; this adapter has False", split_fused=False)
    refused("which this model has no place for", targets=["o_proj"])
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "LORA"}))
    refused("peft_type is LORA; only MTL_LORA can be read")
    (tmp_path / "adapter_model.safetensors").unlink()
    refused("adapter_model.safetensors: no such file")


def test_a_file_of_the_published_code_is_read(tmp_path):
    """There A has a leading 1, and a wrapped model's names begin with `module.`."""
    model = saved(tmp_path, split_fused=False)
    state = {f"module.{name}": value[None] if name.endswith("lora_A") else value for name, value in adapter_state(model).items()}
    torch.save(state, tmp_path / "model.pt")
    adapter, other = mtl_lora(split_fused=False), Toy()
    adapter.apply(other)
    adapter.load_reference(other, tmp_path / "model.pt")
    assert all(torch.equal(a, b) for a, b in zip(outputs(other, "abc"), outputs(model, "abc"), strict=True))
    for found, words in (
        (state | {"module.lora_scaler": torch.zeros(())}, "no place for"),
        ({"x": 1}, "other things than tensors"),
        (Toy(), "is no file of tensors by name that torch.save wrote$"),
    ):
        torch.save(found, tmp_path / "model.pt")
        with pytest.raises(UserError, match=words):
            adapter.load_reference(other, tmp_path / "model.pt")


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("source", ["b", "mean"])
def test_a_task_added_leaves_the_others_bit_for_bit(tmp_path, source, by_token):
    adapter, model = mtl_lora(), Toy()
    adapter.apply(model)
    awaken(model)
    holder = task_ids(model)
    chosen = torch.tensor([[0, 1, 2, 1, 0]] * 3) if by_token else torch.tensor([0, 1, 2])
    holder.set(chosen)
    before = model(ids())
    adapter.add_task(model, "new", source)
    assert holder.names == ("a", "b", "c", "new")
    assert torch.equal(model(ids()), before)
    holder.set("new")
    fresh = model(ids())
    if source == "b":
        holder.set("b")
        assert torch.equal(model(ids()), fresh)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_lambdas_new", "lora_B_w_new"} and len(trained) == 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        holder.set(torch.tensor([3, 0, 3]))
        optimizer.zero_grad()
        model(ids()).square().mean().backward()
        optimizer.step()
    holder.set(chosen)
    assert torch.equal(model(ids()), before)
    holder.set("new")
    after = model(ids())
    assert relative(after, fresh) > 1e-3
    adapter.save(model, tmp_path)
    again, other = mtl_lora(tasks=["a", "b", "c", "new"]), Toy()
    again.apply(other)
    again.load(other, tmp_path)
    assert torch.equal(outputs(other, ["new"])[0], after)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).zero_()
    adapter.load(model, tmp_path)  # into rows that are parameters of their own
    assert torch.equal(outputs(model, ["new"])[0], after)
    adapter.add_task(model, "newer", "new")
    assert torch.equal(outputs(model, ["newer"])[0], after)
    for name in ("a", "newer", "mean"):
        with pytest.raises(UserError, match="is taken"):
            adapter.add_task(model, name, "a")
