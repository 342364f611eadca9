"""A search's memory: one JSON line an evaluation, appended, from which an interrupted search goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from components.errors import UserError

FORMAT = 1


class Log:
    """An append-only file: a header line with the settings, then one line an evaluation.

    Every line goes to the operating system in one write before the next evaluation starts, so that killing the process (even with -9) loses
    nothing but the evaluation in flight. `sync` makes the lines outlive a power cut too; it is called once a generation, since it costs
    milliseconds a call on a slow disk. A last line that a cut has torn is dropped when the file is opened again.

    Args:
        path: made with its folders if it does not exist.
        settings: what a resumed search must find unchanged; anything that JSON can hold.

    Raises UserError: the file was begun with other settings, or is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: dict[int, dict[str, Any]] = {}  # by id, as they were found
        header = {"format": FORMAT, "settings": json.loads(dumps(settings))}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, end = self._read(header)
        if lines:
            self._compare(lines[0], header)
            self._index(lines[1:])
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)
        if not lines:
            self._write(header)
            self.sync()
            sync_folder(path.parent)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.sync()
        os.close(self._file)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one evaluation; it has an `id`."""
        self._write(entry)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file)

    def _write(self, line: Mapping[str, Any]) -> None:
        data = (dumps(line) + "\n").encode()
        while data:  # a full disk or a signal can cut a write short; the next one then says why
            data = data[os.write(self._file, data) :]

    def _read(self, header: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """(intact lines, the byte where they end)."""
        with contextlib.suppress(FileNotFoundError):
            lines: list[dict[str, Any]] = []
            end = 0
            whole = self.path.read_bytes().splitlines(keepends=True)
            for number, raw in enumerate(whole, 1):
                line = parse(raw)
                if line is None and number == len(whole) and (lines or dumps(header).encode().startswith(raw)):
                    break  # a first line that is no torn header belongs to some other file, which is not for us to cut
                if line is None:
                    raise UserError(f"{self.path}: line {number} is damaged; remove it and all after it to go on from there")
                lines.append(line)
                end += len(raw)
            return lines, end
        return [], 0

    def _compare(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        before, now = flat(found), flat(header)
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                name = key.removeprefix("settings.")
                raise UserError(
                    f"{name}: {brief(now.get(key))}, but {self.path} was begun with {brief(before.get(key))}; "
                    "set it back to go on, or move that file away to search anew"
                )

    def _index(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if not isinstance(number := line.get("id"), int) or number in self.entries:
                raise UserError(f"{self.path}: evaluation {number!r} is there twice or has no number; move that file away to search anew")
            self.entries[number] = line


def dumps(value: Any) -> str:
    """Strict JSON on one line; floats read back bit for bit. Raises ValueError for NaN and infinity."""
    return json.dumps(value, allow_nan=False, sort_keys=False)


def parse(raw: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for a torn one."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted paths to the values that are no mapping.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def brief(value: Any) -> str:
    """Its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sync_folder(folder: Path) -> None:
    """Make a new or renamed file in `folder` outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
