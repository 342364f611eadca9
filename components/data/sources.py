"""What `data.path` may say - a file, folder, glob, hub name, a list of them, or weighted entries - as corpora of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from components.contracts import UserError
from components.data.documents import Document, Piece, digest, held_out_keys, split_tail
from components.data.errors import did_you_mean, unreadable
from components.data.readers import HUB, Errors, expand, is_table, open_hub, read_bytes, read_records, text_of

PathSpec = str | Sequence[Any] | Mapping[str, Any]
HASHED_BYTES = 256 * 2**20  # larger sources are recognised by size and time of change, so that a start does not read them all
Record = str | dict[str, Any]
Render = Callable[[str, str, Record], "tuple[Piece, ...] | None"]  # (file, place, record) -> pieces, None to leave it out


@dataclass(frozen=True)
class Entry:
    """One part of a mixture: some paths read alike, and how often its rows are drawn relative to the others."""

    paths: tuple[str, ...]
    weight: float | None = None
    column: str | None = None


def parse_entries(key: str, spec: PathSpec | None) -> list[Entry]:
    """Read `data.path`: a string, a list of strings (one source), or entries {path, weight, column} in a list or by name.

    Raises UserError for anything else, for unknown keys, and when some entries have a weight and others have not.
    """
    if isinstance(spec, str) and spec:
        return [Entry((spec,))]
    if isinstance(spec, Mapping) and spec:
        if "path" in spec:
            return [_entry(key, spec)]
        items = [(f"{key}.{name}", value) for name, value in spec.items()]
    elif isinstance(spec, Sequence) and not isinstance(spec, str) and spec:
        if all(isinstance(item, str) and item for item in spec):
            return [Entry(tuple(spec))]
        items = [(f"{key}[{i}]", value) for i, value in enumerate(spec)]
    else:
        raise UserError(f"{key}: {spec!r}; give a file, folder, glob or hub:NAME, a list of them, or entries {{path, weight, column}}")
    entries = [_entry(where, {"path": value} if isinstance(value, str) else value) for where, value in items]
    unweighted = [where for (where, _), entry in zip(items, entries, strict=True) if entry.weight is None]
    if unweighted and len(unweighted) < len(entries):
        raise UserError(f"{unweighted[0]}.weight: missing; give every entry a weight, or none (then each row is drawn once an epoch)")
    return entries


def _entry(key: str, node: Any) -> Entry:
    known = ("path", "weight", "column")
    if not isinstance(node, Mapping):
        raise UserError(f"{key}: {node!r}; give a path or {{path, weight, column}}")
    for name in node:
        if name not in known:
            raise UserError(f"{key}.{name}: unknown key; allowed are {', '.join(known)}{did_you_mean(name, known)}")
    path = node.get("path")
    paths: Sequence[Any] = [path] if isinstance(path, str) else path if isinstance(path, Sequence) else []
    if not paths or not all(isinstance(p, str) and p for p in paths):
        raise UserError(f"{key}.path: {path!r}; give a file, folder, glob or hub:NAME, or a list of them")
    weight = node.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
        raise UserError(f"{key}.weight: {weight!r}; must be a number above 0")
    return Entry(tuple(paths), None if weight is None else float(weight), node.get("column"))


class FileSet:
    """The records of an entry, in a fixed order, each with a key that does not depend on where the files lie."""

    def __init__(self, key: str, entry: Entry, errors: Errors, column: str | None) -> None:
        self._key = key
        self._entry = entry
        self._errors = errors
        self._column = column  # the only column to read; None: all

    @cached_property
    def _files(self) -> list[tuple[str, Path | Any]]:
        """(name, path) for files, (name, data set) for the hub; equal names from different paths are numbered."""
        found: list[tuple[str, Path | Any]] = []
        for path in self._entry.paths:
            found += [(path, open_hub(self._key, path))] if path.startswith(HUB) else expand(self._key, path)
        seen: dict[str, int] = {}
        unique: list[tuple[str, Path | Any]] = []
        for name, file in found:
            seen[name] = seen.get(name, 0) + 1
            unique.append((name if seen[name] == 1 else f"{name}~{seen[name]}", file))
        return unique

    def fingerprint(self) -> str:
        """16 hex digits of the names and contents (of sizes and times of change above 256 MiB)."""
        local = [path for _, path in self._files if isinstance(path, Path)]
        try:
            stats = {path: path.stat() for path in local}
        except OSError as error:
            raise unreadable(Path(error.filename), error) from None
        small = sum(s.st_size for s in stats.values()) <= HASHED_BYTES
        parts: list[object] = [self._errors, self._column]
        for name, path in self._files:
            if not isinstance(path, Path):
                parts += [name, path._fingerprint]
            elif small:
                parts += [name, read_bytes(path)]
            else:
                parts += [name, stats[path].st_size, stats[path].st_mtime_ns]
        return digest(*parts)

    def records(self) -> Iterator[tuple[str, str, str, Record]]:
        """Yield (key, file, place, record)."""
        for name, path in self._files:
            if isinstance(path, Path):
                for i, (place, record) in enumerate(read_records(path, self._errors, self._column)):
                    yield (f"{name}#{i}" if is_table(path) else name), str(path), place, record
            else:
                for i, record in enumerate(path):
                    yield f"{name}#{i}", name, f"row {i + 1}", record


class FileCorpus:
    """Documents rendered from files, with a held-out part: `val_entry`'s documents, else whole ones by hash, else the tail of each.

    Tails are held out when there are too few documents for a share of `val_fraction` (fewer than 1 / val_fraction) and `tails` allows it.
    `variant` names what `render` does besides reading, for the fingerprint.
    """

    def __init__(
        self, key: str, entry: Entry, render: Render, val_fraction: float, errors: Errors, column: str | None = None, *,
        val_entry: Entry | None = None, tails: bool = True, variant: str = "",
    ) -> None:  # fmt: skip
        self.name = ", ".join(entry.paths)
        self.weight = entry.weight
        self._key = key
        self._render = render
        self._fraction = val_fraction
        self._tails = tails
        self._variant = variant
        self._files = FileSet(key, entry, errors, column)
        self._val_files = None if val_entry is None else FileSet("data.val_path", val_entry, errors, column)

    def fingerprint(self) -> str:
        """16 hex digits that change with the files' contents or with the split."""
        val = self._val_files.fingerprint() if self._val_files else self._fraction
        return digest(self._files.fingerprint(), val, self._tails, self._variant)

    def train(self) -> Iterator[Document]:
        """Yield the documents to train on."""
        if self._val_files is not None:
            yield from self._documents(self._files)
        elif self._held_out is None:
            yield from self._cut(0)
        else:
            yield from (d for d in self._documents(self._files) if d.key not in self._held_out)

    def held_out(self) -> Iterator[Document]:
        """Yield the held-out documents."""
        if self._val_files is not None:
            yield from self._documents(self._val_files)
        elif self._held_out is None:
            yield from self._cut(1)
        else:
            yield from (d for d in self._documents(self._files) if d.key in self._held_out)

    def size(self, split: str) -> int:
        """Characters of the part `split` (train or val), about."""
        if self._val_files is not None:
            return sum((self._sizes if split == "train" else self._val_sizes).values())
        if self._held_out is None:
            return round(sum(self._sizes.values()) * (self._fraction if split == "val" else 1.0 - self._fraction))
        return sum(size for key, size in self._sizes.items() if (key in self._held_out) == (split == "val"))

    def _documents(self, files: FileSet) -> Iterator[Document]:
        for key, file, place, record in files.records():
            pieces = self._render(file, place, record)
            if pieces:
                yield Document(key, pieces)

    def _cut(self, part: int) -> Iterator[Document]:
        for document in self._documents(self._files):
            text = split_tail(document.text(), self._fraction)[part]
            if text:
                yield Document(document.key, (Piece(text),))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Characters of every document by its key: the one pass that settles the split and the progress bars."""
        return {d.key: len(d.text()) for d in self._documents(self._files)}

    @cached_property
    def _val_sizes(self) -> dict[str, int]:
        return {} if self._val_files is None else {d.key: len(d.text()) for d in self._documents(self._val_files)}

    @cached_property
    def _held_out(self) -> set[str] | None:
        """Keys of the documents that are held out whole; None when the tail of each is."""
        keys = list(self._sizes)
        if not keys:
            raise UserError(f"{self._key}: {self.name}: holds no text; every file or row in it is empty")
        if self._tails and len(keys) * self._fraction < 1.0:
            return None
        if len(keys) < 2:
            raise UserError(f"{self._key}: {self.name}: one document cannot be split; give more, or name held-out data with data.val_path")
        return held_out_keys(keys, self._fraction)


def held_out_entries(spec: PathSpec | None, corpora: int) -> list[Entry | None]:
    """Read `data.val_path` (same forms as `data.path`; weights mean nothing there): all of it for the first corpus, nothing for the others.

    None for every corpus when nothing is given: each then holds out a part of its own.
    """
    if spec is None:
        return [None] * corpora
    paths = tuple(path for entry in parse_entries("data.val_path", spec) for path in entry.paths)
    rest: list[Entry | None] = [Entry(())] * (corpora - 1)
    return [Entry(paths), *rest]


def text_corpora(spec: PathSpec | None, val_spec: PathSpec | None, column: str, val_fraction: float, errors: Errors) -> list[FileCorpus]:
    """Make one corpus an entry of `data.path`; held-out text of `data.val_path`, if given, belongs to the first."""
    entries = parse_entries("data.path", spec)
    corpora = []
    for entry, held_out in zip(entries, held_out_entries(val_spec, len(entries)), strict=True):
        own = entry.column or column

        def render(file: str, place: str, record: Record, own: str = own) -> tuple[Piece, ...] | None:
            text = text_of(file, place, record, own, errors)
            return (Piece(text),) if text else None

        corpora.append(FileCorpus("data.path", entry, render, val_fraction, errors, own, val_entry=held_out))
    return corpora
