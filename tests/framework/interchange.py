"""Small Phi-4-Mini runs with random weights, and Hugging Face folders as runs."""

import torch

from components.data.tokenizers import bytes_tokenizer
from framework import build, convert
from framework.foreign import as_run

SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def phi_run(folder, *words):
    """A run directory: 2 layers, heads of 16 with 12 rotary dims, LongRoPE from 24 tokens to 96. Weights are far from uniform."""
    sizes = ["hidden_size=64", "num_heads=4", "num_kv_heads=2", "head_dim=16", "intermediate_size=96", "max_length=24"]
    rope = [] if "rope=none" in words else ["rope=longrope", "rope.factor=4", f"rope.factors={LONG}", f"rope.short_factors={SHORT}"]
    config = build.compose("train", ["model=phi4mini", "model/size=test", *(f"model.{word}" for word in sizes), *rope, *words])
    tokenizer = bytes_tokenizer()
    torch.manual_seed(0)
    model = build.build_model(config, tokenizer.vocab_size)
    build.build(config.adapter).apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.5)
    config.model.vocab_size = model.vocab_size
    convert.write_run(folder, "phi4mini", config, model.state_dict())
    tokenizer.save(folder / "tokenizer")
    return folder


def said(folder, cache):
    """The run that a Hugging Face folder becomes."""
    return as_run(folder, cache / "cache")
