"""manifest.json: what is asked, and the shards that are full."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.store.files import as_json, replace_file, sync_folder
from components.store.ids import canonical

SCHEMA = 1
NAMED = 5  # changed keys that an error names


@dataclass
class Manifest:
    """Replaced as a whole when the store is opened and when a shard is full. shards: {name, rows, bytes} of the full ones."""

    space: dict[str, Any]
    space_hash: str
    run_id: str
    started: str
    resumed: list[str] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)
    schema_version: int = SCHEMA

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        replace_file(folder / "manifest.json", as_json(asdict(self)))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_manifest(space: Mapping[str, Any]) -> Manifest:
    """That of an empty store."""
    text = canonical(space)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return Manifest(json.loads(text), digest, uuid.uuid4().hex[:12], now())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, None where there is none. Raises UserError when it cannot be understood."""
    path = folder / "manifest.json"
    if not path.is_file():
        if (folder / "parts").is_dir() and any((folder / "parts").iterdir()):
            raise UserError(f"output: {folder} has rows but no manifest.json; put it back, or choose another folder")
        return None
    try:
        found = json.loads(path.read_bytes())
        if found["schema_version"] != SCHEMA:
            raise UserError(f"output: {path} has schema_version {found['schema_version']!r}; this version reads {SCHEMA}")
        return Manifest(**found)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"output: {path} is no manifest of a store ({error}); put the right one back, or choose another folder") from error


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """'key.path: old -> new' of everything that differs between two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield f"{path}: {shorten(before)} -> {shorten(after)}"


def shorten(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse_change(folder: Path, old: Manifest, new: Manifest) -> None:
    """Raise UserError that names what is asked differently from before."""
    changed = list(differences(old.space, new.space))
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    raise UserError(
        f"output: {folder} holds answers to other requests ({'; '.join(changed[:NAMED])}{more}); put that back to go on, choose another "
        "folder, or set on_change=new, which moves the old answers aside"
    )


def move_aside(folder: Path, old: Manifest) -> Path:
    """Move all that belongs to `old` to a folder inside; the manifest last, so that a crash in between changes nothing. Raises OSError."""
    aside = folder / f"before-{old.run_id}"
    aside.mkdir(exist_ok=True)
    for name in ("final", "final.partial", "errors.jsonl", "progress.json", "quarantine", "parts", "manifest.json"):
        if (folder / name).exists():
            os.replace(folder / name, aside / name)
    sync_folder(aside)
    sync_folder(folder)
    return aside
