"""router=token, task and modality with what the other adapters have: ranks by module, what is trained in full beside, rsLoRA."""

import json
import math

import pytest
import torch

from components.adapters.base import adapter_layers, adapter_state, merge, parameter_roles, task_ids, unwrap
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, ids, relative
from tests.components.adapters.moe_helpers import SPEECH, VISION, adapted, moe
from tests.components.adapters.test_extras import stir

LEARNED = ["task", "token"]
ROUTERS = ["modality", *LEARNED]
PATTERNS = {"rank_pattern": {r"0\.o_proj": 6, "o_proj": 2}, "alpha_pattern": {"qkv_proj|down_proj": 1.5}}
IN_FULL = {"modules_to_save": ["1.norm", "head"], "train_bias": "adapted"}
PATTERNED = {"vision": {**VISION, **PATTERNS}, "speech": SPEECH}
OPTIONS = {"modality": {"experts": PATTERNED}, "task": PATTERNS, "token": PATTERNS}


def built(router, **changes):
    adapter, model = adapted(router, **{**OPTIONS[router], **IN_FULL, **changes})
    if task_ids(model).names:
        task_ids(model).set(1)
    return adapter, model


def of_pattern(name: str) -> tuple[int | None, float | None]:
    rank = 6 if name == "blocks.0.o_proj" else 2 if name == "blocks.1.o_proj" else None
    return rank, 1.5 if name.endswith(("qkv_proj", "down_proj")) else None


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("router", LEARNED)
def test_rank_and_scale_by_module(router, use_rslora):
    _, model = built(router, use_rslora=use_rslora)
    for name, layer in adapter_layers(model):
        rank, alpha = of_pattern(name)
        rank, alpha = rank or 4, alpha or 6
        assert len(layer.lora_A) == rank and layer.scale == alpha / (math.sqrt(rank) if use_rslora else rank), name


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_scale_of_an_expert_by_module(use_rslora):
    """The patterns of one expert leave the other alone."""
    _, model = built("modality", use_rslora=use_rslora)
    for name, layer in adapter_layers(model):
        rank, alpha = of_pattern(name)
        expected = [(rank or 2, alpha or 4), (3, 3)]
        assert [len(layer.lora_A[expert]) for expert in ("vision", "speech")] == [rank for rank, _ in expected]
        assert layer.scales == [alpha / (math.sqrt(rank) if use_rslora else rank) for rank, alpha in expected], name


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_trained_in_full_learns_and_nothing_else_of_the_base(router):
    _, model = built(router)
    task_ids(model).set(torch.tensor([1, 2, 1]) if router != "token" else None)
    stir(model)(ids()).square().sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    biases = {f"blocks.{i}.{name}.base_layer.bias" for i in (0, 1) for name in ("qkv_proj", "down_proj")}
    assert {name for name in learned if "lora_" not in name} == biases | {"blocks.1.norm.weight", "blocks.1.norm.bias", "head.weight"}
    assert learned == set(adapter_state(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(parameter_roles(model)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("router", ROUTERS)
def test_folder_round_trip_is_exact(router, tmp_path):
    adapter, model = built(router)
    adapter.save(stir(model), tmp_path)
    again, other = built(router)
    again.load(other, tmp_path)
    assert torch.equal(other(ids()), model(ids()))
    changed = {"modules_to_save": ["head"], "train_bias": "none", "use_rslora": True}
    changed |= {"experts": {"vision": VISION, "speech": SPEECH}} if router == "modality" else {"rank_pattern": {}, "alpha_pattern": {}}
    for key, value in changed.items():
        others, third = built(router, **{key: value})
        with pytest.raises(UserError, match=str(tmp_path)):
            others.load(third, tmp_path)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_folder_of_before_there_were_patterns_is_read(router, tmp_path):
    adapter, model = adapted(router)
    adapter.save(stir(model), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in ("use_rslora", "rank_pattern", "alpha_pattern")}))
    _, other = adapted(router)
    adapter.load(other, tmp_path)
    assert all(torch.equal(value, adapter_state(other)[name]) for name, value in adapter_state(model).items())


@pytest.mark.parametrize(("router", "task"), [("task", "add"), ("modality", "vision"), ("modality", "text")])
def test_merged_and_unwrapped_keeps_what_was_trained_in_full(router, task):
    _, model = built(router)
    task_ids(model).set(task)
    expected = stir(model).eval()(ids())
    merge(model, task)
    unwrap(model)
    assert relative(model(ids()), expected) < 1e-5 and not any("lora_" in name for name in model.state_dict())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_expert_with_all_of_it_goes_to_peft_and_back(use_rslora, tmp_path):
    peft = pytest.importorskip("peft")
    adapter, ours = built("modality", use_rslora=use_rslora)
    task_ids(stir(ours).eval()).set("vision")
    adapter.save_expert(ours, "vision", tmp_path)
    theirs = peft.PeftModel.from_pretrained(Toy(), tmp_path).eval()
    assert relative(theirs(ids()), ours(ids())) < 1e-6
    again, other = built("modality", use_rslora=use_rslora)
    again.load_expert(other, "vision", tmp_path)
    task_ids(other).set("vision")
    assert torch.equal(other.eval()(ids()), ours(ids()))
    for changes, words in (
        ({"experts": {"vision": VISION, "speech": SPEECH}}, "rank_pattern is"),
        ({"train_bias": "all"}, "bias is lora_only"),
        ({"use_rslora": not use_rslora}, f"use_rslora is {use_rslora}"),
        ({"modules_to_save": []}, "no place for"),
        ({"modules_to_save": ["norm", "head"]}, "lacks 2 of"),
    ):
        others, third = built("modality", **{"use_rslora": use_rslora, **changes})
        with pytest.raises(UserError, match=words):
            others.load_expert(third, "vision", tmp_path)


@pytest.mark.parametrize(
    ("router", "changes", "words"),
    [
        ("token", {"rank_pattern": {"q_proj": 4}}, "adapter.rank_pattern: 'q_proj' fits none of the wrapped modules, such as blocks.0"),
        ("token", {"rank_pattern": {"o_proj": 0}}, "adapter.rank_pattern.o_proj: 0; the rank must be a whole number, at least 1"),
        ("task", {"rank_pattern": {"o_proj": 3}}, "adapter.rank_pattern.o_proj: 3 is shared out among adapter.num_experts=2 experts"),
        (
            "modality",
            {"rank_pattern": {"o_proj": 3}},
            "adapter.rank_pattern: set, but with adapter.router=modality each expert has its own",
        ),
        ("modality", {"alpha_pattern": {"o_proj": 3}}, "adapter.alpha_pattern: set, but with adapter.router=modality each expert has its"),
        (
            "modality",
            {"experts": {**PATTERNED, "speech": {**SPEECH, "rank_pattern": {"x": 3}}}},
            "adapter.experts.speech.rank_pattern: 'x' fits none of the wrapped modules, such as blocks.0.qkv_proj",
        ),
        (
            "modality",
            {"experts": {**PATTERNED, "speech": {**SPEECH, "rank_pattern": {"o_proj": 0}}}},
            "adapter.experts.speech.rank_pattern.o_proj: 0; the rank must be",
        ),
        (
            "modality",
            {"experts": {**PATTERNED, "speech": {**SPEECH, "alpha_pattern": 3}}},
            "adapter.experts.speech: rank_pattern and alpha_pattern are of the form {regex: value}",
        ),
        (
            "modality",
            {"experts": {**PATTERNED, "speech": {**SPEECH, "rank": 3}}},
            "adapter.experts.speech: has r, alpha, dropout, rank; ne",
        ),
        ("token", {"modules_to_save": ["o_proj"]}, "adapter.modules_to_save: blocks.0.o_proj hits blocks.0.o_proj, which has an adapter"),
        ("task", {"train_bias": "lora_only"}, "adapter.train_bias: 'lora_only'; allowed are none, adapted, all"),
    ],
)
def test_mistakes_are_named_and_change_nothing(router, changes, words):
    model = Toy()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UserError) as caught:
        moe(router, **changes).apply(model)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value), str(caught.value)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
