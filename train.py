"""Train: `python train.py [group=option ...] [key=value ...]`; `python train.py --help` lists them."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from framework import entry, resolvers


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="train")
def application(config: DictConfig) -> float | None:
    from framework.run import train

    return entry.run_job(train, config)


def main(argv: list[str] | None = None) -> int:
    """Run on `argv` (default: the command line) and return the exit code."""
    resolvers.register()
    return entry.run_app(application, "train", argv)


if __name__ == "__main__":
    sys.exit(main())
