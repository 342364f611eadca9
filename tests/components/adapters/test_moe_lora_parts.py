"""Mixtures of LoRAs: losses and statistics of the router, merging, switching, folders, the experts of PEFT, bad options."""

import copy
import math

import pytest
import torch

from components.adapters.base import OFF, adapter_layers, adapter_state, disabled, merge, task_ids, unmerge
from components.contracts import Batch, ModelOutput, UserError
from tests.components.adapters.helpers import Toy, awaken, ids, lora
from tests.components.adapters.moe_helpers import SPEECH, TASKS, VISION, adapted, layer, moe, relative, set_ids


class Network(Toy):
    """A model as the contract has it: batch in, ModelOutput out."""

    def forward(self, batch):
        return ModelOutput(super().forward(batch.input_ids))


def batch():
    return Batch(ids())


def network(checkpointing=False, **changes):
    model = Network()
    adapted("token", model, num_experts=3, **{"aux": {"balance": 0.5, "z": 0.25}, **changes})
    awaken(model).train()
    model.checkpointing = checkpointing
    return model


@pytest.mark.parametrize("top_k", [None, 2])
def test_losses_and_statistics(top_k):
    """Against loops: E sum f P, mean logsumexp^2, load and entropy; tokens that are OFF count in none."""
    w, model = layer(num_experts=3, top_k=top_k, aux={"balance": 0.5, "z": 0.25}, tasks=TASKS)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    modes = torch.tensor([[0, OFF, 1, 2], [OFF, OFF, 0, 0]])
    task_ids(model).set(modes)
    w.recording = True
    w(x)
    logits = [(w.lora_router @ x[b, t]).tolist() for b in range(2) for t in range(4) if modes[b, t] != OFF]
    p = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits]
    choices = [e for row in p for e in sorted(range(3), key=lambda e: -row[e])[: top_k or 1]]
    f = [choices.count(e) / len(choices) for e in range(3)]
    mean = [sum(row[e] for row in p) / len(p) for e in range(3)]
    statistics, losses = w.router_statistics(), w.take_aux_losses()
    assert losses["router_balance"].item() == pytest.approx(0.5 * 3 * sum(a * b for a, b in zip(f, mean)), rel=1e-12)
    squares = [math.log(sum(map(math.exp, row))) ** 2 for row in logits]
    assert losses["router_z"].item() == pytest.approx(0.25 * sum(squares) / len(squares), rel=1e-12)
    assert statistics["load"].tolist() == pytest.approx(f, rel=1e-12)
    entropy = -sum(v * math.log(v) for row in p for v in row) / len(p)
    assert statistics["entropy"].item() == pytest.approx(entropy, rel=1e-12)
    assert w.diagnostics() == pytest.approx({"max_load": max(f), "min_load": min(f), "entropy": entropy}, rel=1e-12)
    assert w.take_aux_losses() == {}


def test_balance_is_one_where_the_load_is_even():
    w, _ = layer(num_experts=4, inside=4, out=4, aux={"balance": 1.0})
    w.lora_router.data = 8 * torch.eye(4).double()
    w.recording = True
    w(torch.eye(4).double())  # every expert is the choice of one token
    assert w.take_aux_losses()["router_balance"].item() == pytest.approx(1, rel=1e-12)
    w(torch.eye(4)[[0, 0, 0, 0]].double())  # all tokens choose the first
    assert w.take_aux_losses()["router_balance"].item() == pytest.approx(4 * math.exp(8) / (math.exp(8) + 3), rel=1e-12)


def test_losses_reach_the_output_and_the_router_and_survive_checkpointing():
    found = []
    for checkpointing in (False, True):
        model = network(checkpointing)
        output = model(batch())
        assert set(output.aux_losses) == {"router_balance", "router_z"}
        (output.hidden.square().mean() + sum(output.aux_losses.values())).backward()
        found.append((output.aux_losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        for _, w in adapter_layers(model):
            assert w.take_aux_losses() == {} and not w.recording  # the backward ran the layers again and kept nothing
    (losses, gradients), (checkpointed_losses, checkpointed) = found
    assert losses == checkpointed_losses and gradients.keys() == checkpointed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())
    alone = network()
    sum(alone(batch()).aux_losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in alone.named_parameters() if "router" in name)


def test_losses_are_the_mean_over_the_layers_and_come_anew_each_step():
    model = network()
    first = model(batch()).aux_losses
    seen = []
    for _, w in adapter_layers(model):
        w.take_aux_losses = lambda w=w, real=w.take_aux_losses: seen.append(real()) or seen[-1]
    again = model(batch()).aux_losses
    assert {k: v.item() for k, v in again.items()} == {k: v.item() for k, v in first.items()}
    values = [taken["router_z"].item() for taken in seen if taken]
    assert len(values) == 8 and again["router_z"].item() == pytest.approx(sum(values) / 8, rel=1e-6)


def test_no_losses_in_evaluation_without_weights_or_while_off():
    assert network(aux={"balance": 0.0, "z": 0.0})(batch()).aux_losses == {}
    model = network()
    assert model.eval()(batch()).aux_losses == {}
    model.train()
    with disabled(model):
        assert model(batch()).aux_losses == {}
    with torch.no_grad():
        assert model(batch()).aux_losses == {}
    assert set(model(batch()).aux_losses) == {"router_balance", "router_z"}


def test_a_model_of_another_kind_keeps_no_losses():
    model = Toy()
    adapted("token", model, aux={"z": 1.0})
    model.train()(ids())
    assert all(w.take_aux_losses() == {} for _, w in adapter_layers(model))
    assert all(set(w.router_statistics()) == {"load", "entropy"} for _, w in adapter_layers(model))


@pytest.mark.parametrize("router, task", [("modality", "vision"), ("modality", "vision_speech"), ("task", "add")])
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(router, task):
    _, model = adapted(router)
    awaken(model).eval()
    task_ids(model).set(task)
    expected, before = model(ids()), copy.deepcopy(model.state_dict())
    assert merge(model, task)["modules"] == 8
    assert relative(model(ids()), expected) < 1e-5
    with pytest.raises(UserError, match=r"merged into the weights"):
        set_ids(model, 0, 1, 2)
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids()), expected)


def test_merging_text_adds_nothing_and_a_token_router_cannot_be_merged():
    _, model = adapted("modality")
    awaken(model).eval()
    with disabled(model):
        base = model(ids())
    merge(model, "text")
    assert torch.equal(model(ids()), base)
    _, model = adapted("token")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"adapter\.router=token"):
        merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("router", ["modality", "task", "token"])
def test_disabled_is_the_base_and_a_copy_is_its_own(router):
    model = Toy()
    base = model(ids())
    adapted(router, model)
    awaken(model)
    if router != "token":
        set_ids(model, 1, 2, 0)
    expected = model(ids())
    with disabled(model):
        assert torch.equal(model(ids()), base)
    twin = copy.deepcopy(model)
    if router != "token":
        set_ids(model, 0, 0, 1)
        model(ids())
    assert torch.equal(twin(ids()), expected)


def test_the_router_is_float32_under_autocast():
    w, model = layer("token", dtype=torch.float32, aux={"balance": 1.0})
    w.recording = True
    x = torch.randn(3, 4, 5)
    plain = w(x)
    exact = w.router_statistics()["entropy"]
    with torch.autocast("cpu", torch.bfloat16):
        low, gates = w(x), w.gates(x)
    assert low.dtype == torch.bfloat16 and relative(low.float(), plain) < 2e-2  # 8 bits
    assert gates.dtype == torch.float32 and w.router_statistics()["entropy"] == exact
    for router in ("modality", "task"):
        w, model = layer(router, dtype=torch.float32)
        set_ids(model, 1, 0, 2)
        with torch.autocast("cpu", torch.bfloat16):
            low = w(x)
        assert low.dtype == torch.bfloat16 and relative(low.float(), w(x)) < 2e-2


@pytest.mark.parametrize("router", ["modality", "task", "token"])
def test_compiles(router):
    """Learned routers to one graph for any ids; the rows of modes are sorted outside the graph."""
    w, model = layer(router, dtype=torch.float32, tasks=TASKS if router != "modality" else None)
    compiled = torch.compile(w, fullgraph=router != "modality", backend="eager")
    x = torch.randn(3, 4, 5)
    for modes in ([0, 1, 2], [2, OFF, 0]):
        set_ids(model, *modes)
        assert torch.equal(compiled(x), w(x))


@pytest.mark.parametrize("router", ["modality", "task", "token"])
def test_folder_round_trip_is_exact(router, tmp_path):
    adapter, model = adapted(router)
    adapter.save(awaken(model), tmp_path)
    _, again = adapted(router)
    adapter.load(again, tmp_path)
    assert all(torch.equal(value, adapter_state(again)[name]) for name, value in adapter_state(model).items())
    beside = ["routing.json"] if router == "modality" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", *beside]


def test_tasks_in_another_order_are_put_right(tmp_path):
    adapter, model = adapted("task")
    adapter.save(awaken(model), tmp_path)
    other, again = adapted("task", tasks=["copy", "sort", "add"])
    other.load(again, tmp_path)
    for name in TASKS:
        task_ids(model).set(name)
        task_ids(again).set(name)
        assert torch.equal(model(ids()), again(ids())), name


@pytest.mark.parametrize(
    "router, changes, message",
    [
        ("token", {"num_experts": 3}, "num_experts is 2; this adapter has 3"),
        ("token", {"alpha": 5}, "alpha is 6; this adapter has 5"),
        ("token", {"targets": "role:qkv"}, "has no place for|which this model has no place"),
        ("task", {}, "router is token; this adapter has task"),
        ("modality", {}, "router is token"),
    ],
)
def test_loading_is_strict(router, changes, message, tmp_path):
    adapter, model = adapted()
    adapter.save(model, tmp_path)
    other, again = adapted(router, **changes)
    before = copy.deepcopy(adapter_state(again))
    with pytest.raises(UserError, match=message):
        other.load(again, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(again).items())


def test_loading_refuses_tasks_experts_and_files_of_others(tmp_path):
    adapter, model = adapted("task")
    adapter.save(model, tmp_path)
    other, again = adapted("task", tasks=["sort", "add", "spell"])
    with pytest.raises(UserError, match=r"tasks is \['sort', 'add', 'copy'\]; this adapter has \['sort', 'add', 'spell'\]"):
        other.load(again, tmp_path)
    plain, toy = lora(), Toy()
    plain.apply(toy)
    plain.save(toy, tmp_path)
    with pytest.raises(UserError, match="peft_type is LORA; needed is MOE_LORA"):
        adapter.load(model, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        adapter.load(model, tmp_path / "nothing")


def named(model=None, train=None):
    return adapted("modality", model, experts={"fr": VISION, "de": SPEECH}, rules={}, train=train)


def test_named_adapters_in_one_batch_are_those_of_peft():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Toy(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["qkv_proj", "o_proj", "down_proj"]), "fr")
    theirs.add_adapter("de", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["qkv_proj", "o_proj", "down_proj"]))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    _, ours = adapted("modality", experts={"fr": VISION, "de": SPEECH}, rules={}, targets=["qkv_proj", "o_proj", "down_proj"])
    state = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if "lora_" in name}
    for name, p in adapter_state(ours).items():
        path, side, expert = name.rsplit(".", 2)
        p.copy_(state[f"{path}.{side}.{expert}.weight"])
    for rows in (["fr", "de", "__base__"], ["de", "de", "fr"]):
        task_ids(ours).set(torch.tensor([-1 if name == "__base__" else ["fr", "de"].index(name) for name in rows]))
        assert relative(ours.eval()(ids()), theirs.eval()(ids(), adapter_names=rows)) < 1e-6
    for name in ("fr", "de"):
        theirs.set_adapter(name)
        task_ids(ours).set(name)
        assert relative(ours(ids()), theirs(ids())) < 1e-6


def test_an_expert_comes_from_and_goes_to_pefts_folder(tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    theirs = peft.get_peft_model(Toy(), peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter, ours = named()
    french = {name: p.clone() for name, p in adapter_state(awaken(ours)).items() if name.endswith(".fr")}
    adapter.load_expert(ours, "de", tmp_path / "theirs")
    task_ids(ours).set("de")
    assert relative(ours.eval()(ids()), theirs.eval()(ids())) < 1e-6
    assert all(torch.equal(p, adapter_state(ours)[name]) for name, p in french.items())
    adapter.save_expert(ours, "de", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Toy(), tmp_path / "ours")
    assert relative(again.eval()(ids()), theirs(ids())) < 1e-6
    with pytest.raises(UserError, match=r"r is 3; expert fr has 2"):
        adapter.load_expert(ours, "fr", tmp_path / "ours")
    with pytest.raises(UserError, match=r"'fre'; the named experts are fr, de; did you mean fr\?"):
        adapter.load_expert(ours, "fre", tmp_path / "ours")
    with pytest.raises(UserError, match=r"none with adapter\.router=token"):
        moe().save_expert(ours, "fr", tmp_path)


def test_an_expert_is_read_strictly(tmp_path):
    adapter, model = named()
    adapter.save_expert(model, "fr", tmp_path)
    narrow, other = adapted("modality", experts={"fr": VISION, "de": SPEECH}, rules={}, targets="role:qkv")
    with pytest.raises(UserError, match="which this model has no place for"):
        narrow.load_expert(other, "fr", tmp_path)
    narrow.save_expert(other, "fr", tmp_path)
    with pytest.raises(UserError, match="lacks 12 of"):
        adapter.load_expert(model, "fr", tmp_path)


# ------------------------------------------------------------------------------------------------ bad options

BAD = [
    ("token", {"router": "tokens"}, r"adapter\.router: 'tokens'; allowed are modality, task, token; did you mean token\?"),
    ("token", {"r": 0}, r"adapter\.r: 0"),
    ("token", {"alpha": 0}, r"adapter\.alpha: 0"),
    ("token", {"dropout": 1.0}, r"adapter\.dropout: 1\.0"),
    ("token", {"num_experts": 0}, r"adapter\.num_experts: 0"),
    ("token", {"top_k": 3}, r"adapter\.top_k: 3; must be null or from 1 to adapter\.num_experts=2"),
    ("token", {"top_k": 1}, r"adapter\.top_k: 1; .* only adapter\.aux\.balance or \.z can teach the router"),
    ("token", {"aux": {"balanced": 1.0}}, r"adapter\.aux\.balanced: unknown; allowed are balance, z; did you mean balance\?"),
    ("token", {"aux": {"z": -1.0}}, r"adapter\.aux\.z: -1\.0"),
    ("token", {"experts": {"a": VISION}}, r"adapter\.experts: set, but adapter\.router=token does not read it"),
    ("token", {"train": ["a"]}, r"adapter\.train: set, but"),
    ("task", {"top_k": 1}, r"adapter\.top_k: set, but adapter\.router=task does not read it; drop it, or use router=token"),
    ("task", {"aux": {"z": 1.0}}, r"adapter\.aux: set, but adapter\.router=task"),
    ("task", {"num_experts": 3}, r"adapter\.r: 4 is shared out among adapter\.num_experts=3 experts"),
    ("task", {"tasks": []}, r"adapter\.tasks: none, and adapter\.router=task"),
    ("task", {"embedding_dim": 0}, r"adapter\.embedding_dim: 0"),
    ("modality", {"experts": {}, "rules": {}}, r"adapter\.experts: none"),
    ("modality", {"experts": {"a.b": VISION}, "rules": {}}, r"adapter\.experts: 'a\.b'"),
    ("modality", {"experts": {"a": {"r": 2}}, "rules": {}}, r"adapter\.experts\.a: has r; needed are r, alpha, dropout"),
    ("modality", {"experts": {"a": {**VISION, "r": 0}}, "rules": {}}, r"adapter\.experts\.a\.r: 0"),
    ("modality", {"experts": {"a": 4}, "rules": {}}, r"adapter\.experts\.a: 4; needed is \{r: RANK, alpha: NUMBER, dropout: SHARE\}"),
    ("modality", {"experts": {"a": {**VISION, "r": "x"}}, "rules": {}}, r"adapter\.experts\.a\.r: 'x'"),
    ("modality", {"experts": {"a": {**VISION, "alpha": "x"}}, "rules": {}}, r"adapter\.experts\.a\.alpha: 'x'; must be a number"),
    ("modality", {"experts": {"a": {**VISION, "dropout": None}}, "rules": {}}, r"adapter\.experts\.a\.dropout: None; must be a number"),
    ("modality", {"rules": {"text": "visoin"}}, r"adapter\.rules: 'visoin'; the experts are vision, speech; did you mean vision\?"),
    ("modality", {"train": ["spech"]}, r"adapter\.train: 'spech'; .* did you mean speech\?"),
    ("modality", {"train": []}, r"adapter\.train: \[\]"),
    ("modality", {"tasks": ["vision", "text"]}, r"adapter\.rules: modes text, vision, .* the tasks of the data are vision, text"),
]


@pytest.mark.parametrize("router, changes, message", BAD, ids=[f"{r}-{next(iter(c))}-{i}" for i, (r, c, _) in enumerate(BAD)])
def test_bad_options_are_one_line(router, changes, message):
    with pytest.raises(UserError, match=message) as error:
        moe(**{"router": router, **changes})
    assert "\n" not in str(error.value)
