"""Checkpoint files: written whole or not at all, found again after any kind of death, and loaded strictly."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn

from components.contracts import UserError
from framework.runs import read_state

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
NAME = re.compile(r"step(\d{6,})\.ckpt")
SHOWN_MISMATCHES = 3


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a hidden name, syncs to disk and renames: a kill at any moment leaves no half-written file under a checkpoint's name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            UserError: no space left; nothing that was there before is lost.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.tmp"
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            if is_out_of_space(error, path.parent):
                raise UserError(f"{path}: no space left on device; free some, then resume (earlier checkpoints are intact)") from error
            raise


def is_out_of_space(error: BaseException, folder: Path) -> bool:
    """Is a full disk behind this error? torch.save hides the reason in a RuntimeError of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_name(step: int) -> str:
    """File name of a checkpoint: no '=', which the command line could not take."""
    return f"step{step:06d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """Optimizer step in a checkpoint's name, -1 for any other file."""
    match = NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, readable or not."""
    return sorted((p for p in (run / FOLDER).glob("step*.ckpt") if checkpoint_step(p) >= 0), key=checkpoint_step)


def is_intact(path: Path) -> bool:
    """Does every part of the file match its checksum? (A checkpoint is a zip archive; its directory stands at the end.)"""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def newest_intact(run: Path) -> Path | None:
    """The newest checkpoint that can be read; damaged ones are skipped with one line each."""
    for path in reversed(checkpoints(run)):
        if is_intact(path):
            return path
        line = f"{path}: damaged or truncated, skipped"
        print(line, file=sys.stderr)
        log.warning(line)
    return None


def newest_checkpoint(run: Path) -> Path:
    """As `newest_intact`, but a run without one is the user's error.

    Raises:
        UserError: the run has no readable checkpoint.
    """
    found = newest_intact(run)
    if found is None:
        raise UserError(f"ckpt: {str(run)!r} has no readable checkpoint; train it further with python train.py resume={run}")
    return found


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the lowest validation loss; the newest one where none was validated."""
    name = read_state(run).get("best_checkpoint")
    path = run / FOLDER / str(name)
    return path if name and is_intact(path) else newest_checkpoint(run)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU; runs no code from it.

    Raises:
        UserError: missing, truncated, damaged, or not a checkpoint of this project.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"ckpt: {str(path)!r} does not exist") from error
    except Exception as error:  # torch reports a damaged file as any of half a dozen types
        raise UserError(f"ckpt: {str(path)!r} cannot be read: it is truncated, damaged or not a checkpoint; use an earlier one") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"ckpt: {str(path)!r} is not a checkpoint of a training run")
    return checkpoint


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The model's weights by parameter name: the averaged ones where the run kept an average."""
    prefix = "model."
    weights = {name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)}
    return weights | checkpoint.get("callbacks", {}).get("Ema", {}).get("average", {})


def mismatch(model: nn.Module, weights: dict[str, Tensor]) -> str | None:
    """What keeps these weights from fitting this model, None when they fit. Names the first few keys and shapes."""
    own = model.state_dict()
    shapes = [
        f"{n} is {tuple(w.shape)} there, {tuple(own[n].shape)} here" for n, w in weights.items() if n in own and own[n].shape != w.shape
    ]
    shapes += [f"{n} is only here" for n in own if n not in weights] + [f"{n} is only there" for n in weights if n not in own]
    if not shapes:
        return None
    more = f"; and {len(shapes) - SHOWN_MISMATCHES} more" if len(shapes) > SHOWN_MISMATCHES else ""
    return "; ".join(shapes[:SHOWN_MISMATCHES]) + more


def load_weights(model: nn.Module, path: Path) -> int:
    """Put a checkpoint's weights into a model; returns the optimizer step they are from.

    Raises:
        UserError: unreadable, or of another architecture.
    """
    checkpoint = read_checkpoint(path)
    weights = model_weights(checkpoint)
    if difference := mismatch(model, weights):
        raise UserError(f"ckpt: {str(path)!r} is of another architecture: {difference}")
    model.load_state_dict(weights)
    return int(checkpoint["global_step"])
