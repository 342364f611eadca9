"""Conv1D of transformers and nn.Embedding as wrapped leaves: adapters on a weight that lies (in, out), and PEFT's folder of both."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from components.adapters.base import adapter_layers, adapter_state, merge, parameter_roles, task_ids, unmerge, unwrap
from components.adapters.base.leaves import leaf_of
from components.adapters.dora import DoRA
from components.adapters.lora import LoRA
from components.contracts import Batch, UserError
from framework.build import build_model, compose
from tests.components.adapters.helpers import Toy, awaken, dora, ids, lora, mtl_lora, relative
from tests.components.adapters.moe_helpers import moe

MAKERS = {"lora": lora, "dora": dora, "mtl_lora": mtl_lora}
MAKERS |= {f"moe_{router}": partial(moe, router) for router in ("modality", "task", "token")}


def turned(linear: nn.Linear) -> nn.Module:
    """The same map as a Conv1D."""
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(linear.out_features, linear.in_features)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.zero_() if linear.bias is None else conv.bias.copy_(linear.bias)
    return conv


def conv_toy() -> Toy:
    model = Toy()
    for block in model.blocks:
        for name in ("qkv_proj", "o_proj"):
            setattr(block, name, turned(getattr(block, name)))
    return model


def adapted(make, model, **changes):
    """The adapter and the wrapped model, with the same adapter weights whichever model it is."""
    adapter = make(**changes)
    torch.manual_seed(3)
    adapter.apply(model)
    if task_ids(model).names:
        task_ids(model).set(1)
    return adapter, awaken(model).eval()


def embedded(model: nn.Module) -> nn.Module:
    """A value for what starts as zero in the adapter of an embedding."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if name.endswith("lora_embedding_A"):
            p.data.normal_(generator=generator)
    return model


def test_shapes():
    assert leaf_of(turned(nn.Linear(3, 5)))[:2] == leaf_of(nn.Linear(3, 5))[:2] == leaf_of(nn.Embedding(3, 5))[:2] == (3, 5)
    assert [leaf_of(m).transposed for m in (turned(nn.Linear(3, 5)), nn.Linear(3, 5), nn.Embedding(3, 5))] == [True, False, True]
    assert leaf_of(nn.LayerNorm(3)) is None and leaf_of(nn.Conv1d(3, 5, 1)) is None  # torch's own is another thing


@pytest.mark.parametrize("name", MAKERS)
def test_conv1d_is_the_linear_layer_that_it_is(name):
    """Equal outputs and gradients of the adapter as on the nn.Linear with the transposed weight, which other tests hold to its equation."""
    found = []
    for model in (Toy(), conv_toy()):
        base = model(ids())
        fresh = copy.deepcopy(model)
        adapter = MAKERS[name](targets=["qkv_proj", "o_proj"])
        adapter.apply(fresh)
        if task_ids(fresh).names:
            task_ids(fresh).set(1)
        assert torch.equal(fresh(ids()), base)  # identity at the start
        _, model = adapted(MAKERS[name], model, targets=["qkv_proj", "o_proj"])
        out = model(ids())
        out.square().sum().backward()
        found.append((out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, gradients), (theirs, others) = found
    assert gradients.keys() == others.keys()
    assert relative(theirs, ours) < 1e-5 and relative(ours, Toy()(ids())) > 1e-2
    assert all(relative(others[n], g) < 1e-4 for n, g in gradients.items() if g.any()), name  # float32; 1e-6 measured


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "moe_token"])
def test_conv1d_merged_equals_unmerged_and_unmerging_restores_every_bit(name):
    _, model = adapted(MAKERS[name], conv_toy(), targets=["qkv_proj", "o_proj"])
    task = 1 if task_ids(model).names else None
    before, expected = copy.deepcopy(model.state_dict()), model(ids())
    assert merge(model, task)["modules"] == 4
    weight = "blocks.0.o_proj.base_layer.weight"
    assert not torch.equal(model.state_dict()[weight], before[weight]) and model.state_dict()[weight].is_contiguous()
    assert relative(model(ids()), expected) < 1e-5
    unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merge(model, task)
    unwrap(model)
    assert relative(model(ids()), expected) < 1e-5


def test_embedding_equation_in_float64_and_its_padding():
    """y_i = E_i + scale * A_i' B', and no gradient for the row of padding_idx."""
    model = nn.ModuleDict({"e": nn.Embedding(6, 4, padding_idx=2).double()})
    base, tokens = model["e"].weight.detach().clone(), torch.tensor([[0, 2, 5], [5, 1, 2]])
    lora(targets=["e"], dropout=0.5).apply(model)
    layer = model["e"]
    assert torch.equal(layer(tokens), base[tokens]) and layer.lora_embedding_B.std() > 0  # identity, and B has a start to learn from
    a, b = embedded(model)["e"].lora_embedding_A, layer.lora_embedding_B
    assert a.dtype == torch.float64 and a.shape == (2, 6) and b.shape == (4, 2)
    out = layer.train()(tokens)
    assert relative(out, base[tokens] + 3.0 * (b @ a[:, tokens.flatten()]).T.view(2, 3, 4)) < 1e-14
    out.square().sum().backward()
    assert not a.grad[:, [2, 3, 4]].any() and a.grad[:, [0, 1, 5]].any(0).all() and b.grad.any()
    assert layer.base_layer.weight.grad is None


def test_embedding_merges_and_unmerges_to_the_bit():
    model = Toy()
    report = lora(targets=["embed", "o_proj"]).apply(model)
    assert report["modules"]["embed"] == 2 * (11 + 8)
    embedded(awaken(model)).eval()
    before, expected = copy.deepcopy(model.state_dict()), model(ids())
    merge(model)
    assert relative(model(ids()), expected) < 1e-5 and not torch.equal(model.embed.base_layer.weight, before["embed.base_layer.weight"])
    unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_embedding_alone_in_bfloat16_is_felt_and_starts_as_its_base():
    model = Toy().bfloat16()
    before = model(ids())
    lora(targets="role:embedding").apply(model)
    assert torch.equal(model(ids()), before)
    assert {p.dtype for p in adapter_state(model).values()} == {torch.float32}
    assert relative(embedded(model)(ids()).float(), before.float()) > 1e-2


def test_an_embedding_of_our_model_decodes_and_learns():
    """The model asks nothing of its embedding but to be called."""
    torch.manual_seed(0)
    model = build_model(compose("train", ["model=phi4mini", "model/size=test", "model.tie_embeddings=false"]), 16)
    batch = Batch(torch.arange(12).view(2, 6))
    base = model(batch).hidden
    lora(targets="role:embedding", r=4).apply(model)
    embedded(awaken(model))(batch).hidden.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == set(adapter_state(model))
    with torch.no_grad():
        state = model.eval().new_state(2, 6)
        parts = [model(Batch(piece), state).hidden for piece in batch.input_ids.split(3, dim=1)]
        whole = model(batch).hidden
    assert relative(torch.cat(parts, 1), whole) < 1e-5 and relative(whole, base) > 1e-2
    assert parameter_roles(model)["embed_tokens.lora_embedding_A"] == "adapter"


def test_all_linear_leaves_embeddings_alone_and_takes_conv1d():
    model = conv_toy()
    lora(targets="all-linear").apply(model)
    assert "embed" not in dict(adapter_layers(model)) and "blocks.0.o_proj" in dict(adapter_layers(model))


def test_tied_embeddings_are_refused_and_a_rank_can_be_matched_beside_them(tmp_path):
    with pytest.raises(UserError, match=r"adapter\.targets: embed shares its weight with head; leave it out by adapter\.exclude"):
        lora(targets=["embed"]).apply(Toy(tied=True))
    adapter, model = lora(targets=["embed"], r=None, match_parameters=5 * 19), Toy()
    assert adapter.apply(model)["trainable"] == 5 * 19
    adapter.save(model, tmp_path)
    assert LoRA.from_folder(tmp_path).r == 5


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "lora"])
def test_only_lora_wraps_embeddings(name):
    with pytest.raises(UserError) as caught:
        MAKERS[name](targets=["embed", "o_proj"]).apply(Toy())
    words = "adapter.targets: ['embed', 'o_proj'] matches embed, an embedding, which only adapter=lora can wrap; set adapter.exclude"
    assert str(caught.value) == words


def test_an_embedding_that_is_more_than_a_table_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, x):
            return 2 * super().forward(x)

    for module, kind in ((Scaled(3, 4), "a Scaled"), (nn.Embedding(3, 4, max_norm=1.0), "an Embedding with max_norm")):
        with pytest.raises(UserError, match=f"matches e, {kind}; only nn.Linear, Conv1D and nn.Embedding can be wrapped"):
            lora(targets=["e"]).apply(nn.ModuleDict({"e": module}))


@pytest.mark.parametrize("make", [lora, dora])
def test_peft_reads_our_folder(make, tmp_path):
    """Conv1D beside nn.Linear, and for LoRA an embedding; keys equal."""
    peft = pytest.importorskip("peft")
    targets = ["qkv_proj", "o_proj", "down_proj", *(["embed"] if make is lora else [])]
    adapter, ours = adapted(make, conv_toy(), targets=targets)
    adapter.save(embedded(ours), tmp_path)
    theirs = peft.PeftModel.from_pretrained(conv_toy(), tmp_path).eval()
    assert relative(theirs(ids()), ours(ids())) < 1e-6
    state = peft.get_peft_model_state_dict(theirs)
    assert set(state) == {f"base_model.model.{name}" for name in adapter_state(ours)}


@pytest.mark.parametrize("use_dora", [False, True])
def test_we_read_the_folder_of_peft(use_dora, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["qkv_proj", "o_proj", *([] if use_dora else ["embed", "down_proj"])]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=use_dora, fan_in_fan_out=use_dora)
    theirs = embedded(awaken(peft.get_peft_model(conv_toy(), config)))
    for name, p in theirs.named_parameters():
        if "lora_embedding_A" in name:
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path)
    ours, adapter = conv_toy(), (DoRA if use_dora else LoRA).from_folder(tmp_path)
    adapter.apply(ours)
    adapter.load(ours, tmp_path)
    assert relative(ours.eval()(ids()), theirs.eval()(ids())) < 1e-6
    merged = theirs.merge_and_unload()
    merge(ours)
    assert relative(ours(ids()), merged(ids())) < 1e-6


def gpt2(seed: int = 0, tie: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tie)
    return transformers.GPT2LMHeadModel(config).eval()


def test_gpt2_of_transformers(tmp_path):
    """A real model with Conv1D: our folder in PEFT, the merged weights in a model of its own."""
    peft = pytest.importorskip("peft")
    adapter, ours = adapted(lora, gpt2(), targets=["c_attn", "c_proj", "c_fc", "wte", "wpe"])
    adapter.save(embedded(ours), tmp_path)
    expected = ours(ids()).logits
    assert relative(expected, gpt2()(ids()).logits) > 1e-2
    assert relative(peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()(ids()).logits, expected) < 1e-6
    merge(ours)
    unwrap(ours)
    plain = gpt2(seed=1)
    plain.load_state_dict(ours.state_dict())
    assert relative(plain(ids()).logits, expected) < 1e-5
    with pytest.raises(UserError, match=r"(lm_head|transformer\.wte) shares its weight with"):
        lora(targets=["wte"]).apply(gpt2(tie=True))


def test_the_frozen_table_that_peft_stores_beside_an_embedding(tmp_path):
    """PEFT writes the base weight of an embedding by the name embed_tokens: accepted where it is the model's own."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def llama(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False)).eval()

    theirs = peft.get_peft_model(llama(0), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    adapter, ours, other = LoRA.from_folder(tmp_path), llama(0), llama(1)
    adapter.apply(ours)
    adapter.load(ours, tmp_path)
    assert relative(ours(ids()).logits, theirs.eval()(ids()).logits) < 1e-6
    adapter.apply(other)
    with pytest.raises(UserError, match=r"holds another weight of model\.embed_tokens than this model's; load it on the base"):
        adapter.load(other, tmp_path)
