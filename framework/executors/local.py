"""Option executor=local: the engine works in this process."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from components.contracts import Engine
from framework.build import Run
from framework.engines.building import build_engine


class Local:
    """Builds the engine round the run that this process holds."""

    in_process = True

    def engine(self, config: DictConfig, run: Run | None, cache_dir: Path) -> Engine:
        """See `framework/generate.py`, `Executor`."""
        return build_engine(config.engine, run, cache_dir, config.adapter.task)
