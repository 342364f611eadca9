"""Reference documents of a synthesis: files of text or of rows, each document once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from components.data.errors import did_you_mean
from components.data.sources import FileSet, Record, parse_entries
from components.errors import UserError
from components.synthesis.calls import Document


def read_documents(key: str, path: Any, columns: Sequence[str], most_chars: int, most: int | None) -> tuple[list[Document], dict[str, int]]:
    """The documents of a path (file, folder, glob, hub:NAME or a list of them), in their order, and counts of what was left out or cut.

    columns: of a row, joined by line breaks. most_chars: a longer document is cut there. most: the first so many; None: all.
    Raises UserError naming `key`, the file and the place for what cannot be read, and where nothing is left.
    """
    found: dict[str, Document] = {}
    counts = {"empty": 0, "repeated": 0, "cut": 0}
    for entry in parse_entries(key, path):
        for _, file, place, record in FileSet(key, entry, "strict", None).records():
            where = f"{file}, {place}" if place else file
            text = text_of(record, columns, where).strip()
            if not text:
                counts["empty"] += 1
                continue
            counts["cut"] += len(text) > most_chars
            text = text[:most_chars]
            name = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
            counts["repeated"] += name in found
            found.setdefault(name, Document(name, text, where))
            if most is not None and len(found) == most:
                return list(found.values()), counts
    if not found:
        raise UserError(f"{key}: {path}: no document with text in it; {counts['empty']:,} are empty")
    return list(found.values()), counts


def text_of(record: Record, columns: Sequence[str], where: str) -> str:
    """The text of a record. Raises UserError for a column that is not there or holds no text."""
    if isinstance(record, str):
        return record
    parts = []
    for column in columns:
        value = record.get(column)
        if not isinstance(value, str):
            known = [name for name, other in record.items() if isinstance(other, str)]
            raise UserError(
                f"task.columns: {column!r}: {where} has no text there; its columns of text are {', '.join(known) or 'none'}"
                f"{did_you_mean(column, known)}"
            )
        parts.append(value)
    return "\n".join(parts)
