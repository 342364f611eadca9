"""The experiments that compare adapters on several tasks: what is called matched or equal is, on the base that they name."""

from __future__ import annotations

import copy
import json
from functools import cache

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from components.adapters.base import adapter_layers
from components.data.tokenizers import bytes_tokenizer
from framework import resolvers
from framework.arms import arm_of, claim_hash, read_claim
from framework.build import build, build_model, plain
from framework.overrides import CONF, config_loader

resolvers.register()
TRANSFORMS = ("mtl_lora_interference", "mtl_lora_interference_scale", "mtl_lora_interference_h200")
MATCHED = (*TRANSFORMS, "mtl_lora_realtext", "mtl_lora_realtext_h200")
OTHER_SCALES = {  # of arms whose alpha / r is not the 4 of MTL-LoRA, as the documentation says
    "mtl_lora_interference": {"lora_matched": 16 / 10, "moe_lora": 2.0},
    "mtl_lora_interference_scale": {"lora_matched": 16 / 10},
    "mtl_lora_interference_h200": {"lora_matched": 16 / 9, "moe_lora": 2.0},
}


@cache
def experiment(name: str) -> DictConfig:
    with config_loader():
        words = ["trainer.precision=32-true", *(["texts=anywhere"] if "realtext" in name else [])]
        return hydra.compose("train", [f"experiment={name}", *words], return_hydra_config=True)


def of_arm(name: str, arm: str) -> DictConfig:
    config = copy.deepcopy(experiment(name))
    config.arm = arm
    return config


@cache
def base(name: str) -> nn.Module:
    """Without values, since only shapes matter."""
    config = experiment(experiment(name).made_by.base)
    tokenizer = config.data.tokenizer
    with torch.device("meta"):
        return build_model(config, bytes_tokenizer().vocab_size if tokenizer.kind == "bytes" else tokenizer.vocab_size)


@cache
def adapted(name: str, arm: str) -> tuple[nn.Module, int]:
    """The base with the adapter of an arm, and how many parameters are trained."""
    model = copy.deepcopy(base(name))
    node = OmegaConf.to_container(of_arm(name, arm).adapter, resolve=True)
    return model, build(node, path="adapter").apply(model)["trainable"]


@pytest.mark.parametrize("name", MATCHED)
def test_matched_arms_train_as_many_parameters(name):
    """`match_parameters` is what MTL-LoRA trains on that base, and LoRA is as near to it as a whole rank can be."""
    model, wanted = adapted(name, "mtl_lora")
    of_rank_one = sum(layer.in_features + layer.out_features for _, layer in adapter_layers(model))
    matched = [arm for arm in experiment(name).arms if arm.startswith("lora_matched")]
    assert matched
    for arm in matched:
        assert experiment(name).arms[arm].match_parameters == wanted
        assert abs(adapted(name, arm)[1] - wanted) <= of_rank_one / 2


@pytest.mark.parametrize("name", TRANSFORMS)
def test_arms_of_equal_scale_have_it(name):
    found = {arm: {layer.scale for _, layer in adapter_layers(adapted(name, arm)[0])} for arm in experiment(name).arms}
    assert found == {arm: {OTHER_SCALES[name].get(arm, 4.0)} for arm in experiment(name).arms}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_arm_is_swept_and_claimed_under_its_name(name):
    config = experiment(name)
    claim, swept = read_claim(plain(config.claim)), config.hydra.sweeper.params
    assert set(claim.arms) == set(config.arms) == set(swept.arm.split(","))
    assert list(map(int, swept.seed.split(","))) == claim.seeds == [1, 2, 3, 4, 5]
    assert all(arm_of(claim, {}, of_arm(name, arm)) == arm for arm in config.arms)


def test_rows_name_their_task_but_in_the_untold_arms():
    name = "mtl_lora_interference_h200"
    told = {arm: of_arm(name, arm).data.task_token for arm in experiment(name).arms}
    assert told == {arm: not arm.endswith("_untold") for arm in told} and sum(told.values()) == 9


@pytest.mark.parametrize("name", ["mtl_lora_interference", "mtl_lora_realtext"])
def test_the_claim_that_was_run_is_the_claim_that_stands(name):
    """Arms belong to a claim: those that came later stand in files of their own."""
    stored = json.loads((CONF.parent / "docs" / "verdicts" / f"{name}.json").read_text())
    assert claim_hash(plain(experiment(name).claim)) == stored["claim_hash"]
