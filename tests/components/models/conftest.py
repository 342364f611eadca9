"""Models of the test size straight from the option files, without the framework."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from components.blocks import Decoder
from components.contracts import Batch
from components.rope.rules import NoRescaling

CONF = Path(__file__).parents[3] / "conf" / "model"
MODELS = sorted(path.stem for path in CONF.glob("*.yaml"))


VARIANTS = sorted(path.stem for path in (CONF / "variant").glob("*.yaml"))
SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml"))


read = functools.cache(OmegaConf.load)  # merging copies


def load_config(model: str, size: str, variant: str = "base") -> DictConfig:
    """The model node as the defaults list composes it (tests/conf compares): model, size, overlay, variant, overlay of the variant."""
    names = [model, f"size/{size}", f"overlay/{model}_{size}", f"variant/{variant}", f"overlay/{model}_{variant}_{size}"]
    files = [CONF / f"{name}.yaml" for name in names]
    nodes = [read(path) for path in files if path.exists()]
    whole = OmegaConf.create({"model": OmegaConf.merge(*nodes), "data": {"seq_len": 64}})
    return whole.model


def build(model: str, size: str = "test", seed: int = 0, variant: str = "base", **changes: Any) -> Decoder:
    config = OmegaConf.to_container(load_config(model, size, variant), resolve=True)
    module, name = config.pop("_target_").rsplit(".", 1)
    changes.setdefault("rope", NoRescaling())
    if config["vocab_size"] is None:
        changes.setdefault("vocab_size", 320)
    torch.manual_seed(seed)
    return getattr(importlib.import_module(module), name)(**{**config, **changes})


@pytest.fixture
def make_model():
    """make_model(name, size="test", seed=0, variant="base", **changes) -> Decoder."""
    return build


@pytest.fixture
def model_config():
    """model_config(name, size) -> its node."""
    return load_config


@pytest.fixture(params=MODELS)
def model_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(model_name: str) -> Decoder:
    return lively(build(model_name)).eval()


@pytest.fixture
def full_logits():
    """full_logits(model, ids (B, T), **fields of Batch) -> (B, T, V) without a state."""

    def run(model: Decoder, ids: torch.Tensor, **fields: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.logits(model(Batch(ids, **fields)).hidden)

    return run


@pytest.fixture
def close():
    """close(a, b): within 1e-5 of the largest entry of b, the house's bound for fp32 logits."""

    def check(a: torch.Tensor, b: torch.Tensor, relative: float = 1e-5) -> None:
        assert a.shape == b.shape
        worst = float((a - b).abs().max() / b.abs().max())
        assert worst <= relative, f"{worst:.2e} of the largest entry"

    return check


def lively(model: Decoder) -> Decoder:
    """Scale the weights so that every part matters: at init the branches are small beside the residual stream, which would hide faults."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name and "conv" not in name:
                parameter.mul_(3.0 if model.embed_tokens.weight is not parameter else 10.0)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def random_ids(rows: int, length: int, seed: int = 0, vocab: int = 320) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="random_ids")
def random_ids_fixture():
    """random_ids(rows, length, seed=0, vocab=320) -> (rows, length) int64."""
    return random_ids
