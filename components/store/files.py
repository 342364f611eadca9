"""Files that survive a crash, and what is said when they cannot be written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def trouble(folder: Path, error: OSError, saved: int | None = None, unsaved: int = 0) -> UserError:
    """One line for an error of the operating system. saved: rows that are safe; unsaved: rows after them."""
    kept = ""
    if saved is not None:
        again = f", the {unsaved:,} since the last save are asked again" if unsaved else ""
        kept = f"; nothing saved is lost: {saved:,} finished rows are kept{again}"
    if error.errno in FULL:
        return UserError(f"output: no space left for {folder} ({error.strerror}){kept}; free some and start the same command again")
    what = error.strerror or error
    return UserError(f"output: {folder} cannot be written ({what}){kept}; mend that and start the same command again, or choose another")


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte. Raises OSError; some may be written then."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make names that were made or replaced in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, durable: bool = True) -> None:
    """Put `data` in place of `path` as a whole: a reader finds the old file or the new one. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def as_json(value: Any) -> bytes:
    """Readable JSON, as bytes of a file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def lock(folder: Path) -> int:
    """Take `folder` for this process; returns a descriptor, and closing it, or the end of the process, gives the folder back.

    The lock is a file of its own, since the manifest is replaced as a whole. Raises UserError when another process has it.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(f"output: {folder} is being written by process {owner}; wait for it, or choose another folder") from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
