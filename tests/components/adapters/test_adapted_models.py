"""Adapters and optimizers on the real models, from the shipped configuration, at size test. See also test_every_adapter.py."""

import pytest
import torch

from components.adapters.base import adapter_layers
from components.contracts import Batch
from components.optim.groups import describe, named_parameters
from framework.build import build, build_model, compose

MODELS = ["samba", "phi4mini"]
VOCAB = 2048


def parts(model: str, *overrides: str):
    """Configuration, model at size test with the adapter applied, and the adapter's report."""
    config = compose("train", [f"model={model}", "model/size=test", f"model.vocab_size={VOCAB}", *overrides])
    torch.manual_seed(0)
    network = build_model(config, VOCAB).eval()
    return config, network, build(config.adapter).apply(network)


def batch(length: int = 40) -> Batch:
    ids = torch.randint(VOCAB, (2, length + 1), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(length) >= 17).int().expand(2, -1)
    return Batch(ids[:, :-1], ids[:, 1:], segment_ids=segments)


def logits(model) -> torch.Tensor:
    return model.logits(model(batch()).hidden)


@pytest.mark.parametrize("model", MODELS)
def test_default_targets_wrap_every_projection(model):
    _, plain, _ = parts(model)
    _, _, report = parts(model, "adapter=lora")
    roles = {"qkv", "o", "gate_up", "down", "in_proj", "out_proj"}
    assert set(report["modules"]) == {name.removesuffix(".weight") for name, role in plain.roles().items() if role in roles}


@pytest.mark.parametrize("model", MODELS)
def test_every_linear_layer_is_called_as_a_module(model):
    """A nonzero adapter on any one of them changes the output; so nothing reads a weight past its wrapper."""
    _, adapted, report = parts(model, "adapter=lora", "adapter.targets=all-linear")
    before = logits(adapted)
    assert len(report["modules"]) == sum(isinstance(m, torch.nn.Linear) for m in parts(model)[1].modules())
    for name, layer in adapter_layers(adapted):
        torch.nn.init.normal_(layer.lora_B.weight)
        assert (logits(adapted) - before).abs().max() > 1e-5 * before.abs().max(), name
        torch.nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("model", MODELS)
def test_muon_takes_the_hidden_matrices_block_by_block(model):
    config, network, _ = parts(model, "optimizer=muon")
    optimizer = build(config.optimizer)(named_parameters(network))
    kind = {name: group["kind"] for group in optimizer.param_groups for name in group["parameter_names"]}
    assert kind.keys() == dict(network.named_parameters()).keys()
    for name, role in network.roles().items():
        assert kind[name] == ("muon" if role in config.optimizer.matrix_roles else "adamw"), name
    fused = {p.name: p.splits for p in named_parameters(network) if p.splits}
    roles = network.roles()
    assert {roles[name] for name in fused} >= {"qkv", "gate_up"}
    assert all(sum(splits) == network.get_parameter(name).shape[0] for name, splits in fused.items())
    assert sum(row["parameters"] for row in describe(optimizer)) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("adapter", "drop"), [(["adapter=none"], 0.5), (["adapter=lora", "adapter.dropout=0"], 0.08)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", MODELS)
def test_a_few_steps_fit_a_batch(model, optimizer, adapter, drop):
    """Nothing is random here, so that every step must help; 8 drop the loss by 0.88 or more (plain) and by 0.12 or more (adapter)."""
    config, network, _ = parts(model, f"optimizer={optimizer}", *adapter)
    network.train()
    steps = build(config.optimizer)(named_parameters(network))
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(logits(network).flatten(0, 1), batch().labels.flatten())
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - drop, losses
