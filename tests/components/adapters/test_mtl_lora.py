"""MTL-LoRA: the closed form, tasks that do not touch one another, what it reduces to, merging, and the folders."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from components.adapters.base import TaskIds, adapter_layers, adapter_state, disabled, merge, sharing, task_ids, unmerge
from components.adapters.mtl_lora import MTLLoRALayer
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, ids, lora, mtl_lora, relative

TASKS = ("a", "b", "c", "d")
PARTS = ["lora_A", "lora_lambdas", "lora_B", "lora_B_w"]


def layer_of(inside=10, outside=12, r=4, n_up=3, tau=0.5, lambda_type="full", splits=(), dtype=torch.float64, tasks=TASKS) -> MTLLoRALayer:
    torch.manual_seed(0)
    base = nn.Linear(inside, outside).to(dtype).requires_grad_(False)
    layer = MTLLoRALayer(base, TaskIds(tasks), r, 1.5, 0.0, n_up, tau, lambda_type, "uniform", splits)
    return awaken(layer)


def values(layer: MTLLoRALayer) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in layer.named_parameters()}


def closed_form(layer: MTLLoRALayer, x: np.ndarray, task: int) -> np.ndarray:
    """y = W x + bias + scale * B_t Lambda_t A x for one vector x (in,), block by block of rows, from the numbers alone."""
    p, rows, start = values(layer), [], 0
    weights = np.exp(p["lora_B_w"][task] / layer.tau)
    mixed = sum(w / weights.sum() * b for w, b in zip(weights, p["lora_B"], strict=True))  # (out, r)
    lambdas = p.get("lora_lambdas", np.ones((len(layer.task_ids), mixed.shape[1])))[task]
    blocks = lambdas if len(layer.splits) > 1 else [lambdas]
    for size, block in zip(layer.splits, blocks, strict=True):
        inner = (np.diag(block) if block.ndim == 1 else block) @ p["lora_A"] @ x
        rows.append(mixed[start : start + size] @ inner)
        start += size
    assert start == mixed.shape[0]
    return p["base_layer.weight"] @ x + p["base_layer.bias"] + layer.scale * np.concatenate(rows)


def expected(layer: MTLLoRALayer, x: torch.Tensor, task_of) -> torch.Tensor:
    flat = [closed_form(layer, v, t) for v, t in zip(x.double().reshape(-1, x.shape[-1]).numpy(), task_of, strict=True)]
    return torch.from_numpy(np.stack(flat)).reshape(*x.shape[:-1], -1)


KINDS = [("full", ()), ("full", (5, 3, 4)), ("diag", ()), ("diag", (5, 7)), ("none", ()), ("none", (5, 7))]


@pytest.mark.parametrize(("lambda_type", "splits"), KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_closed_form_by_row_and_by_token(lambda_type, splits, dtype, bound):
    layer = layer_of(lambda_type=lambda_type, splits=splits, dtype=dtype)
    x = torch.randn(5, 7, 10, dtype=dtype)
    by_row = torch.tensor([3, 0, 2, 0, 1])
    by_token = torch.randint(4, (5, 7))
    for chosen, one_a_token in ((by_row, by_row[:, None].expand(5, 7)), (by_token, by_token)):
        layer.task_ids.set(chosen)
        assert (layer(x) - expected(layer, x, one_a_token.flatten())).abs().max() < bound
    layer.task_ids.set(by_row)
    assert (layer(x[:, 0]) - expected(layer, x[:, 0], by_row)).abs().max() < bound  # (B, in)
    layer.task_ids.set(by_token)
    assert (layer(x.flatten(0, 1)) - expected(layer, x, by_token.flatten()).flatten(0, 1)).abs().max() < bound  # (B T, in)
    for task in range(4):
        merged = x.double() @ layer.merged_weight(task).double().T + layer.base_layer.bias
        assert (merged - expected(layer, x, [task] * 35)).abs().max() < bound


def test_the_published_way_with_one_b_a_sample_gives_the_same():
    """bmm with B_t (B, out, r) for each sample, and the transposed Lambda for row vectors; Lambda untransposed does not."""
    layer = layer_of()
    x, chosen = torch.randn(5, 7, 10, dtype=torch.float64), torch.tensor([3, 0, 2, 0, 1])
    layer.task_ids.set(chosen)
    b = torch.einsum("tn,nor->tor", torch.softmax(layer.lora_B_w / 0.5, -1), layer.lora_B)[chosen]
    z, lambdas = x @ layer.lora_A.T, layer.lora_lambdas[chosen]
    for matrix, same in ((lambdas.mT, True), (lambdas, False)):
        y = layer.base_layer(x) + 1.5 * torch.bmm(torch.bmm(z, matrix), b.mT)
        assert (relative(layer(x), y) < 1e-14) is same


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(("lambda_type", "splits"), [("full", (2, 3)), ("diag", ()), ("none", ())])
def test_gradients_are_right(lambda_type, splits, by_token):
    layer = layer_of(inside=3, outside=5, r=2, n_up=2, lambda_type=lambda_type, splits=splits, tasks=("a", "b"))
    layer.task_ids.set(torch.randint(2, (3, 2)) if by_token else torch.tensor([1, 0, 1]))
    names = [name for name, _ in layer.adapter_parameters()]
    assert len(names) == (3 if lambda_type == "none" else 4)
    inputs = (torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True), *(p for _, p in layer.adapter_parameters()))
    torch.autograd.gradcheck(lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,)), inputs)


@pytest.mark.parametrize("chosen", [torch.tensor([1, 3, 1]), torch.tensor([[1, 3], [3, 3], [1, 1]])], ids=["rows", "tokens"])
def test_other_tasks_get_no_gradient_at_all(chosen):
    layer = layer_of(splits=(5, 7))
    layer.task_ids.set(chosen)
    layer(torch.randn(3, 2, 10, dtype=torch.float64)).square().sum().backward()
    for p in (layer.lora_lambdas, layer.lora_B_w):
        assert not p.grad[[0, 2]].any() and p.grad[1].any() and p.grad[3].any()
    assert layer.lora_A.grad.any() and all(b.any() for b in layer.lora_B.grad)


def test_rows_do_not_depend_on_their_batch():
    layer = layer_of(dtype=torch.float32, splits=(5, 7))
    x, chosen = torch.randn(8, 6, 10), torch.tensor([3, 0, 2, 0, 1, 1, 2, 3])
    layer.task_ids.set(chosen)
    mixed = layer(x)
    order = torch.randperm(8)
    layer.task_ids.set(chosen[order])
    assert relative(layer(x[order]), mixed[order]) < 1e-6
    for task in range(4):
        layer.task_ids.set(task)
        assert relative(layer(x)[chosen == task], mixed[chosen == task]) < 1e-6


def test_blocks_of_a_fused_projection_do_not_mix():
    """Each block equals an MTL-LoRA of its own rows that shares A and w; and its Lambda moves its rows alone."""
    splits = (5, 3, 4)
    layer, x = layer_of(splits=splits), torch.randn(3, 7, 10, dtype=torch.float64)
    layer.task_ids.set(torch.tensor([2, 0, 3]))
    assert layer.lora_lambdas.shape == (4, 3, 4, 4)
    whole, start = layer(x), 0
    for i, size in enumerate(splits):
        rows = slice(start, start + size)
        alone = layer_of(outside=size)
        with torch.no_grad():
            alone.base_layer.weight.copy_(layer.base_layer.weight[rows])
            alone.base_layer.bias.copy_(layer.base_layer.bias[rows])
            for name, value in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B[:, rows]), ("lora_B_w", layer.lora_B_w)):
                getattr(alone, name).copy_(value)
            alone.lora_lambdas.copy_(layer.lora_lambdas[:, i])
        alone.task_ids.set(torch.tensor([2, 0, 3]))
        assert relative(whole[..., rows], alone(x)) < 1e-14
        start += size
    with torch.no_grad():
        layer.lora_lambdas[:, 1] += 1
    moved = (layer(x) - whole).abs().amax((0, 1)) > 0
    assert moved.tolist() == [False] * 5 + [True] * 3 + [False] * 4


@pytest.mark.parametrize("shape", [(3, 6), (3, 1), (1, 6)])
def test_one_b_and_no_lambda_is_lora_bit_for_bit(shape):
    plain, multi = Toy(), Toy()
    lora().apply(plain)
    mtl_lora(n_up=1, lambda_type="none").apply(multi)
    awaken(plain)
    for (_, one), (_, other) in zip(adapter_layers(plain), adapter_layers(multi), strict=True):
        with torch.no_grad():
            other.lora_A.copy_(one.lora_A.weight)
            other.lora_B.copy_(one.lora_B.weight[None])
    task_ids(multi).set("b")
    x = torch.randint(11, shape)
    assert torch.equal(multi(x), plain(x))


def test_even_weights_and_no_lambda_are_lora_with_the_mean_of_b():
    multi, plain = layer_of(lambda_type="none"), nn.ModuleDict({"w": nn.Linear(10, 12).double()})
    nn.init.zeros_(multi.lora_B_w)
    lora(targets=["w"], r=4, alpha=6).apply(plain)
    with torch.no_grad():
        plain["w"].base_layer.load_state_dict(multi.base_layer.state_dict())
        plain["w"].lora_A.weight.copy_(multi.lora_A)
        plain["w"].lora_B.weight.copy_(multi.lora_B.mean(0))
    multi.task_ids.set(2)
    x = torch.randn(3, 7, 10, dtype=torch.float64)
    assert relative(multi(x), plain["w"](x)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identity_at_the_start_bit_for_bit(dtype):
    model = Toy().to(dtype)
    before = model(ids())
    mtl_lora().apply(model)
    task_ids(model).set(torch.tensor([0, 2, 1]))
    assert torch.equal(model(ids()), before)
    assert all(p.dtype == torch.float32 for p in adapter_state(model).values())
    layer = awaken(model).blocks[0].qkv_proj
    assert layer.shares().dtype == torch.float32 and layer(torch.randn(3, 5, 8).to(dtype)).dtype == dtype


def test_autocast():
    """8 bits over six layers; the mixture's weights stay float32."""
    model = Toy()
    mtl_lora().apply(model)
    task_ids(awaken(model)).set(torch.tensor([0, 2, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids())
        assert model.blocks[0].o_proj.shares().dtype == torch.float32
    assert low.dtype == torch.bfloat16 and relative(low.float(), model(ids())) < 2e-2


def test_start_is_the_published_one():
    """A uniform within 1/sqrt(in), w within 1/sqrt(n), Lambda the identity; w can start at an even mixture."""
    model = nn.ModuleDict({"w": nn.Linear(400, 10)})
    mtl_lora(targets=["w"], r=50, n_up=3, split_fused=False, tasks=[f"t{i}" for i in range(300)]).apply(model)
    layer = model["w"]
    for p, limit in ((layer.lora_A, 1 / 20), (layer.lora_B_w, 1 / math.sqrt(3))):
        assert p.abs().max() <= limit and p.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert torch.equal(layer.lora_lambdas, torch.eye(50).expand(300, 50, 50)) and not layer.lora_B.any()
    even = nn.ModuleDict({"w": nn.Linear(4, 4)})
    mtl_lora(targets=["w"], w_init="zeros", split_fused=False).apply(even)
    assert torch.equal(even["w"].shares(), torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize(
    ("changes", "inside_rank"),
    [({}, 3 * 2 * 2), ({"lambda_type": "diag"}, 3 * 2), ({"lambda_type": "none"}, 0), ({"split_fused": False}, None)],
)
def test_report_equals_the_formula(changes, inside_rank):
    """r in + n out r + T blocks r^2 + T n a module."""
    report = mtl_lora(**changes).apply(Toy())
    sizes = {"qkv_proj": (8, 24, 3), "o_proj": (8, 8, 1), "gate_up_proj": (8, 32, 2), "down_proj": (16, 8, 1)}
    expected = {
        f"blocks.{i}.{name}": 2 * inside + 3 * outside * 2 + (3 * 2 * 2 if inside_rank is None else blocks * inside_rank) + 3 * 3
        for i in (0, 1)
        for name, (inside, outside, blocks) in sizes.items()
    }
    assert report["modules"] == expected and report["trainable"] == sum(expected.values())
    inside = 2 * 4 * 4 * 3 if inside_rank is None else 2 * 7 * inside_rank  # seven blocks in a layer's four modules
    by_type = {"lora_A": 2 * 2 * (8 + 8 + 8 + 16), "lora_B": 2 * 3 * 2 * (24 + 8 + 32 + 8), "lora_lambdas": inside, "lora_B_w": 2 * 4 * 9}
    assert report["types"] == {name: size for name, size in by_type.items() if size}
    roles = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}
    assert report["roles"] == {role: 2 * expected[f"blocks.0.{name}"] for name, role in roles.items()}


def test_count_of_the_paper_s_setting():
    """LLaMA2-7B, q k v o, r 8, n 3, 8 tasks: 131,608 a layer."""
    base = nn.Linear(4096, 4096, bias=False)
    layer = MTLLoRALayer(base, TaskIds("abcdefgh"), 8, 2.0, 0.05, 3, 0.5, "full", "uniform", ())
    assert sum(p.numel() for _, p in layer.adapter_parameters()) == 131_608


@pytest.mark.parametrize("chosen", [torch.tensor([1, -1, 0]), torch.tensor([[1, -1, 0, -1, 2]] * 3)], ids=["rows", "tokens"])
def test_off_is_the_base_exactly(chosen):
    layer = layer_of(dtype=torch.float32, splits=(5, 7))
    x = torch.randn(3, 5, 10, requires_grad=True)
    base = layer.base_layer(x)
    layer.task_ids.set(chosen)
    off = (chosen == -1).reshape(3, -1).expand(3, 5)
    out = layer(x)
    assert torch.equal(out[off], base[off]) and not (out == base)[~off].all(-1).any()
    out[off].sum().backward()
    assert all(not p.grad.any() for _, p in layer.adapter_parameters())


def test_merge_by_task_unmerge_and_disable():
    model = Toy()
    base = model(ids())
    mtl_lora().apply(model)
    awaken(model).eval()
    before = copy.deepcopy(model.state_dict())
    holder = task_ids(model)
    with pytest.raises(UserError, match=r"has 3 tasks \(a, b, c\); say which by adapter\.task"):
        merge(model)
    outputs = []
    for task in ("a", "b", "c"):
        holder.set(task)
        outputs.append(model(ids()))
        assert merge(model, task)["modules"] == 8
        assert relative(model(ids()), outputs[-1]) < 1e-5
        with pytest.raises(UserError, match="is merged into the weights; unmerge it"):
            holder.set(torch.tensor([0, 1, 2]))
        unmerge(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(relative(outputs[i], outputs[j]) > 1e-2 for i, j in ((0, 1), (0, 2), (1, 2)))
    with disabled(model):
        assert torch.equal(model(ids()), base)
    with pytest.raises(UserError, match="each of a, b, c has an update of its own"):
        model.blocks[0].o_proj.delta_weight()


@pytest.mark.parametrize(("lambda_type", "splits"), [("full", ()), ("full", (5, 3, 4)), ("diag", ()), ("none", ())])
def test_what_tasks_share_is_that_of_their_dense_updates(lambda_type, splits):
    layer = layer_of(lambda_type=lambda_type, splits=splits)
    found = sharing(nn.ModuleDict({"w": layer}))["w"]
    deltas = [layer.delta_weight(task).detach() for task in range(4)]
    flat = torch.stack([delta.flatten() / delta.norm() for delta in deltas])
    assert np.allclose(found["cosine"], (flat @ flat.T).numpy(), atol=1e-12)
    for task, delta in enumerate(deltas):
        share = torch.linalg.svdvals(delta)[:4] / torch.linalg.svdvals(delta)[:4].sum()
        assert found["effective_rank"][task] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-10)
    assert np.allclose(found["shares"], torch.softmax(layer.lora_B_w / 0.5, -1).detach().numpy(), atol=1e-12)
    pairs = [(flat[i] @ flat[j]).item() for i in range(4) for j in range(i)]
    assert layer.diagnostics() == pytest.approx({"largest_share": np.mean(np.max(found["shares"], axis=1)), "task_cosine": np.mean(pairs)})
    assert layer_of(tasks=("all",)).diagnostics() == {}


def test_before_training_nothing_is_shared_and_all_is_finite():
    model = Toy()
    mtl_lora(w_init="zeros").apply(model)
    found = sharing(model)
    assert len(found) == 8
    assert model.blocks[0].o_proj.diagnostics() == pytest.approx({"largest_share": 1 / 3, "task_cosine": 0})
    for row in found.values():
        assert row["effective_rank"] == [0.0] * 3 and np.array(row["cosine"]).any() == 0 and np.allclose(row["shares"], 1 / 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, "adapter.r: 0;"),
        ({"n_up": 0}, "adapter.n_up: 0;"),
        ({"tau": 0.0}, "adapter.tau: 0.0;"),
        ({"lambda_type": "diagonal"}, "adapter.lambda_type: 'diagonal'; allowed are full, diag, none"),
        ({"w_init": "ones"}, "adapter.w_init: 'ones'; allowed are uniform, zeros"),
        ({"tasks": []}, "adapter.tasks: [];"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError) as caught:
        mtl_lora(**changes)
    assert str(caught.value).startswith(words)
