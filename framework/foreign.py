"""`ckpt=HF_DIR`: a Hugging Face folder is a run too. It is converted once, into the cache, and found there again."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

from components.errors import UserError

CACHE = Path(".cache")  # where nobody names one
ABOUT = "config.json"
READ = (".json", ".jinja", ".safetensors", ".bin", ".pth")  # endings of the files that an import looks at
VERSION = 1  # of what an import writes; a higher one leaves what earlier ones wrote in the cache

_announced: set[Path] = set()  # runs in the cache that this process has told of


def is_foreign(path: Path) -> bool:
    """Is this a Hugging Face folder, and no run of ours?"""
    return (path / ABOUT).is_file() and not (path / "config.yaml").is_file()


def as_run(path: Path, cache_dir: Path) -> Path:
    """The run directory of a Hugging Face folder, made now or before; any other path as it is.

    Raises:
        UserError: the folder is damaged, incomplete, or of a model that is not there.
    """
    if not is_foreign(path):
        return path
    from framework.convert import import_checkpoint

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)
    run = cache_dir / "imported" / f"{name}-{fingerprint(path)}"
    if (run / "config.yaml").is_file():
        if run not in _announced:
            print(f"ckpt={path}: a Hugging Face folder, converted before into {run}", file=sys.stderr)
            _announced.add(run)
        return run
    print(f"ckpt={path}: a Hugging Face folder; converting it into {run}, which later runs take", file=sys.stderr)
    _announced.add(run)
    try:
        import_checkpoint(path, run, "auto", None, None, [], "paths.cache_dir")
    except (OSError, UserError) as error:
        if (run / "config.yaml").is_file():  # another process was faster
            return run
        if isinstance(error, OSError):
            raise
        where = "" if str(path) in str(error) else f"{path}: "
        raise UserError(f"ckpt: {where}{error}") from error
    return run


def fingerprint(folder: Path) -> str:
    """12 hex digits that change with configuration, tokenizer and chat template, and with names, sizes and times of the weights."""
    digest = hashlib.sha256(str(VERSION).encode())
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in READ:
            continue
        digest.update(file.name.encode())
        if file.suffix in (".json", ".jinja"):
            digest.update(file.read_bytes())
        else:
            about = file.stat()
            digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
