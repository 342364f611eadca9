"""`python -m framework.optimizer_report WORD ...`: what the optimizer's state will take, before anything is allocated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from components.contracts import UserError
from framework.command import command_parser, run_command

EXAMPLES = """examples:
  python -m framework.optimizer_report                                  the default run
  python -m framework.optimizer_report model/size=3b8                   a model of any size, on any machine
  python -m framework.optimizer_report optimizer=adamw seed=3             any words of train.py
"""


def build_on_meta(config: DictConfig) -> nn.Module:
    """The model with its adapter, without memory for its weights. Prepares the data where the vocabulary follows the tokenizer."""
    from framework import build

    vocab_size = config.model.vocab_size
    if vocab_size is None:
        data = build.build_data(config)
        data.prepare(Path(config.paths.cache_dir))
        vocab_size = data.tokenizer.vocab_size
    with torch.device("meta"):
        model = build.build_model(config, vocab_size)
        build.build(config.adapter).apply(model)
    return model


def state_report(words: Sequence[str]) -> str:
    """The tables: state of every trainable parameter as the configured optimizer has it, and of the whole under every known rule.

    words: a command line of train.py.

    Raises:
        UserError: the configuration is wrong, or names a run that exists.
    """
    from components.optim.accounting import MAX_PRECOND_DIM, RANK, compare_rules, report, rules_table
    from components.optim.groups import named_parameters
    from framework import build

    config = build.compose("train", list(words))
    for key in ("ckpt", "resume"):
        if config[key]:
            raise UserError(f"{key}: {config[key]!r} names a run, and this is of a configuration; drop it and name the model")
    if not config.optimizer:
        raise UserError("optimizer: none is configured; name one, e.g. optimizer=adamw")
    model = build_on_meta(config)
    settings: dict[str, Any] = {"rank": RANK, "max_precond_dim": MAX_PRECOND_DIM}  # the optimizer's own, where it has them
    settings |= {key: config.optimizer[key] for key in (*settings, "matrix_roles") if key in config.optimizer}
    rows = compare_rules(named_parameters(model), **settings)
    return "\n".join(
        [
            f"state of {config.optimizer._target_}, bytes, with step counters",
            report(build.build_optimizer(config, model)),
            "",
            "the same parameters under each rule, float32, without step counters and overrides; "
            f"rank {settings['rank']}, sides up to {settings['max_precond_dim']}",
            rules_table(rows),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    description = "Say what the state of the optimizer will take, by parameter and under other rules. No weights are allocated."
    parser = command_parser("optimizer_report", description, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="WORD", help="overrides, as train.py takes them")

    def show(given: argparse.Namespace) -> int:
        print(state_report(given.words))
        return 0

    return run_command(parser, argv, show)


if __name__ == "__main__":
    sys.exit(main())
