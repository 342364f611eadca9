"""Make a run known when it begins: run_state.json, then the service, with the whole configuration."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from framework import runtime
from framework.estimate import count_parameters
from framework.foreign import as_run
from framework.logging import RunLogger, masked, masked_word
from framework.parts import Parts, sweep_of
from framework.runs import choices, read_state, with_inherited, write_state


def open_run(config: DictConfig, run_dir: Path, parts: Parts, service: RunLogger | None) -> None:
    """Write run_state.json and start the service; a service that cannot be started leaves the run failed."""
    state = read_state(run_dir)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    source = str(as_run(Path(config.ckpt), Path(config.paths.cache_dir))) if config.ckpt else None
    write_state(
        run_dir, name=config.name, seed=config.seed, status="running", created=state.get("created", now),
        step=parts.start_step, tokens=state.get("tokens", 0), versions=runtime.versions(), git=runtime.git_state(),
        data=parts.data_state, choices=with_inherited(choices(run_dir), source, Path(config.paths.root)),
    )  # fmt: skip
    if service is None:
        return
    chosen, sweep = read_state(run_dir)["choices"], sweep_of(run_dir)
    trainable, total = count_parameters(parts.model)
    extra = {
        "params": {"trainable": trainable, "total": total}, "git": runtime.git_state(), "versions": runtime.versions(),
        "command": shlex.join(masked_word(word) for word in sys.argv), "choices": chosen, "sweep": sweep,
    }  # fmt: skip
    tags = [*config.tags, *(f"{group}={option}"[:64] for group, option in chosen.items())]
    whole = {**masked(OmegaConf.to_container(config)), **extra}
    try:
        service.start(run_dir, {"name": run_dir.name, "tags": tags, "config": whole, "group": sweep})
    except BaseException:
        write_state(run_dir, status="failed")
        raise
