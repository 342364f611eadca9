"""What `data.path` may say - a file, folder, glob, hub name, a list of them, or weighted entries - as corpora of documents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from components.contracts import UserError
from components.data.documents import Document, Piece, digest, held_out_keys, split_tail
from components.data.errors import did_you_mean, unreadable
from components.data.progress import note
from components.data.readers import HUB, Errors, expand, hub_parts, is_table, open_hub, read_bytes, read_records, text_of

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
    """The records of an entry, in a fixed order, each with a key that does not depend on where the files lie.

    A file counts once, however many paths, globs or links lead to it: a second copy under another key could be trained on while the first
    is held out. For the same reason the files of `held_out` are taken out, and those that a set of `earlier` (entries before this one) has;
    with weights that is an error instead, since it would change the mixture.
    """

    def __init__(
        self, key: str, entry: Entry, errors: Errors, column: str | None, held_out: FileSet | None = None, earlier: Sequence[FileSet] = ()
    ) -> None:  # fmt: skip
        self.key = key
        self.entry = entry
        self.name = ", ".join(entry.paths)
        self._errors = errors
        self._column = column  # the only column to read; None: all
        self._held_out = held_out
        self._earlier = tuple(earlier)

    @cached_property
    def _named(self) -> dict[Hashable, tuple[str, Path | Any]]:
        """What the paths lead to: (name, path) by resolved path for files, (name, data set) by its parts for the hub."""
        found: dict[Hashable, tuple[str, Path | Any]] = {}
        repeats = 0
        for path in self.entry.paths:
            listed: list[tuple[Hashable, str, Path | Any]]
            if path.startswith(HUB):
                listed = [(hub_parts(self.key, path), path, open_hub(self.key, path))]
            else:
                listed = [(file.resolve(), name, file) for name, file in expand(self.key, path)]
            repeats += sum(what in found for what, _, _ in listed)
            for what, name, file in listed:
                found.setdefault(what, (name, file))
        if repeats:
            note(f"{self.key}: {self.name}: {repeats} file(s) named more than once are read once")
        return found

    @cached_property
    def _files(self) -> list[tuple[str, Path | Any]]:
        """(name, path) or (name, data set) of what is left to this set; equal names of different files are numbered."""
        left = dict(self._named)
        if self._held_out is not None:
            self._take_out(left, set(self._held_out._named), f"is held out by {self._held_out.key}, not trained on")
        for other in self._earlier:
            shared = {what for what, (_, file) in left.items() if what in other._named and self._reads_alike(other, file)}
            if shared and self.entry.weight is not None:
                raise UserError(
                    f"{self.key}: {_shown(left, shared)} is in two weighted entries ({other.name}; {self.name}); leave it out of one"
                )
            self._take_out(left, shared, f"is in an entry before ({other.name}) and read once")
        seen: dict[str, int] = {}
        unique: list[tuple[str, Path | Any]] = []
        for name, file in left.values():
            seen[name] = seen.get(name, 0) + 1
            unique.append((name if seen[name] == 1 else f"{name}~{seen[name]}", file))
        return unique

    def _take_out(self, left: dict[Hashable, tuple[str, Path | Any]], unwanted: set[Hashable], why: str) -> None:
        """Remove `unwanted` from `left` with one line on stderr. Raises UserError when nothing stays."""
        shared = unwanted & left.keys()
        if not shared:
            return
        said = f"{self.key}: {self.name}: {_shown(left, shared)} {why}"
        if len(shared) == len(left):
            raise UserError(f"{said}; that leaves nothing here, so give other files or drop this path")
        note(said)
        for what in shared:
            del left[what]

    def _reads_alike(self, other: FileSet, file: Path | Any) -> bool:
        """Say whether both sets read the same text from a file that both have: two columns of a table are different text."""
        return self._column == other._column or (isinstance(file, Path) and not is_table(file, self._column))

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
                    yield (f"{name}#{i}" if is_table(path, self._column) else name), str(path), place, record
            else:
                for i, record in enumerate(path):
                    yield f"{name}#{i}", name, f"row {i + 1}", record


def _shown(files: Mapping[Hashable, tuple[str, Path | Any]], chosen: set[Hashable]) -> str:
    first, *more = sorted(name for what, (name, _) in files.items() if what in chosen)
    return f"{first} (and {len(more)} more)" if more else first


class FileCorpus:
    """Documents rendered from files, with a held-out part: those of `val_files`, else whole ones by hash, else the tail of each.

    Tails are held out when there are too few documents for a share of `val_fraction` (fewer than 1 / val_fraction) and `tails` allows it.
    `variant` names what `render` does besides reading, for the fingerprint.
    """

    def __init__(
        self, files: FileSet, val_files: FileSet | None, render: Render, val_fraction: float, tails: bool = True, variant: str = ""
    ) -> None:  # fmt: skip
        self.name = files.name
        self.weight = files.entry.weight
        self._render = render
        self._fraction = val_fraction
        self._tails = tails
        self._variant = variant
        self._files = files
        self._val_files = val_files

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
            raise UserError(f"{self._files.key}: {self.name}: holds no text; every file or row in it is empty")
        if self._tails and len(keys) * self._fraction < 1.0:
            return None
        if len(keys) < 2:
            raise UserError(
                f"{self._files.key}: {self.name}: one document cannot be split; give more, or name held-out data with "
                f"{self._files.key.removesuffix('path')}val_path"
            )
        return held_out_keys(keys, self._fraction)


def file_sets(
    entries: Sequence[Entry], val_spec: PathSpec | None, errors: Errors, column: str | None
) -> list[tuple[FileSet, FileSet | None]]:  # fmt: skip
    """Make (files, held-out files) for each entry of `data.path`; no file is in two of the sets.

    `data.val_path` (same forms as `data.path`; weights mean nothing there) is all held out by the first entry and nothing of it by the
    others. Without it the second is None: each entry then holds out a part of its own. `column` None reads whole rows.
    """
    columns = [None if column is None else entry.column or column for entry in entries]
    val: FileSet | None = None
    if val_spec is not None:
        paths = tuple(path for entry in parse_entries("data.val_path", val_spec) for path in entry.paths)
        val = FileSet("data.val_path", Entry(paths), errors, columns[0])
    sets: list[FileSet] = []
    for entry, own in zip(entries, columns, strict=True):
        sets.append(FileSet("data.path", entry, errors, own, val, sets))
    nothing = None if val is None else FileSet("data.val_path", Entry(()), errors, None)
    return [(files, nothing if i else val) for i, files in enumerate(sets)]


def text_corpora(spec: PathSpec | None, val_spec: PathSpec | None, column: str, val_fraction: float, errors: Errors) -> list[FileCorpus]:
    """Make one corpus an entry of `data.path`; held-out text of `data.val_path`, if given, belongs to the first."""
    entries = parse_entries("data.path", spec)
    corpora = []
    for entry, (files, val_files) in zip(entries, file_sets(entries, val_spec, errors, column), strict=True):
        own = entry.column or column

        def render(file: str, place: str, record: Record, own: str = own) -> tuple[Piece, ...] | None:
            text = text_of(file, place, record, own, errors)
            return (Piece(text),) if text else None

        corpora.append(FileCorpus(files, val_files, render, val_fraction))
    return corpora
