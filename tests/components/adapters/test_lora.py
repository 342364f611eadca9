"""LoRA: equation, identity at the start, gradients, merging, switching, and the folder that PEFT shares with us."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from components.adapters.base import TaskIds, adapter_layers, adapter_state, disabled, merge, set_enabled, task_ids, unmerge
from components.adapters.lora import LoRA, LoRALayer
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, ids, lora, relative


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 2), (True, 6 / math.sqrt(2))])
def test_equation_in_float64(use_rslora, scale):
    """y = x W' + bias + scale * x A' B'."""
    model = nn.ModuleDict({"w": nn.Linear(5, 7).double()})
    base = copy.deepcopy(model["w"])
    lora(targets=["w"], use_rslora=use_rslora).apply(model)
    awaken(model)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    a, b = model["w"].lora_A.weight, model["w"].lora_B.weight
    assert a.dtype == b.dtype == torch.float64
    assert relative(model["w"](x), x @ base.weight.T + base.bias + scale * (x @ a.T) @ b.T) < 1e-14


def test_gradients_are_right():
    layer = LoRALayer(nn.Linear(3, 4).double().requires_grad_(False), TaskIds(), r=2, scale=1.5, dropout=0.0)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    torch.autograd.gradcheck(lambda x, a, b: torch.func.functional_call(layer, {"lora_A.weight": a, "lora_B.weight": b}, (x,)), (x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identity_at_the_start_bit_for_bit(dtype):
    model = Toy().to(dtype)
    before = model(ids())
    lora().apply(model)
    assert torch.equal(model(ids()), before)
    assert all(p.dtype == torch.float32 for p in adapter_state(model).values())


def test_start_of_a_is_kaiming():
    """U(+-1/sqrt(in)): kaiming-uniform with a = sqrt 5."""
    model = nn.ModuleDict({"w": nn.Linear(400, 10)})
    lora(targets=["w"], r=50).apply(model)
    a = model["w"].lora_A.weight
    assert a.abs().max() <= 0.05 and a.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert torch.equal(model["w"].lora_B.weight, torch.zeros(10, 50))


def test_only_the_adapter_learns():
    model = Toy(tied=True)
    lora().apply(model)
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids().flatten()).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) if "lora_" in name else (p.grad is None and torch.equal(p, base[name])), name


def test_every_wrapper_is_felt():
    """One nonzero adapter at a time changes the output."""
    model = Toy()
    before = model(ids())
    lora().apply(model)
    for name, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_B.weight)
        assert not torch.allclose(model(ids()), before), name
        nn.init.zeros_(layer.lora_B.weight)
        assert torch.equal(model(ids()), before)


def test_dropout_acts_on_the_adapter_in_training_only():
    model = Toy()
    lora(dropout=0.5).apply(model)
    awaken(model).train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids()), model(ids()))
    with disabled(model):
        assert torch.equal(model(ids()), model(ids()))
    model.eval()
    assert torch.equal(model(ids()), model(ids()))


def test_merged_equals_unmerged_and_unmerging_restores_every_bit():
    model = Toy()
    lora().apply(model)
    awaken(model).eval()
    before = copy.deepcopy(model.state_dict())
    expected = model(ids())
    report = merge(model)
    assert report["modules"] == 8 and report["max_rounding"] == 0.0
    assert not torch.equal(model.state_dict()["blocks.0.o_proj.base_layer.weight"], before["blocks.0.o_proj.base_layer.weight"])
    assert relative(model(ids()), expected) < 1e-5
    assert merge(model)["modules"] == 0  # once is enough
    assert relative(model(ids()), expected) < 1e-5
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids()), expected)


def test_merging_into_bfloat16_says_what_it_loses():
    model = Toy().to(torch.bfloat16)
    lora().apply(model)
    awaken(model).eval()
    before = copy.deepcopy(model.state_dict())
    largest = max(layer.base_layer.weight.abs().max() + layer.delta_weight().abs().max() for _, layer in adapter_layers(model)).item()
    lost = merge(model)["max_rounding"]
    assert 0 < lost <= largest * 2**-8  # half a unit in the last of 8 bits
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merge_refuses_what_is_not_finite_and_training():
    model = Toy()
    lora().apply(model)
    awaken(model)
    before = copy.deepcopy(model.state_dict())
    model.blocks[1].o_proj.lora_B.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"blocks\.1\.o_proj holds NaN"):
        merge(model)
    model.blocks[1].o_proj.lora_B.weight.data.copy_(before["blocks.1.o_proj.lora_B.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merge(model)
    with pytest.raises(UserError, match="merged weights cannot be trained"):
        model.train()(ids())
    with pytest.raises(UserError, match="unmerge it first"):
        set_enabled(model, False)


def test_disabled_is_the_base_exactly():
    model = Toy()
    base = model(ids())
    lora().apply(model)
    awaken(model)
    adapted = model(ids())
    with disabled(model):
        assert torch.equal(model(ids()), base)
    assert torch.equal(model(ids()), adapted) and not torch.equal(adapted, base)
    set_enabled(model, False)
    with disabled(model):
        pass
    assert torch.equal(model(ids()), base)  # what was off before stays off


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = Toy()
        lora().apply(model)
        awaken(model).train()
        model.checkpointing = checkpointing
        model(ids()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 16
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_autocast_and_deep_copy_and_one_task_holder():
    model = Toy()
    lora().apply(model)
    awaken(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids())
    assert low.dtype == torch.bfloat16 and relative(low.float(), model(ids())) < 2e-2  # 8 bits over six layers; measured 5e-3
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids()), model(ids()))
    assert task_ids(twin) is not task_ids(model)
    for some in (model, twin):
        assert all(layer.task_ids is task_ids(some) for _, layer in adapter_layers(some))


def test_compiles_to_one_graph():
    model = nn.ModuleDict({"w": nn.Linear(4, 4)})
    lora(targets=["w"]).apply(model)
    awaken(model)
    x = torch.randn(2, 4)
    compiled = torch.compile(model["w"], fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model["w"](x))


def test_peft_reads_our_folder(tmp_path):
    peft = pytest.importorskip("peft")
    for targets in ("all-linear", r"blocks\.1\.(o_proj|down_proj)"):
        for use_rslora in (False, True):
            ours = Toy()
            adapter = lora(targets=targets, use_rslora=use_rslora)
            adapter.apply(ours)
            adapter.save(awaken(ours), tmp_path)
            theirs = peft.PeftModel.from_pretrained(Toy(), tmp_path)
            wrapped = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
            assert wrapped == {name for name, _ in adapter_layers(ours)}
            assert relative(theirs(ids()), ours.eval()(ids())) < 1e-6


def test_target_modules_are_short_names_where_they_suffice(tmp_path):
    adapter, model = lora(), Toy()
    adapter.apply(model)
    adapter.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


@pytest.mark.parametrize("target_modules", [["o_proj", "qkv_proj"], r".*\.1\.(down|o)_proj"])
def test_we_read_the_folder_of_peft(tmp_path, target_modules):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=target_modules, exclude_modules=["0.o_proj"])
    theirs = peft.get_peft_model(Toy(), config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    theirs.save_pretrained(tmp_path)
    ours = Toy()
    adapter = LoRA.from_folder(tmp_path)
    adapter.apply(ours)
    adapter.load(ours, tmp_path)
    assert (adapter.r, adapter.alpha, adapter.dropout) == (3, 5, 0.1)
    assert relative(ours.eval()(ids()), theirs.eval()(ids())) < 1e-6
    merged = theirs.merge_and_unload()
    merge(ours)
    assert relative(ours(ids()), merged(ids())) < 1e-6


def test_our_own_folder_round_trip_is_exact(tmp_path):
    adapter, model, again = lora(), Toy(), Toy()
    adapter.apply(model)
    adapter.save(awaken(model), tmp_path)
    adapter.apply(again)
    adapter.load(again, tmp_path)
    assert all(torch.equal(value, adapter_state(again)[name]) for name, value in adapter_state(model).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_loading_is_strict(tmp_path):
    adapter, model = lora(), Toy()
    adapter.apply(model)
    adapter.save(awaken(model), tmp_path)

    def refused(words: str, adapter=adapter, targets=None) -> None:
        other = Toy()
        (lora(targets=targets) if targets else adapter).apply(other)
        before = {name: value.clone() for name, value in adapter_state(other).items()}
        with pytest.raises(UserError) as caught:
            adapter.load(other, tmp_path)
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in adapter_state(other).items())

    refused("r is 2; this adapter has 4", lora(r=4))
    refused("lora_alpha is 6; this adapter has 9", lora(alpha=9))
    refused("use_rslora is False; this adapter has True", lora(use_rslora=True))
    refused("which this model has no place for; nearest: ", targets=["o_proj"])
    config = tmp_path / "adapter_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "use_dora": True}))
    refused("use_dora is True; only use_dora=False can be read")
    config.write_text(json.dumps({**plain, "peft_type": "IA3"}))
    refused("peft_type is IA3; only LORA can be read")
    config.write_text("{")
    refused("damaged adapter")
    config.write_text(json.dumps(plain))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused("damaged adapter")
    weights.unlink()
    refused("adapter_model.safetensors: no such file")


def test_a_folder_that_lacks_tensors_is_refused(tmp_path):
    few, all_of_them = lora(targets=["o_proj"]), lora()
    model, other = Toy(), Toy()
    few.apply(model)
    few.save(model, tmp_path)
    all_of_them.apply(other)
    with pytest.raises(UserError, match=r"lacks 12 of 16 adapter tensors, first 'blocks\.0\.qkv_proj\.lora_A\.weight'"):
        all_of_them.load(other, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"r": 0}, "adapter.r: 0;"), ({"dropout": 1.0}, "adapter.dropout: 1.0;"), ({"alpha": 0}, "adapter.alpha: 0;")],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError) as caught:
        lora(**changes)
    assert str(caught.value).startswith(words)
