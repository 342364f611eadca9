"""Bases that are not one plain weight a module: tied weights, and quantised ones."""

import copy

import pytest
import torch
from torch import Tensor, nn

from components.adapters.base import adapter_layers, adapter_state, merge, parameter_roles, task_ids, unmerge, unwrap
from components.adapters.base.leaves import applied_weight, is_quantised
from components.adapters.lora import LoRA
from components.contracts import Batch, UserError
from framework.build import build_model, compose
from tests.components.adapters.helpers import Toy, awaken, dora, ids, lora, mtl_lora, relative
from tests.components.adapters.moe_helpers import moe


def embedded(model: nn.Module) -> nn.Module:
    """A value for what starts as zero in the adapter of an embedding."""
    for name, p in model.named_parameters():
        if name.endswith("lora_embedding_A"):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    return model


# ------------------------------------------------------------------------------------------------ tied


@pytest.mark.parametrize("make", [lora, dora, mtl_lora, moe])
def test_a_tied_module_is_adapted_in_its_own_place(make):
    """Both blocks use one o_proj weight; an adapter on the first leaves the second as it is, and is not merged."""

    def tied() -> Toy:
        model = Toy()
        model.blocks[1].o_proj.weight = model.blocks[0].o_proj.weight
        return model

    targets = r"blocks\.0\.o_proj"
    with pytest.raises(
        UserError, match=r"blocks\.0\.o_proj shares its weight with blocks\.1\.o_proj; leave it out by adapter\.exclude, or"
    ):
        make(targets=targets).apply(tied())
    model, base = tied(), tied()
    assert list(make(targets=targets, allow_tied=True).apply(model)["modules"]) == ["blocks.0.o_proj"]
    task = "b" if task_ids(model).names else None
    task_ids(model).set(task)
    assert torch.equal(model(ids()), base(ids()))
    awaken(model).eval()
    x = torch.randn(2, 3, 8)
    assert relative(model.blocks[0].o_proj(x), base.blocks[0].o_proj(x)) > 1e-2
    assert torch.equal(model.blocks[1].o_proj(x), base.blocks[1].o_proj(x))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        merge(model, task)
    if make is not moe:  # of a token router another line says that it never is
        words = "adapter.merge: true, but blocks.0.o_proj shares its weight with blocks.1.o_proj, which would change too; leave it unmerged"
        assert str(caught.value) == words
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_embedding_is_read_by_peft(tmp_path):
    """As PEFT does it: the head goes on with the weight without adapter."""
    peft = pytest.importorskip("peft")
    adapter, ours = lora(targets=["embed"], allow_tied=True), Toy(tied=True)
    adapter.apply(ours)
    adapter.save(embedded(awaken(ours)), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Toy(tied=True), tmp_path).eval()
    assert relative(theirs(ids()), ours.eval()(ids())) < 1e-6 and relative(ours(ids()), Toy(tied=True)(ids())) > 1e-2
    with pytest.raises(UserError, match="embed shares its weight with head, which would change too"):
        merge(ours)


def test_the_embedding_that_the_head_of_our_model_reads():
    """There the head has no module of its own; its weight is the base's, and is no adapter's."""
    torch.manual_seed(0)
    model = build_model(compose("train", ["model=phi4mini", "model/size=test", "model.tie_embeddings=true"]), 16)
    batch, weight, flops = Batch(torch.arange(12).view(2, 6)), model.head_weight, model.forward_flops(6)
    base = model.logits(model(batch).hidden)
    with pytest.raises(
        UserError, match=r"adapter\.targets: embed_tokens shares its weight with the head; leave it out by adapter\.exclude"
    ):
        lora(targets="role:embedding").apply(model)
    lora(targets="role:embedding", allow_tied=True).apply(model)
    assert model.head_weight is weight and model.forward_flops(6) >= flops
    assert torch.equal(model.logits(model(batch).hidden), base)
    embedded(awaken(model))
    found = model.logits(model(batch).hidden)
    assert relative(found, base) > 1e-2
    found.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapter_state(model))
    assert parameter_roles(model)["embed_tokens.base_layer.weight"] == "embedding"
    with pytest.raises(UserError, match="embed_tokens shares its weight with the head, which would change too; leave it unmerged"):
        merge(model)


def test_an_embedding_that_the_head_reads_is_trained_in_full():
    """It is stored under one name and changes in both places, so nothing is ambiguous."""
    model = build_model(compose("train", ["model=phi4mini", "model/size=test", "model.tie_embeddings=true"]), 16)
    lora(targets="role:qkv", modules_to_save=["embed_tokens"]).apply(model)
    assert "embed_tokens.weight" in adapter_state(model) and model.head_weight.requires_grad


# ------------------------------------------------------------------------------------------------ quantised


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and a scale a row, as quantised layers are built: no nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rows = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.rows).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.rows).T


@pytest.mark.parametrize("make", [lora, mtl_lora])
def test_a_quantised_base_trains_unmerged_and_is_never_merged(make):
    model = Toy()
    for block in model.blocks:
        block.o_proj = Int8Linear(block.o_proj)
    base = model(ids())
    make().apply(model)
    if task_ids(model).names:
        task_ids(model).set("b")
    assert torch.equal(model(ids()), base)
    awaken(model)(ids()).square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "o_proj.lora_B" in name and "lora_B_w" not in name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"the weight of blocks\.0\.o_proj is quantised \(torch\.int8\); run it unmerged"):
        merge(model, "b" if task_ids(model).names else None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dora_needs_a_weight_with_lengths():
    model = Toy()
    model.blocks[1].o_proj = Int8Linear(model.blocks[1].o_proj)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UserError, match=r"dora needs the lengths of the weight's rows, and torch\.int8 has none"):
        dora().apply(model)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def quantised_toy() -> Toy:
    model = Toy()
    for block in model.blocks:
        block.o_proj = Int8Linear(block.o_proj)
    return model


@pytest.mark.parametrize("make", [lora, mtl_lora])
def test_a_quantised_base_is_merged_into_a_dense_copy(make):
    """Logits as before, no integer left in the wrapped modules, nothing quantised anew; unmerging brings the quantised layer back."""
    model = quantised_toy()
    make().apply(model)
    task = "b" if task_ids(model).names else None
    task_ids(model).set(task)
    awaken(model).eval()
    before, logits, layers = copy.deepcopy(model.state_dict()), model(ids()), dict(adapter_layers(model))
    packed = layers["blocks.0.o_proj"].base_layer
    assert merge(model, task, dequantize=True)["modules"] == len(layers)
    dense = layers["blocks.0.o_proj"].base_layer
    assert type(dense) is nn.Linear and dense.weight.dtype == torch.float32 and not dense.weight.requires_grad
    assert relative(model(ids()), logits) < 1e-5
    with pytest.raises(UserError, match="merged weights cannot be trained"):
        model.train()(ids())
    unmerge(model)
    assert layers["blocks.0.o_proj"].base_layer is packed and torch.equal(model.eval()(ids()), logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merge(model, task, dequantize=True)
    unwrap(model)
    assert type(model.blocks[0].o_proj) is nn.Linear and relative(model(ids()), logits) < 1e-5


def test_what_a_quantised_layer_applies_without_its_bias():
    """Read off its answers: also with more inputs than are asked at a time, and whatever the bias."""
    plain = nn.Linear(1030, 3)
    packed = Int8Linear(plain)
    packed.bias = nn.Parameter(torch.full((3,), 1e4))
    assert torch.equal(applied_weight(packed), packed.weight * packed.rows) and packed.bias[0] == 1e4
    assert is_quantised(packed) and not is_quantised(plain) and not is_quantised(plain.to(torch.bfloat16))
    assert is_quantised(nn.Linear(2, 2).to(torch.float8_e4m3fn))


def test_a_dense_copy_has_the_dtype_of_the_model():
    model = quantised_toy()
    for part in (model.embed, model.head, *(m for block in model.blocks for m in (block.norm, block.qkv_proj, block.gate_up_proj))):
        part.bfloat16()
    lora(targets=["o_proj"]).apply(model)
    lost = merge(awaken(model).eval(), dequantize=True)["max_rounding"]
    assert model.blocks[0].o_proj.base_layer.weight.dtype == torch.bfloat16 and 0 < lost < 0.01


def test_nothing_is_replaced_where_one_adapter_cannot_be_merged():
    model = quantised_toy()
    lora(targets=["o_proj"]).apply(model)
    with torch.no_grad():
        awaken(model).blocks[1].o_proj.lora_B.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.o_proj holds NaN or infinity; nothing was merged"):
        merge(model, dequantize=True)
    assert all(type(layer.base_layer) is Int8Linear and not layer.merged for _, layer in adapter_layers(model))


def test_packed_layers_of_torch_ao_are_refused():
    """They give their input no gradient, so that adapters below them would learn nothing."""
    dynamic = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    model = nn.ModuleDict({"w": dynamic.Linear(4, 4), "plain": nn.Linear(4, 4)})
    with pytest.raises(UserError) as caught:
        lora(targets=["w"]).apply(model)
    assert "matches w, a Linear with packed weights, through which torch.ao passes no gradient; only nn.Linear" in str(caught.value)
    assert list(lora(targets="all-linear").apply(model)["modules"]) == ["plain"]


def library_layers() -> dict[str, nn.Module]:
    """(64, 32) layers of the libraries that are there."""
    found: dict[str, nn.Module] = {}
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    bnb, ao = pytest.importorskip("bitsandbytes"), pytest.importorskip("torchao.quantization")
    for name, layer in {
        "4bit": bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32),
        "8bit": bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
    }.items():
        layer.load_state_dict(plain.state_dict())
        found[name] = layer.to("cpu")
    found["torchao"] = copy.deepcopy(plain)
    ao.quantize_(found["torchao"], ao.Int8WeightOnlyConfig())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4bit", "8bit", "torchao"])
def test_layers_of_bitsandbytes_and_torchao(name):
    """Adapted, trained beside, refused, merged into a dense copy, and put back."""
    model = nn.ModuleDict({"w": library_layers()[name]})
    x = torch.randn(5, 64)
    base = model["w"](x)
    adapter: LoRA = lora(targets=["w"])
    adapter.apply(model)
    assert is_quantised(model["w"].base_layer) and torch.equal(model["w"](x), base)
    awaken(model)["w"](x).square().sum().backward()
    assert model["w"].lora_A.weight.grad.any()
    model.eval()
    with pytest.raises(UserError, match="the weight of w is quantised"):
        merge(model)
    before = model["w"](x)
    merge(model, dequantize=True)
    # LLM.int8 rounds the inputs to 8 bits too, and 4 bits are multiplied in bfloat16 on some processors; a dense copy does neither.
    assert type(model["w"].base_layer) is nn.Linear and relative(model["w"](x), before) < (1e-5 if name == "torchao" else 1e-2)
    unmerge(model)
    assert torch.equal(model["w"](x), before)
