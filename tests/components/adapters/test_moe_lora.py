"""Mixtures of LoRAs: the three routers against loops in float64, the bridges between them, and mixed batches."""

import copy
import math

import pytest
import torch
from torch import nn

from components.adapters.base import OFF, adapter_layers, adapter_state, task_ids
from components.contracts import UserError
from tests.components.adapters.helpers import Toy, awaken, ids, lora
from tests.components.adapters.moe_helpers import SPEECH, TASKS, VISION, adapted, layer, moe, relative, set_ids


def test_modality_equation():
    """y = W x + bias + s_e B_e A_e x by the row's mode, and W x + bias for text; per row and per token."""
    w, model = layer("modality")
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    expert = {1: "vision", 2: "speech", 3: "vision"}
    scale = {"vision": 4 / 2, "speech": 3 / 3}
    for modes in (torch.tensor([0, 1, 2, 3]), torch.tensor([[0, 1, 2], [3, 3, 0], [-1, 2, 0], [1, 1, 1]])):
        task_ids(model).set(modes)
        y = w(x)
        for b in range(4):
            for t in range(3):
                mode = int(modes[b] if modes.dim() == 1 else modes[b, t])
                expected = w.base_layer.weight @ x[b, t] + w.base_layer.bias
                if mode in expert:
                    e = expert[mode]
                    expected = expected + scale[e] * w.lora_B[e] @ (w.lora_A[e] @ x[b, t])
                assert relative(y[b, t], expected) < 1e-14


def test_task_equation():
    """y = W x + bias + (alpha / r) sum_e g_e B_e A_e x with two experts of rank 2, g = softmax(W_g emb)."""
    w, model = layer("task")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    set_ids(model, 2, OFF, 0)
    y = w(x)
    for b, task in enumerate([2, OFF, 0]):
        expected = x[b] @ w.base_layer.weight.T + w.base_layer.bias
        if task != OFF:
            logits = [sum(w.lora_gate[e, k] * w.lora_embedding[task, k] for k in range(3)).item() for e in range(2)]
            gate = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
            for e in range(2):
                a, b_ = w.lora_A[2 * e : 2 * e + 2], w.lora_B[:, 2 * e : 2 * e + 2]
                expected = expected + 6 / 4 * gate[e] * x[b] @ a.T @ b_.T
        assert relative(y[b], expected) < 1e-14


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_token_equation(top_k):
    """y = W x + bias + (alpha / r) sum_e p_e(x) B_e A x, p by each token, over the best k alone with weights that sum to one."""
    w, _ = layer(num_experts=3, top_k=top_k, aux={"z": 1.0})
    x = torch.randn(6, 5, dtype=torch.float64)
    y = w(x)
    for i in range(6):
        logits = (w.lora_router @ x[i]).tolist()
        weights = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
        used = sorted(range(3), key=lambda e: -weights[e])[:top_k]
        total = sum(weights[e] for e in used)
        expected = w.base_layer.weight @ x[i] + w.base_layer.bias
        for e in used:
            expected = expected + 6 / 4 * weights[e] / total * w.lora_B[e] @ (w.lora_A @ x[i])
        assert relative(y[i], expected) < 1e-14


@pytest.mark.parametrize("router, changes", [("modality", {}), ("task", {}), ("token", {}), ("token", {"num_experts": 3, "top_k": 2})])
def test_gradients_are_right(router, changes):
    w, model = layer(router, inside=3, out=4, **changes)
    w.base_layer.requires_grad_(False)
    if router != "token":
        set_ids(model, 1, 2, 0, 1)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in w.adapter_parameters()]
    call = lambda x, *p: torch.func.functional_call(w, dict(zip(names, p)), (x,))  # noqa: E731
    torch.autograd.gradcheck(call, (x, *dict(w.adapter_parameters()).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ["modality", "task", "token"])
def test_identity_at_the_start_bit_for_bit(router, dtype):
    model = Toy().to(dtype)
    before = model(ids())
    adapted(router, model)
    if router != "token":
        set_ids(model, 1, 2, 0)
    assert torch.equal(model(ids()), before)
    assert all(p.dtype == torch.float32 for p in adapter_state(model).values())


def test_start_of_the_matrices():
    """A, router and gate: U(+-1/sqrt(columns)); B: zero; embedding: a normal of scale 1."""
    model = nn.ModuleDict({"w": nn.Linear(400, 10)})
    adapted("task", model, targets=["w"], r=50, embedding_dim=100, tasks=[f"t{i}" for i in range(40)])
    w = model["w"]
    for matrix, bound in ((w.lora_A, 1 / 20), (w.lora_gate, 1 / 10)):
        assert 0.95 * bound < matrix.abs().max() <= bound
    assert w.lora_A.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert w.lora_embedding.std().item() == pytest.approx(1, rel=0.05) and torch.equal(w.lora_B, torch.zeros(10, 50))


@pytest.mark.parametrize("router", ["task", "token"])
def test_one_expert_is_plain_lora_bit_for_bit(router):
    ours, plain = Toy(), Toy()
    adapted(router, ours, num_experts=1, tasks=["only"])
    lora(r=4, alpha=6).apply(plain)
    awaken(plain)
    for (_, mine), (_, theirs) in zip(adapter_layers(ours), adapter_layers(plain)):
        mine.lora_A.data.copy_(theirs.lora_A.weight)
        mine.lora_B.data.copy_(theirs.lora_B.weight.view_as(mine.lora_B))
    assert torch.equal(ours(ids()), plain(ids()))


def test_one_mode_is_plain_lora_bit_for_bit():
    ours, plain = Toy(), Toy()
    adapter, _ = adapted("modality", ours, experts={"fr": {"r": 2, "alpha": 6, "dropout": 0.0}}, rules={})
    lora().apply(plain)
    awaken(plain)
    for (_, mine), (_, theirs) in zip(adapter_layers(ours), adapter_layers(plain)):
        mine.lora_A["fr"].data.copy_(theirs.lora_A.weight)
        mine.lora_B["fr"].data.copy_(theirs.lora_B.weight)
    assert adapter.rules == {"fr": "fr"} and torch.equal(ours(ids()), plain(ids()))


def test_all_of_the_experts_as_top_k_is_dense():
    w, _ = layer(num_experts=3)
    x = torch.randn(6, 5, dtype=torch.float64)
    dense = w(x)
    w.top_k = 3
    assert relative(w(x), dense) < 1e-14
    w.top_k = 2
    assert relative(w(x), dense) > 1e-3


@pytest.mark.parametrize("router", ["task", "token"])
def test_equal_experts_are_plain_lora_whatever_the_router_says(router):
    """Weights that sum to one, so E times the same expert is that expert: of rank r (token), or r / E (task)."""
    w, model = layer(router)
    if router == "task":
        set_ids(model, 0, 1, 2)
        w.lora_A.data[2:], w.lora_B.data[:, 2:] = w.lora_A[:2], w.lora_B[:, :2]
        a, b = w.lora_A[:2], w.lora_B[:, :2]
    else:
        w.lora_B.data[1] = w.lora_B[0]
        a, b = w.lora_A, w.lora_B[0]
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    assert relative(w(x), w.base_layer(x) + 6 / 4 * x @ a.T @ b.T) < 1e-14


@pytest.mark.parametrize("router", ["task", "token"])
def test_a_router_that_is_sure_is_the_hard_one(router):
    """Logits of +-1000 by mode give weights of exactly one and zero: the learned router then is router=modality."""
    soft, soft_model = layer(router, tasks=["vision", "speech"], embedding_dim=2)
    hard, hard_model = layer("modality", experts={"vision": VISION, "speech": {**VISION}}, rules={})
    for e, name in enumerate(("vision", "speech")):
        part = slice(2 * e, 2 * e + 2)
        a, b = (soft.lora_A[part], soft.lora_B[:, part]) if router == "task" else (soft.lora_A, soft.lora_B[e])
        hard.lora_A[name] = nn.Parameter(a.detach().clone())
        hard.lora_B[name] = nn.Parameter(b.detach().clone())
    hard.scales = [soft.scale, soft.scale]
    modes = torch.tensor([0, 1, 1, 0])
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    x[..., 0] = torch.where(modes == 0, 1.0, -1.0)[:, None].double()
    if router == "task":
        soft.lora_embedding.data, soft.lora_gate.data = torch.eye(2).double(), 2000 * torch.eye(2).double() - 1000
    else:
        soft.lora_router.data = torch.zeros(2, 5).double()
        soft.lora_router.data[:, 0] = torch.tensor([1000.0, -1000.0])
    for model in (soft_model, hard_model):
        task_ids(model).set(modes)
    assert relative(soft(x), hard(x)) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_rows_of_a_mixed_batch_are_the_base_bit_for_bit(dtype):
    model = Toy().to(dtype)
    base = model(ids())
    adapted("modality", model)
    awaken(model)
    set_ids(model, 1, 0, 2)
    mixed = model(ids())
    assert torch.equal(mixed[1], base[1]) and not torch.equal(mixed[0], base[0]) and not torch.equal(mixed[2], base[2])
    set_ids(model, 0, 0, 0)
    assert torch.equal(model(ids()), base)


@pytest.mark.parametrize("router", ["task", "token"])
def test_rows_and_tokens_that_are_off_are_the_base(router):
    model = Toy()
    base = model(ids())
    adapted(router, model, tasks=TASKS)
    awaken(model)
    set_ids(model, 1, OFF, 2)
    mixed = model(ids())
    assert torch.equal(mixed[1], base[1]) and not torch.equal(mixed[0], base[0])
    w, alone = layer(router, dtype=torch.float32, tasks=TASKS)
    x = torch.randn(2, 3, 5)
    task_ids(alone).set(torch.tensor([[0, OFF, 1], [OFF, 2, 2]]))
    changed = (w(x) != w.base_layer(x)).any(-1)
    assert changed.tolist() == [[True, False, True], [False, True, True]]


@pytest.mark.parametrize("router", ["modality", "task", "token"])
def test_mixed_rows_are_the_rows_alone(router):
    _, model = adapted(router, tasks=TASKS if router != "modality" else None)
    awaken(model)
    modes = [1, 2, 0]
    set_ids(model, *modes)
    mixed = model(ids())
    for row, mode in enumerate(modes):
        set_ids(model, mode)
        assert relative(model(ids()[row : row + 1])[0], mixed[row]) < 1e-6
    order = torch.tensor([2, 0, 1])
    task_ids(model).set(torch.tensor(modes)[order])
    assert relative(model(ids()[order]), mixed[order]) < 1e-6
    set_ids(model, *modes)  # two beams a row, interleaved
    assert relative(model(ids().repeat_interleave(2, 0)), mixed.repeat_interleave(2, 0)) < 1e-6


def test_ids_that_are_filled_in_place_are_seen():
    w, model = layer("modality")
    x, modes = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([1, 2])
    task_ids(model).set(modes)
    first = w(x)
    modes.copy_(torch.tensor([2, 1]))
    assert not torch.equal(w(x), first)
    with torch.inference_mode():
        task_ids(model).set(torch.tensor([1, 2]))
        assert relative(w(x), first) < 1e-15
        task_ids(model).ids.fill_(0)
        assert torch.equal(w(x), w.base_layer(x))


def test_missing_modes_are_an_error():
    for router in ("modality", "task"):
        _, model = adapted(router)
        with pytest.raises(UserError, match="task_ids: missing"):
            model(ids())


def test_gradients_of_a_mixed_batch_are_the_sum_of_those_by_mode():
    _, model = adapted("modality")
    awaken(model)

    def gradients(rows, modes):
        model.zero_grad()
        set_ids(model, *modes)
        model(ids()[rows]).square().sum().backward()  # of text alone too: a batch without any expert is a step of nothing
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters() if "lora_" in name}

    mixed = gradients([0, 1, 2], [1, 0, 2])
    parts = [gradients([row], [mode]) for row, mode in ((0, 1), (1, 0), (2, 2))]
    for name, gradient in mixed.items():
        assert relative(sum(part[name] for part in parts), gradient) < 1e-6, name


def test_an_expert_that_a_batch_lacks_stands_still():
    """No gradient, so that AdamW's momentum and decay leave it alone too."""
    _, model = adapted("modality")
    awaken(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    set_ids(model, 2, 2, 2)
    for modes in ([2, 1, 1], [1, 0, 3]):  # speech has a state by the second step
        before = copy.deepcopy(adapter_state(model))
        set_ids(model, *modes)
        optimizer.zero_grad()
        model(ids()).square().sum().backward()
        optimizer.step()
    after = adapter_state(model)
    for name in after:
        assert torch.equal(after[name], before[name]) == name.endswith("speech"), name


def test_only_the_experts_to_train_learn():
    model = Toy()
    report = moe("modality", train=["speech"]).apply(model)
    awaken(model)
    set_ids(model, 1, 2, 0)
    model(ids()).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name in adapter_state(model) if name.endswith("speech")}
    assert report["trainable"] == sum(3 * (layer.in_features + layer.out_features) for _, layer in adapter_layers(model))


@pytest.mark.parametrize("router", ["modality", "task", "token"])
def test_only_the_adapter_learns_and_all_of_it(router):
    _, model = adapted(router)
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    start = copy.deepcopy(adapter_state(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    if router != "token":
        set_ids(model, 1, 2, 0)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids().flatten()).backward()
        optimizer.step()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if "lora_" not in name)
    assert not [name for name, p in adapter_state(model).items() if torch.equal(p, start[name])]


def test_one_weight_of_one_gives_the_router_no_gradient():
    """Not even one of rounding, which Adam would make as large as any."""
    w, _ = layer(num_experts=3, top_k=1, aux={"z": 1.0})
    w(torch.randn(50, 5, dtype=torch.float64)).square().sum().backward()
    assert torch.equal(w.lora_router.grad, torch.zeros(3, 5).double()) and w.lora_B.grad.any()


def test_dropout_is_that_of_the_expert():
    """At p = 0.5 every input is zero or doubled; the rows of an expert without dropout, and those without an expert, see all of x."""
    w, model = layer("modality", experts={"vision": VISION, "speech": {**SPEECH, "dropout": 0.5}})
    x = torch.randn(300, 4, 5, dtype=torch.float64)
    task_ids(model).set(torch.arange(300) % 3)
    w.eval()
    full = w(x)
    w.train()
    torch.manual_seed(0)
    dropped = w(x)
    assert torch.equal(dropped[0::3], full[0::3]) and torch.equal(dropped[1::3], full[1::3])
    assert not torch.isclose(dropped[2::3], full[2::3]).any(-1).all(-1).any()
    e = torch.eye(5, dtype=torch.float64).expand(400, 5, 5)
    set_ids(model, 2)
    outputs = w(e) - w.base_layer(e)
    per_input = (w.lora_A["speech"].T @ w.lora_B["speech"].T)[None]  # (1, in, out), scale 1
    kept = (outputs / per_input).mean(-1)
    assert torch.allclose(kept, kept.round()) and set(kept.round().unique().tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1, abs=0.1)  # 2000 fair coins: s.d. 0.022
