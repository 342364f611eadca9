"""Every option of `adapter` on every option of `model`, at size test with the shipped values: what holds for all of them.

Options are found in conf/. What an option may refuse, such as merging, is decided by its refusal and by what its layers do, not by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.adapters.base import OFF, adapter_layers, adapter_state, disabled, merge, parameter_roles, task_ids, unmerge
from components.adapters.base.peft_files import WEIGHTS
from components.contracts import Batch, SamplingParams, UserError
from components.data.tokenizers import bytes_tokenizer
from framework.build import build, build_model, compose, plain
from framework.engines.native import NativeEngine
from framework.overrides import group_options
from tests.components.adapters.helpers import relative

TOKENIZER = bytes_tokenizer()
TASKS = ["a", "b", "c"]  # of every option that has the key
ROWS = [0, 1, 2, 1]  # task of each row of the batch
VARIANTS = {  # further words for an option that is several methods
    "moe_lora": {
        "task": ["adapter.router=task"],
        "modality": [
            "adapter.router=modality",
            "+adapter.experts.x={r: 4, alpha: 8, dropout: 0.05}",
            "+adapter.experts.y={r: 2, alpha: 4, dropout: 0.0}",
            *("+adapter.rules.a=x", "+adapter.rules.b=y", "+adapter.rules.c=null"),
        ],
    },
}
OPTIONS = [(option, variant) for option in group_options("adapter") if option != "none" for variant in ("", *VARIANTS.get(option, {}))]


@cache
def network(model: str) -> nn.Module:
    torch.manual_seed(0)
    config = compose("train", [f"model={model}", "model/size=test"])
    return build_model(config, TOKENIZER.vocab_size).eval()


@cache
def options(option: str, variant: str) -> dict[str, Any]:
    words = VARIANTS[option][variant] if variant else []
    node = plain(compose("train", [f"adapter={option}", *words]).adapter)
    return {**node, "tasks": TASKS} if "tasks" in node else node


class Pair:
    """One adapter on one model. Built once; a check that changes something does it to a copy."""

    def __init__(self, option: str, variant: str, model: str) -> None:
        self.node = options(option, variant)
        self.adapter = build(self.node, path="adapter")
        self.base = network(model)
        self.fresh, self.report = self.applied(self.base)
        names = task_ids(self.fresh).names
        self.tasks: list[str | None] = list(names) or [None]
        self.ids = torch.tensor(ROWS) % len(names) if names else None  # mixed

    def applied(self, base: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the base with the adapter, and its report."""
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        return model, self.adapter.apply(model)

    @cached_property
    def awake(self) -> nn.Module:
        """As after some training: every parameter of the adapter has moved."""
        return awaken(copy.deepcopy(self.fresh))

    @cached_property
    def narrow(self) -> nn.Module:
        """A fresh adapter on a base in bfloat16."""
        return self.applied(copy.deepcopy(self.base).bfloat16())[0]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.awake)

    def batch(self, task: str | None = None, rows: slice = slice(None)) -> Batch:
        """Four rows of two documents each. task: of all rows; None: one each."""
        ids = torch.randint(TOKENIZER.vocab_size, (4, 13), generator=torch.Generator().manual_seed(0))
        segments = (torch.arange(12) >= torch.tensor([5, 7, 1, 12])[:, None]).int()
        tasks = self.ids if task is None else torch.full((4,), self.tasks.index(task))
        return Batch(ids[rows, :-1], ids[rows, 1:], segments[rows], task_ids=None if tasks is None else tasks[rows])


@pytest.fixture(
    scope="module", params=[pytest.param((*o, m), id="-".join(filter(None, (*o, m)))) for m in group_options("model") for o in OPTIONS]
)
def pair(request) -> Pair:
    return Pair(*request.param)


def awaken(model: nn.Module, size: float = 0.05) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_state(model).values():
        parameter += size * torch.empty_like(parameter).normal_(generator=generator)
    return model


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.logits(model(batch).hidden)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    torch.manual_seed(2)  # of dropout
    out = model.train()(batch)
    loss = torch.nn.functional.cross_entropy(model.logits(out.hidden).flatten(0, 1).float(), batch.labels.flatten())
    return loss + sum(out.aux_losses.values())


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of every parameter that got one, by name."""
    loss_of(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def can_merge(model: nn.Module, task: str | None) -> bool:
    """Merge; False if that is refused. It may be where what a layer adds is not linear in its input, and nowhere else."""
    _, layer = next(adapter_layers(model))
    task_ids(model).set(task)
    one, other = torch.randn(2, 1, 3, layer.in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        added = [layer(x) - layer.base_layer(x) for x in (one, other, one + other)]
    linear = not added[2].any() or relative(added[0] + added[1], added[2]) < 1e-4  # one that weighs by the token: 1e-1 and more
    try:
        merge(model, task)
    except UserError as error:
        assert str(error).startswith("adapter.merge: ") and "\n" not in str(error)
        assert not linear
        return False
    assert linear
    return True


def test_identity_at_the_start_bit_for_bit(pair):
    assert torch.equal(logits(pair.fresh, pair.batch()), logits(pair.base, pair.batch()))
    assert not torch.equal(logits(pair.awake, pair.batch()), logits(pair.base, pair.batch()))
    base = copy.deepcopy(pair.base).bfloat16()
    assert torch.equal(logits(pair.narrow, pair.batch()), logits(base, pair.batch()))


def test_only_the_adapter_is_trainable_and_every_parameter_has_a_role(pair):
    roles = parameter_roles(pair.fresh)
    parameters = dict(pair.fresh.named_parameters())
    assert roles.keys() == parameters.keys() and roles == pair.fresh.roles()
    assert {name for name, p in parameters.items() if p.requires_grad} == {name for name, role in roles.items() if role == "adapter"}
    assert {name.replace(".base_layer.", "."): role for name, role in roles.items() if role != "adapter"} == pair.base.roles()
    assert adapter_state(pair.fresh).keys() == {name for name, role in roles.items() if role == "adapter"}


def test_the_report_is_the_sum_of_the_parameters(pair):
    trainable = sum(p.numel() for p in pair.fresh.parameters() if p.requires_grad)
    total = sum(p.numel() for p in pair.base.parameters()) + trainable
    assert trainable > 0
    assert (pair.report["trainable"], pair.report["total"], sum(pair.report["modules"].values())) == (trainable, total, trainable)
    assert pair.report["modules"].keys() == {name for name, _ in adapter_layers(pair.fresh)}
    assert sum(pair.report["types"].values()) == sum(pair.report["roles"].values()) == trainable and pair.report["in_full"] == 0
    assert set(pair.report["roles"]) <= set(pair.base.roles().values()) and all(name.startswith("lora_") for name in pair.report["types"])


def test_gradients_reach_all_of_the_adapter_and_nothing_else(pair):
    found = gradients(pair.copy(), pair.batch())
    assert found.keys() == adapter_state(pair.awake).keys()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


def test_merged_is_unmerged(pair):
    for task in pair.tasks:
        model = pair.copy()
        expected = logits(model, pair.batch(task))
        if can_merge(model, task):
            assert all(layer.merged for _, layer in adapter_layers(model))
            assert relative(logits(model, pair.batch(task)), expected) < 1e-5, task
        else:
            assert torch.equal(logits(model, pair.batch(task)), expected)


def test_unmerging_restores_every_bit(pair):
    """So does a refused merge."""
    for task in pair.tasks:
        model = pair.copy()
        if can_merge(model, task):
            unmerge(model)
        assert same(model.state_dict(), pair.awake.state_dict()), task
        assert torch.equal(logits(model, pair.batch()), logits(pair.awake, pair.batch()))


def test_merged_weights_are_not_trained(pair):
    model = pair.copy()
    if can_merge(model, pair.tasks[0]):
        assert "merged weights cannot be trained" in refusal(lambda: model.train()(pair.batch(pair.tasks[0])))
    else:
        assert gradients(model, pair.batch())


def test_a_folder_gives_every_bit_back(pair, tmp_path):
    pair.adapter.save(pair.awake, tmp_path)
    model = copy.deepcopy(pair.fresh)
    pair.adapter.load(model, tmp_path)
    assert same(model.state_dict(), pair.awake.state_dict())


def test_loading_is_strict(pair, tmp_path):
    """Every tensor of a module: missing, beside an unknown one, a row too few or too many, or a number. Nothing is copied then."""
    pair.adapter.save(pair.awake, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    module = next(iter(pair.report["modules"]))
    model = copy.deepcopy(pair.fresh)
    for key in [key for key in stored if f"{module}." in key]:
        rest = {name: tensor for name, tensor in stored.items() if name != key}
        tensor = stored[key]
        shapes = [tensor[1:], torch.cat([tensor, tensor[:1]]), tensor.sum()]
        for wrong in (rest, {**stored, f"{key}x": tensor}, *({**rest, key: other} for other in shapes)):
            save_file({name: t.clone() for name, t in wrong.items()}, tmp_path / WEIGHTS)
            assert str(tmp_path) in refusal(lambda: pair.adapter.load(model, tmp_path))
    assert same(model.state_dict(), pair.fresh.state_dict())


def test_disabled_is_the_base_bit_for_bit(pair):
    model = pair.copy()
    with disabled(model):
        assert torch.equal(logits(model, pair.batch()), logits(pair.base, pair.batch()))
    assert torch.equal(logits(model, pair.batch()), logits(pair.awake, pair.batch()))


def test_a_base_in_bfloat16_trains_an_adapter_in_float32(pair):
    model = awaken(copy.deepcopy(pair.narrow))
    assert model(pair.batch()).hidden.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_state(model).values()} == {torch.float32}
    found = gradients(model, pair.batch())
    assert found.keys() == adapter_state(model).keys() and all(gradient.isfinite().all() for gradient in found.values())


def test_autocast(pair):
    """About as near to float32 as the base itself is: 1.0 to 1.8 times its distance."""
    exact, model = logits(pair.awake, pair.batch()), pair.copy()
    with torch.autocast("cpu", torch.bfloat16):
        rough, base = logits(model, pair.batch()), logits(pair.base, pair.batch())
        found = gradients(model, pair.batch())
    assert relative(rough, exact) < 3 * relative(base, logits(pair.base, pair.batch()))
    assert found.keys() == adapter_state(model).keys()
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in found.values())


def test_recomputing_activations_gives_the_same_gradients(pair):
    plain, model = gradients(pair.copy(), pair.batch()), pair.copy()
    model.gradient_checkpointing = True
    recomputed = gradients(model, pair.batch())
    assert plain.keys() == adapter_state(model).keys() and same(plain, recomputed)


def test_recomputing_two_forwards_of_other_tasks_in_one_backward(pair):
    """Each block goes by the ids of its own forward: the gradients are the sum of those of two separate passes that recompute nothing."""
    separate, model, one, other = pair.copy(), pair.copy(), pair.batch(), pair.batch()
    other.task_ids = None if pair.ids is None else torch.cat([pair.ids[:1], pair.ids.flip(0)[1:]])[:, None].repeat(1, 12)  # by token
    for batch in (one, other):
        expected = gradients(separate, batch)  # .grad adds up
    model.gradient_checkpointing = True
    (loss_of(model, one) + loss_of(model, other)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and all(relative(found[name], expected[name]) < 1e-6 for name in found)


def test_a_compiled_layer_is_the_layer(pair):
    model = pair.copy()
    task_ids(model).set(pair.ids)
    name, layer = next(adapter_layers(model))
    x = torch.randn(4, 5, layer.in_features, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert relative(torch.compile(layer, backend="aot_eager")(x), layer(x)) < 1e-6, name
    torch._dynamo.reset()


def greedy(model: nn.Module) -> list[list[int]]:
    prompts = [[TOKENIZER.eot_id, *text.encode()] for text in ("def", "import torch")]
    found = NativeEngine(model, TOKENIZER).generate(prompts, SamplingParams(max_new_tokens=8, temperature=0.0))
    return [completion.token_ids for completion in found]


def test_merged_says_what_unmerged_says(pair):
    """And not what the base says, so that a merge that adds nothing shows: the weights have moved far. A mode may be the base itself."""
    moved, base, rules = awaken(copy.deepcopy(pair.fresh), 0.3), greedy(pair.base), pair.node.get("rules") or {}
    for task in pair.tasks:
        model = copy.deepcopy(moved)
        task_ids(model).set(task)
        said = greedy(model)
        assert (said == base) is (rules.get(task, "") is None), task
        if can_merge(model, task):
            assert greedy(model) == said, task


def test_cached_steps_are_the_forward(pair):
    model = pair.copy()
    batch = pair.batch()
    with torch.no_grad():
        expected = model(Batch(batch.input_ids, task_ids=batch.task_ids)).hidden
        decode = model.new_state(4, 12)
        pieces = batch.input_ids.split([7, 3, 1, 1], 1)
        found = [model(Batch(piece, task_ids=batch.task_ids), decode).hidden for piece in pieces]
    assert relative(torch.cat(found, 1), expected) < 1e-5


def test_a_copy_is_independent(pair):
    """Also one that is made in the middle of training."""
    model = pair.copy()
    gradients(model, pair.batch())
    twin = copy.deepcopy(model).eval()
    assert same(twin.state_dict(), pair.awake.state_dict())
    awaken(twin)
    assert torch.equal(logits(model.eval(), pair.batch()), logits(pair.awake, pair.batch()))
    assert not torch.equal(logits(twin, pair.batch()), logits(model, pair.batch()))
    for some in (model, twin):
        assert all(layer.task_ids is task_ids(some) for _, layer in adapter_layers(some))
    assert task_ids(model) is not task_ids(twin)


def test_a_second_adapter_on_a_module_is_refused(pair):
    model = pair.copy()
    assert "has an adapter already" in refusal(lambda: pair.adapter.apply(model))
    assert same(model.state_dict(), pair.awake.state_dict())
    assert torch.equal(logits(model, pair.batch()), logits(pair.awake, pair.batch()))


def test_targets_that_match_nothing_are_refused_with_the_nearest_names(pair):
    model, module = copy.deepcopy(pair.base), next(iter(pair.report["modules"]))
    words = refusal(lambda: build({**pair.node, "targets": [f"{module}x"]}, path="adapter").apply(model))
    assert words.startswith("adapter.targets: ") and f"{module}x" in words and module in words.replace(f"{module}x", "")
    assert same(model.state_dict(), pair.base.state_dict()) and all(p.requires_grad for p in model.parameters())


def test_mixed_rows_are_the_rows_alone(pair):
    mixed = logits(pair.awake, pair.batch())
    for row in range(4):
        alone = logits(pair.awake, pair.batch(rows=slice(row, row + 1)))[0]
        assert relative(mixed[row], alone) < 1e-6, row


def test_rows_without_adapter_are_the_base_bit_for_bit(pair):
    """Where there are tasks. Without any, ids say nothing."""
    batch = pair.batch()
    batch.task_ids = torch.tensor([OFF, 0, OFF, 0])
    mixed, base = logits(pair.awake, batch), logits(pair.base, batch)
    if pair.ids is None:
        assert torch.equal(mixed, logits(pair.awake, pair.batch()))
    else:
        assert torch.equal(mixed[[0, 2]], base[[0, 2]]) and (mixed[[1, 3]] != base[[1, 3]]).any(-1).any(-1).all()


def test_ids_that_are_missing_or_no_tasks_are_refused(pair):
    """An adapter that does without ids must give the same for all of them."""
    batch, model = pair.batch(), pair.awake
    if pair.ids is None:
        batch.task_ids = torch.tensor([0, 7, 0, 0])
        assert torch.equal(logits(model, batch), logits(model, pair.batch()))
        return
    for wrong in ([0, 0, 0, len(pair.tasks)], [OFF - 1, 0, 0, 0]):
        batch.task_ids = torch.tensor(wrong)
        assert f"allowed are 0 to {len(pair.tasks) - 1}" in refusal(lambda: logits(model, batch))
    batch.task_ids = None
    try:
        found = logits(model, batch)
    except UserError as error:
        assert str(error).startswith("task_ids: missing") and "\n" not in str(error)
    else:
        assert all(torch.equal(found, logits(model, pair.batch(task))) for task in pair.tasks)
