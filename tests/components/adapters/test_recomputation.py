"""Task ids under activation checkpointing when several forwards come before one backward: each is recomputed by its own, or refused.

Our own models by every adapter: test_every_adapter.py.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.adapters.base import OFF, task_ids
from components.contracts import Batch, ModelOutput, UserError
from framework.build import build_model, compose
from tests.components.adapters.helpers import Toy, awaken, ids, mtl_lora, relative
from tests.components.adapters.moe_helpers import TASKS, moe

FIRST, SECOND = torch.tensor([2, 0, 1]), torch.tensor([1, OFF, 0])


class Foreign(Toy):
    """A model of somebody else that checkpoints its blocks, with words of its own for `checkpoint`; None: not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[str, object] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).requires_grad_()  # what reentrant checkpoints need
        for block in self.blocks:
            x = block(x) if self.words is None else checkpoint(block, x, **self.words)
        return self.head(x)


class Causal(nn.Module):
    """Takes a batch, as models of the contract do, and how to checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Foreign()

    def forward(self, batch: Batch, words: dict[str, object] | None = None) -> ModelOutput:
        self.body.words = words
        return ModelOutput(self.body(batch.input_ids))


def adapted(model: nn.Module, method: str = "mtl_lora") -> nn.Module:
    targets = ["o_proj", "down_proj"]
    if method == "mtl_lora":
        mtl_lora(targets=targets, split_fused=False).apply(model)
    else:
        moe(method, targets=targets, **({"tasks": TASKS} if method == "token" else {})).apply(model)
    return awaken(model).train()


def forward(model: nn.Module, chosen: Tensor | None, words: dict[str, object] | None = None) -> Tensor:
    """The loss of a pass by these tasks; None: as was said before."""
    if isinstance(model, Causal):
        return model(Batch(ids(), task_ids=chosen), words=words).hidden.square().mean()
    if chosen is not None:
        task_ids(model).set(chosen)
    return model(ids()).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def separate(model: nn.Module, *passes: Tensor) -> dict[str, Tensor]:
    """Gradients of passes with a backward after each, nothing recomputed."""
    model = copy.deepcopy(model)
    for chosen in passes:
        forward(model, chosen).backward()
    return gradients(model)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(relative(found[name], expected[name]) < 1e-6 for name in found)


def refused(loss: Tensor) -> str:
    with pytest.raises(UserError) as caught:
        loss.backward()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", ["mtl_lora", "task", "modality", "token"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_foreign_model_is_refused_where_the_ids_have_been_replaced(method, reentrant):
    model = adapted(Foreign(), method)
    model.words = {"use_reentrant": reentrant}
    one, other = forward(model, FIRST), forward(model, SECOND)
    assert refused(one + other).startswith("task_ids: the backward recomputes a forward whose ids have been replaced since; ")
    for chosen in (FIRST, SECOND):  # a backward after each, and two forwards by the same ids, go on as ever
        (forward(model, chosen) + forward(model, None)).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_pass_after_the_other_is_right_in_a_foreign_model(reentrant):
    model = adapted(Foreign())
    expected = separate(model, FIRST, SECOND)
    model.words = {"use_reentrant": reentrant}
    for chosen in (FIRST, SECOND):
        forward(model, chosen).backward()
    assert equal(gradients(model), expected)


@pytest.mark.parametrize("method", ["mtl_lora", "task", "modality"])
def test_a_foreign_model_that_keeps_the_segments_is_right(method):
    """What the refusal advises; also in two backwards over one graph, and where nothing was said before."""
    model = adapted(Foreign(), method)
    expected = separate(model, FIRST, SECOND)
    model.words = {"use_reentrant": False, "context_fn": task_ids(model).segment}
    loss = forward(model, FIRST) + forward(model, SECOND)
    task_ids(model).set(None)
    loss.backward(retain_graph=True)
    assert equal(gradients(model), expected) and task_ids(model).ids is None
    model.zero_grad()
    loss.backward()
    assert equal(gradients(model), expected)


def test_the_whole_model_may_be_recomputed():
    """Its batch brings the ids again, and what is recomputed afterwards goes by its own ids, or by what was said, as before."""
    model = adapted(Causal())
    expected = separate(model, FIRST, SECOND)
    run = lambda chosen: checkpoint(forward, model, chosen, use_reentrant=False)  # noqa: E731
    (run(FIRST) + run(SECOND)).backward()
    assert equal(gradients(model), expected)
    model.zero_grad()
    whole, by_blocks = run(FIRST), forward(model, SECOND, {"use_reentrant": False})
    whole.backward()
    by_blocks.backward()
    assert equal(gradients(model), expected)


def test_what_was_said_may_be_replaced_too():
    """Of two batches without ids, the second goes by what was said later, and the first is not to be recomputed by it."""
    model = adapted(Causal())
    task_ids(model).set("a")
    whole = checkpoint(forward, model, None, use_reentrant=False)
    by_blocks = forward(model, None, {"use_reentrant": False})
    forward(model, SECOND)
    assert "have been replaced since" in refused(by_blocks)
    task_ids(model).set("b")
    assert "have been replaced since" in refused(whole)


def test_ids_that_were_filled_anew_in_place_are_refused():
    model, buffer = adapted(Foreign()), FIRST.clone()
    for words in ({"use_reentrant": False}, {"use_reentrant": False, "context_fn": task_ids(model).segment}):
        model.words = words
        loss = forward(model, buffer)
        buffer.copy_(SECOND)
        assert "filled anew in place since" in refused(loss)
        forward(model, buffer).backward()
        forward(copy.deepcopy(model), None).backward()  # a copy counts from its own start


@pytest.mark.slow  # compiling
def test_a_compiled_model_recomputes_by_its_own_ids():
    torch.manual_seed(0)
    model = build_model(compose("train", ["model=phi4mini", "model/size=test"]), 300)
    mtl_lora().apply(model)
    awaken(model).train()
    twin, batch = copy.deepcopy(model), lambda chosen: Batch(ids(), ids(), task_ids=chosen)
    for chosen in (FIRST, SECOND):
        model(batch(chosen)).hidden.square().mean().backward()
    twin.gradient_checkpointing = True
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager")
    sum(compiled(batch(chosen)).hidden.square().mean() for chosen in (FIRST, SECOND)).backward()
    expected, found = gradients(model), gradients(twin)
    assert found.keys() == expected.keys() and all(relative(found[name], expected[name]) < 1e-5 for name in found)
    torch._dynamo.reset()
