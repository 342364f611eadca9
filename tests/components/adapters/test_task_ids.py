"""The task of each row or token: what is refused, and where the ids must hold: beams, checkpointing, compiling, copies."""

import copy

import pytest
import torch
from torch import Tensor, nn

from components.adapters.base import OFF, TaskIds, adapter_layers, merge, task_ids
from components.contracts import Batch, ModelOutput, UserError
from tests.components.adapters.helpers import Toy, awaken, ids, lora, mtl_lora

NAMES = ("boolq", "piqa", "arc")


def adapted(**changes) -> Toy:
    model = Toy()
    mtl_lora(tasks=list(NAMES), **changes).apply(model)
    return awaken(model)


def holder(task: int | str | Tensor | None = None) -> TaskIds:
    some = TaskIds(NAMES)
    some.set(task)
    return some


def said(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_ids_are_an_error_and_never_the_first_task():
    words = said(lambda: adapted()(ids()))
    assert words.startswith("task_ids: missing, and the adapter has 3 tasks (boolq, piqa, arc)") and "adapter.task" in words


def test_without_ids_the_only_task_is_meant():
    assert torch.equal(TaskIds(["all"]).of(torch.zeros(4, 2, 3)), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (torch.tensor([0, 3]), "task_ids: from 0 to 3; allowed are 0 to 2 (boolq, piqa, arc), and -1 for no adapter"),
        (torch.tensor([-2, 1]), "task_ids: from -2 to 1; allowed are 0 to 2"),
        (torch.tensor([0.0, 1.0]), "task_ids: torch.float32 of shape (2,); whole numbers of shape (B,) or (B, T)"),
        (torch.tensor([True]), "task_ids: torch.bool of shape (1,)"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), "of shape (2, 2, 2)"),
        (torch.zeros(0, dtype=torch.int64), "of shape (0,)"),
        (3, "adapter.task: 3; the tasks are boolq (0), piqa (1), arc (2)"),
        ("bolq", "adapter.task: 'bolq'; the tasks are boolq (0), piqa (1), arc (2); did you mean boolq?"),
        (True, "adapter.task: True; the tasks are"),
    ],
)
def test_ids_that_no_task_has(task, words):
    assert words in said(lambda: holder(task))


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        ([0, 1, 2], (4, 5, 8)),  # rows that are no multiple
        ([0, 1, 2], (2, 5, 8)),  # fewer rows than ids
        ([[0, 1], [2, 0]], (2, 3, 8)),  # other tokens
        ([0, 1], (6, 8)),  # rows and tokens in one dimension: which are they?
        ([[0, 1], [2, 0]], (8, 8)),  # beams and tokens in one dimension
    ],
)
def test_lengths_that_do_not_fit(task, shape):
    task = torch.tensor(task)
    words = said(lambda: holder(task).of(torch.zeros(shape)))
    assert words.startswith(f"task_ids: of shape {tuple(task.shape)} for activations of shape {shape}; give one a row, or one a token")


@pytest.mark.parametrize(
    ("task", "shape", "expected"),
    [
        (1, (3, 5, 8), [1, 1, 1]),
        ("arc", (2, 8), [2, 2]),
        (torch.tensor([2, 0]), (2, 5, 8), [2, 0]),
        (torch.tensor([2, 0]), (2, 8), [2, 0]),
        (torch.tensor([2, 0]), (6, 5, 8), [2, 2, 2, 0, 0, 0]),  # three beams a row, one row after another
        (torch.tensor([[2, 0], [1, 1]]), (2, 2, 8), [[2, 0], [1, 1]]),
        (torch.tensor([[2, 0], [1, 1]]), (4, 2, 8), [[2, 0], [2, 0], [1, 1], [1, 1]]),
        (torch.tensor([[2, 0], [1, 1]]), (4, 8), [2, 0, 1, 1]),  # tokens of all rows in one dimension
        (torch.tensor([-1, 0]), (2, 5, 8), [-1, 0]),
        (OFF, (2, 5, 8), [-1, -1]),
    ],
)
def test_ids_of_rows_tokens_and_beams(task, shape, expected):
    assert holder(task).of(torch.zeros(shape)).tolist() == expected


def test_beams_take_the_task_of_their_row():
    model = adapted()
    task_ids(model).set(torch.tensor([2, 0, 1]))
    one_each = model(ids())
    assert torch.allclose(model(ids().repeat_interleave(2, 0)), one_each.repeat_interleave(2, 0), atol=1e-6)
    assert not torch.allclose(model(ids().repeat(2, 1)), one_each.repeat(2, 1, 1), atol=1e-2)  # tiled rows are other rows


def test_off_rows_and_tokens_are_the_base_exactly():
    model, base = adapted(), Toy()
    for chosen in (torch.tensor([-1, 1, -1]), torch.tensor([[-1] * 5, [-1, 2, -1, 0, -1], [-1] * 5])):
        task_ids(model).set(chosen)
        out = model(ids())
        assert torch.equal(out[[0, 2]], base(ids())[[0, 2]]) and not torch.equal(out[1], base(ids())[1])


class Causal(nn.Module):
    """A model that takes a batch, as those of the contract do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Toy()

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput(self.body(batch.input_ids))


def test_a_batch_brings_its_ids_and_one_without_goes_by_what_was_set():
    """The ids of a batch are never those of the next: that would be a silent mistake."""
    model = Causal()
    mtl_lora(tasks=list(NAMES), targets=["o_proj"], split_fused=False).apply(model)
    awaken(model)
    chosen = torch.tensor([2, 0, 1])
    by_batch = model(Batch(ids(), task_ids=chosen)).hidden
    assert "task_ids: missing" in said(lambda: model(batch=Batch(ids())))
    task_ids(model).set(torch.tensor([2, -1, 2]))
    without = model(batch=Batch(ids())).hidden
    assert torch.equal(without[0], by_batch[0]) and torch.equal(without[1], Toy()(ids())[1])
    assert torch.equal(model(Batch(ids(), task_ids=chosen)).hidden, by_batch)
    assert torch.equal(model(Batch(ids())).hidden, without)
    assert "from 0 to 3" in said(lambda: model(Batch(ids(), task_ids=torch.tensor([0, 3, 1]))))


def test_recomputing_activations_in_the_backward_sees_the_ids():
    """Two forwards with other ids, one backward after each, checkpointed or not."""
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        model.checkpointing = checkpointing
        for chosen in (torch.tensor([2, 0, 1]), torch.tensor([1, -1, 1])):
            task_ids(model).set(chosen)
            model(ids()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 32
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradients[0][name].any() for name in gradients[0])


def test_one_graph_serves_all_ids():
    """Compiled whole, with gradients; other ids do not compile again."""
    model = adapted()
    layer, shared = model.blocks[0].qkv_proj, task_ids(model)
    x = torch.randn(3, 5, 8)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for chosen in ([0, 1, 2], [2, 2, 0], [1, 0, 0]):
        shared.set(torch.tensor(chosen))
        expected, got = layer(x), compiled(x)
        assert torch.allclose(got, expected, atol=1e-6)
        ours, theirs = (torch.autograd.grad(y.square().sum(), layer.lora_lambdas)[0] for y in (got, expected))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_checks_the_ids_of_its_batches(backend):
    """In one graph: an id that there is not is never OFF, and another task than the merged one never has its answer."""
    model = Causal()
    mtl_lora(tasks=list(NAMES), targets=["o_proj"], split_fused=False).apply(model)
    awaken(model).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for merged, allowed, wrong in ((None, [2, -1, 1], ([-5, 0, 1], [0, 3, 1])), ("piqa", [1, 1, 1], ([1, 0, 1], [-1, 1, 1]))):
        if merged:
            merge(model, merged)
        with torch.no_grad():
            batch = Batch(ids(), task_ids=torch.tensor(allowed))
            assert torch.allclose(compiled(batch).hidden, model(batch).hidden, atol=1e-6)
            for chosen in wrong:
                with pytest.raises(RuntimeError, match="task_ids: an id that no task has, or of another task than the merged one"):
                    compiled(Batch(ids(), task_ids=torch.tensor(chosen)))
    torch._dynamo.reset()


def test_copies_have_a_holder_of_their_own():
    model = adapted()
    task_ids(model).set("piqa")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids()), model(ids()))
    task_ids(twin).set("arc")
    assert not torch.equal(twin(ids()), model(ids()))
    assert task_ids(model).ids.item() == 1
    for some in (model, twin):
        assert all(layer.task_ids is task_ids(some) for _, layer in adapter_layers(some))


def test_a_merged_task_answers_alone():
    model = adapted().eval()
    merge(model, "piqa")
    task_ids(model).set("piqa")
    assert "task_ids: 0, but piqa (1) is merged into the weights" in said(lambda: task_ids(model).set(torch.tensor([1, 0])))
    assert "adapter.task: 'arc', but piqa is merged already" in said(lambda: merge(model, "arc"))


@pytest.mark.parametrize(
    ("task", "words"), [("bolq", "did you mean boolq?"), (OFF, "-1 means no adapter"), (None, "say which by adapter.task")]
)
def test_merging_needs_a_task(task, words):
    assert words in said(lambda: merge(adapted(), task))


def test_two_adapters_side_by_side_must_have_the_same_tasks():
    model = Toy()
    mtl_lora(tasks=["a", "b"], targets=["o_proj"]).apply(model)
    assert "a, c, but the adapter beside it has a, b" in said(lambda: mtl_lora(tasks=["a", "c"], targets=["qkv_proj"]).apply(model))
    assert "a name stands there twice" in said(lambda: mtl_lora(tasks=["a", "a"]).apply(Toy()))


def test_one_holder_whichever_adapter_comes_first_and_no_task_answers_for_another():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lora(targets=["a"]).apply(model)
    mtl_lora(targets=["b"], tasks=("one", "two"), split_fused=False).apply(model)
    holder = task_ids(model)
    assert all(layer.task_ids is holder for _, layer in adapter_layers(model))
    holder.set("two")
    with pytest.raises(UserError, match="'one' is to be merged, but the ids that were set mean other tasks"):
        merge(model, "one")
    holder.set("one")
    merge(model, "one")
    with pytest.raises(UserError, match="one is merged already"):
        merge(model, "two")
    with pytest.raises(UserError, match="is merged into the weights"):
        holder.set("two")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_whole_numbers_of_any_width(dtype):
    holder = TaskIds(("one", "two"))
    holder.set(torch.tensor([1, 0], dtype=dtype))
    assert holder.ids.dtype == torch.int64 and holder.ids.tolist() == [1, 0]
