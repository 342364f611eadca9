"""adapter.fused: blocks of fused projections of models that do not name them, and one Lambda for each."""

import pytest
import torch
from torch import nn

from components.adapters.base import adapter_layers, adapter_state, merge, task_ids, unmerge
from components.adapters.base.fused import fused_rows
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, ids, mtl_lora, relative

PHI3 = {"fused": {"qkv_proj": ["q", "k", "v"], "gate_up_proj": ["gate", "up"]}, "targets": ["qkv_proj", "gate_up_proj", "o_proj"]}
GPT2 = {"fused": {"c_attn": ["q", "k", "v"]}, "targets": ["c_attn", "c_fc"]}


def foreign() -> nn.Module:
    """Toy without `roles` and `fused_splits`: another class around the same modules."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = Toy()
            self.embed, self.blocks, self.head = inner.embed, inner.blocks, inner.head

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Plain()


def phi3() -> nn.Module:
    """Four heads of q, two of k and of v, of 4 numbers each: rows 16, 8, 8."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    config = transformers.Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    return transformers.Phi3ForCausalLM(config).eval()


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {"phi3": (phi3, PHI3), "gpt2": (gpt2, GPT2)}
TARGETS = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]


def adapted(make, **changes):
    adapter, model = mtl_lora(**changes), make()
    torch.manual_seed(3)
    adapter.apply(model)
    task_ids(model).set("b")
    return adapter, awaken(model).eval()


@pytest.mark.parametrize("blocks", [["q", "k", "v"], [8, 8, 8]], ids=["names", "rows"])
def test_a_mapping_is_what_a_model_of_ours_says_itself(blocks):
    _, ours = adapted(Toy, targets=TARGETS)
    _, theirs = adapted(foreign, targets=TARGETS, fused={"qkv_proj": blocks, "gate_up_proj": ["gate", "up"]})
    assert {n: p.shape for n, p in adapter_state(ours).items()} == {n: p.shape for n, p in adapter_state(theirs).items()}
    assert torch.equal(ours(ids()), theirs(ids()))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers(name, tmp_path):
    """Identity at the start; each Lambda moves the rows of its own block alone; PEFT reads a task and gives the same logits; merging."""
    make, changes = MODELS[name]
    peft = pytest.importorskip("peft")
    adapter, model = mtl_lora(**changes), make()
    base = model(ids()).logits
    adapter.apply(model)
    task_ids(model).set("b")
    assert torch.equal(model(ids()).logits, base)
    awaken(model)
    splits = {place: layer.splits for place, layer in adapter_layers(model) if len(layer.splits) > 1}
    expected = {"phi3": {"qkv_proj": (16, 8, 8), "gate_up_proj": (24, 24)}, "gpt2": {"c_attn": (8, 8, 8)}}[name]
    assert len(splits) == 2 * len(expected) and all(rows == expected[place.rpartition(".")[2]] for place, rows in splits.items())
    layer = model.get_submodule(next(iter(splits)))
    x = torch.randn(2, 3, layer.in_features)
    before = layer(x)
    with torch.no_grad():
        layer.lora_lambdas[1, 1] += 1  # of task b, the second block
    moved = (layer(x) != before).any(0).any(0).tolist()
    assert moved == [False] * layer.splits[0] + [True] * layer.splits[1] + [False] * sum(layer.splits[2:])
    logits = model(ids()).logits
    assert relative(logits, base) > 1e-2
    adapter.export_peft(model, "b", tmp_path)
    assert relative(peft.PeftModel.from_pretrained(make(), tmp_path).eval()(ids()).logits, logits) < 1e-6
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    merge(model, "b")
    assert relative(model(ids()).logits, logits) < 1e-5
    unmerge(model)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_a_folder_remembers_the_blocks(tmp_path):
    adapter, model = adapted(phi3, **PHI3)
    adapter.save(model, tmp_path)
    again, other = mtl_lora(**{**PHI3, "fused": {"qkv_proj": [16, 8, 8], "gate_up_proj": [24, 24]}}), phi3()
    again.apply(other)
    again.load(other, tmp_path)  # the same in other words
    task_ids(other).set("b")
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    wrong, third = mtl_lora(**{**PHI3, "fused": {"qkv_proj": [8, 8, 16], "gate_up_proj": [24, 24]}}), phi3()
    wrong.apply(third)
    with pytest.raises(UserError, match=r"qkv_proj has blocks of \[16, 8, 8\] rows; that of this model has \[8, 8, 16\]"):
        wrong.load(third, tmp_path)


def test_order_of_the_names_is_the_order_of_the_blocks():
    assert fused_rows(phi3(), {"qkv_proj": ["k", "q", "v"]}, ["model.layers.0.self_attn.qkv_proj"]) == {
        "model.layers.0.self_attn.qkv_proj": (8, 16, 8)
    }


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (foreign, {}, "adapter.split_fused: true, but a Plain does not say which projections are fused; name them, such as adapter.fused="),
        (foreign, {"fused": {"qkv": ["q", "k", "v"]}}, "adapter.fused.qkv: no wrapped module's name ends in it; nearest: blocks."),
        (foreign, {"fused": {"proj": ["q", "k", "v"]}}, "adapter.fused.proj: no wrapped module's name ends in it"),  # at dots
        (foreign, {"fused": {"qkv_proj": [8, 8]}}, "adapter.fused.qkv_proj: 8, 8 are 16 rows, but blocks.0.qkv_proj has 24"),
        (foreign, {"fused": {"gate_up_proj": ["a", "b", "c"]}}, "adapter.fused.gate_up_proj: 32 rows of blocks.0.gate_up_proj are not 3"),
        (foreign, {"fused": {"qkv_proj": ["q", 8, 8]}}, "adapter.fused.qkv_proj: ['q', 8, 8]; needed are names"),
        (foreign, {"fused": {"qkv_proj": ["q", "q"]}}, "adapter.fused.qkv_proj: ['q', 'q']; needed are names"),
        (foreign, {"fused": {"qkv_proj": ["q"]}}, "adapter.fused.qkv_proj: ['q']; needed are names"),
        (foreign, {"fused": {"qkv_proj": "qkv"}}, "adapter.fused.qkv_proj: 'qkv'; needed are names"),
        (foreign, {"fused": {"qkv_proj": [24, 0]}}, "adapter.fused.qkv_proj: [24, 0]; needed are names"),
        (foreign, {"fused": {"qkv_proj": [8, 8, 8]}, "split_fused": False}, "adapter.fused: set, but adapter.split_fused=false"),
        (Toy, {"fused": {"qkv_proj": [8, 8, 8]}}, "adapter.fused.qkv_proj: blocks.0.qkv_proj has blocks of 8, 8, 8 rows already; drop it"),
        (
            foreign,
            {"fused": {"qkv_proj": [8, 8, 8], "blocks.0.qkv_proj": [16, 8]}},
            "adapter.fused.blocks.0.qkv_proj: blocks.0.qkv_proj has blocks of 8, 8, 8 rows already",
        ),
    ],
)
def test_mistakes_are_named_and_change_nothing(make, changes, words):
    model = make()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UserError) as caught:
        mtl_lora(targets=TARGETS, **changes).apply(model)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value), str(caught.value)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_rows_that_heads_do_not_divide():
    class Config:
        num_attention_heads, num_key_value_heads = 5, 1

    model = foreign()
    model.config = Config()
    with pytest.raises(UserError) as caught:
        mtl_lora(targets=TARGETS, fused={"qkv_proj": ["q", "k", "v"]}).apply(model)
    assert str(caught.value) == (
        "adapter.fused.qkv_proj: 24 rows of blocks.0.qkv_proj are not 5 of q and 1 of k and 1 of v; give the rows of each block, such as "
        "[64, 16, 16]"
    )


def test_a_second_adapter_is_refused_as_such():
    adapter, model = adapted(foreign, targets=TARGETS, fused={"qkv_proj": ["q", "k", "v"]})
    with pytest.raises(UserError, match="has an adapter already"):
        adapter.apply(model)
