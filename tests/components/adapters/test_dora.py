"""DoRA: equation, constant norm, identity at the start, merging, and the folder that PEFT shares with us."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from components.adapters.base import TaskIds, adapter_layers, adapter_state, disabled, merge, unmerge
from components.adapters.dora import DoRA, DoRALayer
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, dora, ids, lora, relative

PEFT_KEYS = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]


def wide_layer(dropout: float = 0.0, bias: bool = True) -> DoRALayer:
    torch.manual_seed(0)
    layer = DoRALayer(nn.Linear(5, 7, bias=bias).double().requires_grad_(False), TaskIds(), r=2, scale=1.5, dropout=dropout)
    return awaken(layer)


def equation(layer: DoRALayer, x: torch.Tensor) -> torch.Tensor:
    """Equation 5 as it stands, with a dense V whose row norms are a constant."""
    v = layer.base_layer.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    return x @ (layer.lora_magnitude_vector / v.norm(dim=1).detach())[None].mul(v.T) + (
        0 if layer.base_layer.bias is None else layer.base_layer.bias
    )


@pytest.mark.parametrize("bias", [True, False])
def test_equation_and_gradients_in_float64(bias):
    layer = wide_layer(bias=bias)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(inputs) == 4
    assert relative(layer(x), equation(layer, x)) < 1e-14
    probe = torch.randn(4, 3, 7, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((f(x) * probe).sum(), inputs) for f in (layer, lambda x: equation(layer, x)))
    assert all(relative(a, b) < 1e-13 for a, b in zip(ours, theirs, strict=True))


def test_dropout_reaches_the_update_alone():
    """base(x) + (m / |V| - 1) W x' + (m / |V|) scale B A x', on the dropped x'."""
    layer = wide_layer(dropout=0.5).train()
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert (dropped == 0).any()
    bias = layer.base_layer.bias
    assert relative(got, layer.base_layer(x) + equation(layer, dropped) - bias - dropped @ layer.base_layer.weight.T) < 1e-14


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_identity_at_the_start_bit_for_bit(dtype, dropout):
    model = Toy().to(dtype)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before = model(ids())
    dora(dropout=dropout).apply(model)
    for _, layer in adapter_layers(model):
        assert torch.equal(layer.gain(), torch.ones_like(layer.gain()))
        assert torch.equal(layer.lora_magnitude_vector, layer.base_layer.weight.to(layer.lora_A.weight.dtype).norm(dim=1))
    assert torch.equal(model.train()(ids()), before)
    merge(model.eval())
    assert all(torch.equal(p, weights[n.replace(".base_layer", "")]) for n, p in model.named_parameters() if "lora_" not in n)


def test_norms_come_from_the_checkpoint_with_the_weights():
    """A run wraps a fresh model and loads the weights after that."""
    model, other = Toy(), Toy()
    dora().apply(model)
    awaken(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    dora().apply(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids()), model(ids()))


def test_a_row_of_zeros_stays_finite():
    layer = wide_layer(bias=False)
    layer.base_layer.weight.data[2] = 0
    layer = DoRALayer(layer.base_layer, TaskIds(), r=2, scale=1.5, dropout=0.0)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)


def test_merged_equals_unmerged_and_unmerging_restores_every_bit():
    model = Toy()
    base = model(ids())
    dora().apply(model)
    awaken(model).eval()
    before = copy.deepcopy(model.state_dict())
    expected = model(ids())
    assert relative(expected, base) > 0.05
    merge(model)
    assert relative(model(ids()), expected) < 1e-5
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with disabled(model):
        assert torch.equal(model(ids()), base)


def test_only_the_adapter_learns_and_the_report_counts_the_lengths():
    model = Toy()
    report = dora(r=3).apply(model)
    sizes = {"qkv_proj": (8, 24), "o_proj": (8, 8), "gate_up_proj": (8, 32), "down_proj": (16, 8)}
    assert report["modules"] == {f"blocks.{i}.{name}": 3 * (a + b) + b for i in (0, 1) for name, (a, b) in sizes.items()}
    awaken(model)(ids()).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.any()) if "lora_" in name else p.grad is None, name


def test_peft_reads_our_folder_and_has_the_same_keys(tmp_path):
    peft = pytest.importorskip("peft")
    adapter, ours = dora(), Toy()
    adapter.apply(ours)
    adapter.save(awaken(ours), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Toy(), tmp_path)
    assert theirs.peft_config["default"].use_dora
    assert relative(theirs(ids()), ours.eval()(ids())) < 1e-6  # measured 1e-7
    state = peft.get_peft_model_state_dict(theirs)
    assert set(state) == {f"base_model.model.{name}" for name in adapter_state(ours)}
    assert sorted({name.split("_proj.")[1] for name in state}) == PEFT_KEYS
    assert all(torch.equal(state[f"base_model.model.{name}"], value) for name, value in adapter_state(ours).items())


def test_we_read_the_folder_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=["o_proj", "qkv_proj"])
    theirs = awaken(peft.get_peft_model(Toy(), config))
    theirs.save_pretrained(tmp_path)
    adapter, ours = DoRA.from_folder(tmp_path), Toy()
    adapter.apply(ours)
    adapter.load(ours, tmp_path)
    assert relative(ours.eval()(ids()), theirs.eval()(ids())) < 1e-6
    merge(ours)
    assert relative(ours(ids()), theirs.merge_and_unload()(ids())) < 1e-6


def test_lora_and_dora_refuse_each_others_folders(tmp_path):
    for one, other, words in (
        (lora(), dora(), "use_dora is False; only use_dora=True"),
        (dora(), lora(), "use_dora is True; only use_dora=False"),
    ):
        model = Toy()
        one.apply(model)
        one.save(model, tmp_path)
        with pytest.raises(UserError, match=words):
            other.load(model, tmp_path)


def test_autocast():
    """8 bits over six layers; the lengths stay float32."""
    model = Toy()
    dora(dropout=0.1).apply(model)
    awaken(model).eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids())
        assert model.blocks[0].o_proj.gain().dtype == torch.float32
        assert torch.isfinite(model.train()(ids())).all()
    assert low.dtype == torch.bfloat16 and relative(low.float(), model.eval()(ids())) < 2e-2


def test_compiles_to_one_graph():
    layer = wide_layer()
    x = torch.randn(2, 5, dtype=torch.float64)
    assert relative(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x)) < 1e-14
