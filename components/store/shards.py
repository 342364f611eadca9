"""Shards: append-only files of one checked line a row.

A line is `{"v":1,"id":"<32 hex>","i":<12 wide>,"crc":"<8 hex>","row":{...}}`. Everything before the row stands at fixed places, so a scan
parses no JSON; crc is the CRC-32 of all before it and of the bytes of the row, so no changed byte goes unseen.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.store.files import sync_folder, write_all
from components.store.ids import DoneSet

START, CRC, ROW = b'{"v":1,"id":"', b',"crc":"', b'","row":'
ID_AT = len(START)
INDEX_AT, INDEX_WIDTH = ID_AT + 32 + len('","i":'), 12
CRC_AT = INDEX_AT + INDEX_WIDTH + len(CRC)
ROW_AT = CRC_AT + 8 + len(ROW)
PENDING_BYTES = 4 << 20  # rows wait in memory up to so many bytes, whatever fsync_rows allows
SCANNED = 65536  # ids handed over at a time


def encode(identity: str, index: int, payload: bytes) -> bytes:
    """One line. payload: the JSON object of the row."""
    head = b'{"v":1,"id":"%b","i":%12d,"crc":"' % (identity.encode("ascii"), index)
    return b'%b%08x","row":%b}\n' % (head, zlib.crc32(payload, zlib.crc32(head)), payload)


def is_whole(line: bytes) -> bool:
    """Has this line, with its end, every byte that was written?"""
    return (
        line[CRC_AT : CRC_AT + 8] == b"%08x" % zlib.crc32(line[ROW_AT:-2], zlib.crc32(line[:CRC_AT]))
        and line[CRC_AT + 8 : ROW_AT] == ROW
        and line[-2:] == b"}\n"
        and line.startswith(START)
    )


def identity_of(line: bytes) -> bytes:
    """The id as 32 hex digits."""
    return line[ID_AT : ID_AT + 32]


def index_of(line: bytes) -> int:
    return int(line[INDEX_AT : INDEX_AT + INDEX_WIDTH])


def scan(path: Path, bad: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every whole line; (offset, bytes) of the others go to `bad`."""
    offset = 0
    with path.open("rb", buffering=1 << 20) as file:
        for line in file:
            if is_whole(line):
                yield offset, line
            else:
                bad.append((offset, len(line)))
            offset += len(line)


def shard_name(number: int) -> str:
    return f"part-{number:05d}.jsonl"


def shards_in(folder: Path) -> list[Path]:
    """The shards of a store, in order."""
    return sorted((folder / "parts").glob("part-*.jsonl"), key=lambda path: int(path.stem.removeprefix("part-")))


def recover(path: Path, last: bool, done: DoneSet, repair: bool) -> tuple[int, list[str]]:
    """Read a shard's ids into `done`; returns its rows and what was mended.

    What follows the last whole line of the last shard is the work of a crash and is cut off. Bad lines elsewhere go to `quarantine/` when
    `repair` is true. Raises UserError when it is not; OSError.
    """
    bad: list[tuple[int, int]] = []
    rows, end, found = 0, 0, []
    for offset, line in scan(path, bad):
        found.append(identity_of(line))
        rows, end = rows + 1, offset + len(line)
        if len(found) == SCANNED:
            done.load(bytes.fromhex(b"".join(found).decode()))
            found.clear()
    done.load(bytes.fromhex(b"".join(found).decode()))
    notes, name = [], f"{path.parent.name}/{path.name}"
    torn = [place for place in bad if last and place[0] >= end]
    inside = bad[: len(bad) - len(torn)]
    if inside and not repair:
        raise UserError(
            f"output: {path} is damaged at {len(inside)} lines, the first at byte {inside[0][0]}; repair=true moves them to quarantine/ "
            "and asks for their rows again, all others are kept"
        )
    if torn:
        os.truncate(path, end)
        notes.append(f"{name}: the last {sum(size for _, size in torn):,} bytes were not written to the end and are cut off")
    if inside:
        quarantine(path)
        notes.append(f"{name}: {len(inside)} damaged lines moved to quarantine/{path.name}; their rows are asked for again")
    return rows, notes


def quarantine(path: Path) -> None:
    """Move bad lines to a file of the same name under `quarantine/`; they are safe there before the shard is replaced. Raises OSError."""
    folder, kept = path.parent.parent / "quarantine", path.with_name(path.name + ".tmp")
    folder.mkdir(exist_ok=True)
    with path.open("rb") as source, kept.open("wb") as good, (folder / path.name).open("ab") as bad:
        for line in source:
            (good if is_whole(line) else bad).write(line if line.endswith(b"\n") else line + b"\n")
        for file in (bad, good):
            file.flush()
            os.fsync(file.fileno())
    sync_folder(folder)
    os.replace(kept, path)
    sync_folder(path.parent)


class ShardWriter:
    """Appends lines to a shard. They are safe after `commit`, which writes and syncs them together."""

    def __init__(self, path: Path, rows: int) -> None:
        """rows: whole lines that the shard has. Raises OSError."""
        self.path, self.rows = path, rows
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.bytes = os.fstat(self._descriptor).st_size
        self._lines: list[bytes] = []
        self._waiting = 0
        if not self.bytes:
            sync_folder(path.parent)

    @property
    def pending(self) -> int:
        """Rows that are not safe yet."""
        return len(self._lines)

    @property
    def full(self) -> bool:
        """Do the pending rows take so much memory that they have to be written now?"""
        return self._waiting >= PENDING_BYTES

    def add(self, line: bytes) -> None:
        self._lines.append(line)
        self._waiting += len(line)

    def commit(self) -> None:
        """Write and sync. Raises OSError; the shard is then as it was after the last commit, as far as the disk allows."""
        try:
            if os.fstat(self._descriptor).st_nlink == 0:
                raise FileNotFoundError(2, "it was removed meanwhile")
            write_all(self._descriptor, b"".join(self._lines))
            os.fsync(self._descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.bytes)
            raise
        self.rows += len(self._lines)
        self.bytes += self._waiting
        self._lines, self._waiting = [], 0

    def close(self) -> None:
        os.close(self._descriptor)


def refuse_lost(folder: Path, full: list[dict[str, Any]]) -> None:
    """Raise UserError when a shard that was full is gone or has become shorter. full: as in the manifest."""
    for shard in full:
        path = folder / "parts" / shard["name"]
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < shard["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
            raise UserError(f"output: {path} {what}; put it back, or set repair=true, which asks for the lost rows again")
