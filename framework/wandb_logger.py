"""Weights & Biases: online with a key, otherwise offline by itself. A run keeps its id over all continuations."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import socket
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from framework.logging import RunLogger, say
from framework.runs import read_state, write_state

DEFAULT_HOST = "https://api.wandb.ai"
CONNECT_SECONDS = 3.0
INIT_SECONDS = 20.0


def new_run_id() -> str:
    """Eight characters, as W&B's own ids; drawn from the operating system, so that no seeded generator moves."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def host() -> str:
    """Address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)


def has_key() -> bool:
    """Is there an API key, in the environment or in netrc?"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or None)
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlparse(host()).hostname or "") is not None


def is_reachable() -> bool:
    """Does the server accept a connection? W&B itself would try for minutes. Behind a proxy we cannot tell, and say yes."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlparse(host())
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def choose_mode(wanted: str) -> str:
    """'online', 'offline' or 'disabled' from the option's `mode` (auto follows WANDB_MODE, key and network)."""
    if wanted != "auto":
        return wanted
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("offline", "dryrun", "disabled"):
        return "offline" if asked == "dryrun" else asked
    if not has_key():
        return "offline"
    if not is_reachable():
        say(f"W&B: {host()} cannot be reached; logging offline")
        return "offline"
    return "online"


class WandbLogger(RunLogger):
    """One W&B run. Its history has exactly the rows of metrics.csv; every write names its step."""

    def __init__(self, project: str, entity: str | None, group: str | None, job_type: str, mode: str) -> None:
        """
        Args:
            project: W&B project.
            entity: user or team; None: the key's default.
            group: groups runs, e.g. the name of a sweep.
            job_type: e.g. "train".
            mode: auto, online, offline or disabled.

        Raises:
            ValueError: unknown mode.
        """
        super().__init__()
        if mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"logger.mode={mode!r}; one of auto, online, offline, disabled")
        self.project, self.entity, self.group, self.job_type, self.mode = project, entity, group, job_type, mode
        self.run: Any = None
        self.offline = True

    def start(self, run_dir: Path, info: Mapping[str, Any]) -> None:
        """Open the run under the id kept in run_state.json. info: name, tags, config, group (used where the option has none)."""
        import wandb

        logging.getLogger("wandb").propagate = False  # it has its own debug.log; train.log is for people
        run_id = read_state(run_dir).get("wandb_id") or new_run_id()
        write_state(run_dir, wandb_id=run_id)
        mode: Any = choose_mode(self.mode)
        arguments: dict[str, Any] = {
            "project": self.project, "entity": self.entity, "group": self.group or info["group"], "job_type": self.job_type,
            "id": run_id, "resume": "allow", "dir": str(run_dir), "name": info["name"], "tags": info["tags"], "config": info["config"],
            "reinit": "create_new",
        }  # fmt: skip
        settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, x_disable_stats=True, x_save_requirements=False)
        try:
            self.run = wandb.init(**arguments, mode=mode, settings=settings)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            say(f"W&B: {' '.join(str(error).split())[:120]}; logging offline")
            mode = "offline"
            self.run = wandb.init(**arguments, mode=mode, settings=settings)
        self.offline = mode == "offline"
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        if mode == "online":
            say(f"W&B: {self.run.url}")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row under its step. A resumed online run repeats steps that the server has; it keeps the first, which are equal."""
        if self.run is not None:
            self.run.log(dict(metrics), step=step, commit=True)

    def log_images(self, images: Mapping[str, Path]) -> None:
        """Show pictures, PNG files by name, beside the last row."""
        if self.run is not None and images:
            import wandb

            self.run.log({f"images/{name}": wandb.Image(str(path)) for name, path in images.items()}, commit=True)

    def close(self, exit_code: int, summary: Mapping[str, float]) -> list[str]:
        """Finish the run as done (0), or failed; wait for the upload."""
        if self.run is None:
            return []
        import wandb

        folder, run, self.run = Path(self.run.dir).parent, self.run, None
        run.summary.update({key: value for key, value in summary.items() if value is not None})
        run.finish(exit_code=exit_code)
        if wandb.run is None:  # nobody else in this process uses W&B's service: end it too
            wandb.teardown()
        return [f"W&B (offline): wandb sync {folder.parent}/offline-run-*-{run.id}"] if self.offline else []
