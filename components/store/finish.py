"""The final files: rows in input order as parquet, the same bytes however often the job was killed.

Memory: 8 bytes a row for where it stands, 24 more where the order is given, and one row group. Columns and types follow from the rows
alone, row groups and files from their number and sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from components.errors import UserError
from components.store.files import as_json, replace_file, sync_folder
from components.store.ids import DIGEST_BYTES, DoneSet, check_twins
from components.store.shards import ROW_AT, identity_of, index_of, scan, shards_in

if TYPE_CHECKING:
    import pyarrow

FINAL = "final"
GROUP_ROWS, GROUP_BYTES = 16384, 32 << 20  # a row group ends at either; bytes are those of the rows as JSON
FILE_BYTES = 1 << 30  # a file ends after the row group that reaches it
OPEN_FILES = 32  # shards read at once: rows of neighbouring requests lie in a few
OFFSET_BITS = 40  # a position is shard << 40 | offset
NULL, BOOL, INT, FLOAT, TEXT, OTHER = 0, 1, 2, 4, 8, 16
KINDS: dict[type, int] = {type(None): NULL, bool: BOOL, int: INT, float: FLOAT, str: TEXT, dict: OTHER, list: OTHER}


class Columns:
    """Which columns the rows have, and of what JSON kinds. Rows may be shown in any order."""

    def __init__(self) -> None:
        self.kinds: dict[str, int] = {}
        self._first: dict[str, tuple[int, int]] = {}  # (index of the first row that has it, place there)

    def add(self, index: int, row: dict[str, Any]) -> None:
        for place, (name, value) in enumerate(row.items()):
            kind = KINDS[type(value)]
            if kind == INT and not -(2**63) <= value < 2**63:
                kind = OTHER
            self.kinds[name] = self.kinds.get(name, NULL) | kind
            if name not in self._first or index < self._first[name][0]:
                self._first[name] = (index, place)

    def names(self) -> list[str]:
        """In the order in which the rows of the input bring them up."""
        return sorted(self._first, key=self._first.__getitem__)

    def schema(self) -> pyarrow.Schema:
        """Numbers, booleans and text as such; all else, mixtures among it, as JSON text, marked {'encoding': 'json'}."""
        import pyarrow as pa

        types = {NULL: pa.string(), BOOL: pa.bool_(), INT: pa.int64(), FLOAT: pa.float64(), INT | FLOAT: pa.float64(), TEXT: pa.string()}
        fields = [pa.field("request_id", pa.string(), nullable=False), pa.field("index", pa.int64(), nullable=False)]
        for name in self.names():
            type_ = types.get(self.kinds[name])
            fields.append(pa.field(name, type_) if type_ is not None else pa.field(name, pa.string(), metadata={"encoding": "json"}))
        return pa.schema(fields)


def places_in(order: bytes | bytearray, others: bool) -> Callable[[bytes], int]:
    """A function from a line to the place of its request in `order`, digests end to end; -1 for one that is not there, with `others`.

    Raises UserError where two are the same; the function, where the request is not there and there are to be no others.
    """
    digests = np.frombuffer(order, dtype=f"S{DIGEST_BYTES}")
    ranks = digests.argsort(kind="stable")
    check_twins(digests, ranks)

    def place(line: bytes) -> int:
        digest = np.bytes_(bytes.fromhex(identity_of(line).decode()))
        found = int(digests.searchsorted(digest, sorter=ranks))
        if found == len(ranks) or digests[ranks[found]] != digest.rstrip(b"\0"):
            if others:
                return -1
            raise UserError(f"output: it has the row of a request, number {index_of(line)} when it was asked, that is not among them now")
        return int(ranks[found])

    return place


def locate(shards: list[Path], total: int, done: DoneSet, place_of: Callable[[bytes], int] = index_of) -> tuple[np.ndarray, Columns]:
    """Where the row of each request stands, (total,) int64, -1 without one; of rows with one id the first counts.

    place_of: the place of a line's request in the input, -1 for one that is left out.
    Raises UserError when rows are damaged, or do not belong to `total` requests.
    """
    places, columns = np.full(total, -1, dtype=np.int64), Columns()
    found, others = 0, set[bytes]()
    for number, path in enumerate(shards):
        bad: list[tuple[int, int]] = []
        for offset, line in scan(path, bad):
            index = place_of(line)
            if index < 0:
                others.add(identity_of(line))
                continue
            if index >= total:
                raise UserError(f"output: {path} has a row of request {index}, but there are {total}; the requests have changed since")
            if places[index] < 0:
                places[index] = number << OFFSET_BITS | offset
                columns.add(index, json.loads(line[ROW_AT:-2]))
                found += 1
            elif identity_of(read_at(shards, int(places[index]))) != identity_of(line):
                raise UserError(
                    f"output: {path} has another row of request {index}; the requests have changed or moved since they were asked"
                )
        if bad:
            raise UserError(f"output: {path} has become damaged at byte {bad[0][0]}; start the same command again with repair=true")
    if found + len(others) != len(done):
        raise UserError(
            f"output: {len(done)} rows but {found + len(others)} requests; the requests have changed or moved since they were asked"
        )
    return places, columns


def read_at(shards: list[Path], place: int) -> bytes:
    """The line at a position."""
    with shards[place >> OFFSET_BITS].open("rb") as file:
        file.seek(place & ((1 << OFFSET_BITS) - 1))
        return file.readline()


def groups(shards: list[Path], places: np.ndarray) -> Iterator[tuple[list[tuple[int, bytes]], int]]:
    """(indices and lines, bytes of their rows) of each row group, in input order."""
    files: dict[int, BinaryIO] = {}
    lines: list[tuple[int, bytes]] = []
    size = 0
    try:
        for index in map(int, np.flatnonzero(places >= 0)):
            place = int(places[index])
            number = place >> OFFSET_BITS
            if number not in files:
                if len(files) == OPEN_FILES:
                    files.pop(next(iter(files))).close()
                files[number] = shards[number].open("rb")
            files[number].seek(place & ((1 << OFFSET_BITS) - 1))
            lines.append((index, files[number].readline()))
            size += len(lines[-1][1])
            if len(lines) == GROUP_ROWS or size >= GROUP_BYTES:
                yield lines, size
                lines, size = [], 0
        if lines:
            yield lines, size
    finally:
        for file in files.values():
            file.close()


def table_of(lines: list[tuple[int, bytes]], schema: pyarrow.Schema) -> pyarrow.Table:
    """One row group."""
    import pyarrow as pa

    rows = [json.loads(line[ROW_AT:-2]) for _, line in lines]
    arrays = [
        pa.array([identity_of(line).decode() for _, line in lines], pa.string()),
        pa.array([index for index, _ in lines], pa.int64()),
    ]
    for field in list(schema)[2:]:
        values = [row.get(field.name) for row in rows]
        if field.metadata:
            values = [None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values]
        elif field.type == pa.float64():
            values = [None if value is None else float(value) for value in values]
        arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def write_parquet(folder: Path, shards: list[Path], places: np.ndarray, schema: pyarrow.Schema) -> None:
    """data-00000.parquet and more, as large as FILE_BYTES of JSON each. Raises OSError."""
    import pyarrow.parquet as pq

    writer, written, number = None, 0, 0
    try:
        for lines, size in groups(shards, places):
            if writer is None:
                writer = pq.ParquetWriter(folder / f"data-{number:05d}.parquet", schema, compression="zstd", version="2.6")
            writer.write_table(table_of(lines, schema), row_group_size=GROUP_ROWS)
            written += size
            if written >= FILE_BYTES:
                writer.close()
                writer, written, number = None, 0, number + 1
        if writer is None and number == 0:
            writer = pq.ParquetWriter(folder / "data-00000.parquet", schema, compression="zstd", version="2.6")
    finally:
        if writer is not None:
            writer.close()


def trusted(final: Path, rows: dict[str, Any]) -> bool:
    """Whether `final` holds these rows, in files of the sizes that its _SUCCESS names. Raises OSError."""
    try:
        found = json.loads((final / "_SUCCESS").read_bytes())
        files = found.pop("files")
        return bool(found == rows and all((final / name).stat().st_size == size for name, size in files.items()))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # no file, or a _SUCCESS of before or of somebody else
        return False


def write_final(
    folder: Path, total: int, done: DoneSet, missing: str, order: bytes | bytearray | None = None, others: bool = False
) -> Path:
    """See Store.finish. order: digests of the ids, end to end. `final/` appears as a whole. Raises UserError; OSError."""
    if missing not in ("refuse", "skip"):
        raise UserError(f"output.missing: {missing!r} is not one of refuse, skip")
    ordered = {} if order is None else {"order_sha256": hashlib.sha256(order).hexdigest()}
    kept = len(done)
    if order is not None and others:
        kept = sum(bytes(order[at : at + DIGEST_BYTES]) in done for at in range(0, len(order), DIGEST_BYTES))
    rows = {"rows": kept, "ids_sha256": done.sha256(), **ordered}
    final, partial = folder / FINAL, folder / f"{FINAL}.partial"
    if (kept == total or missing == "skip") and trusted(final, rows):
        return final
    shards = shards_in(folder)
    places, columns = locate(shards, total, done, index_of if order is None else places_in(order, others))
    absent = np.flatnonzero(places < 0)
    if len(absent) and missing == "refuse":
        raise UserError(
            f"output: {len(absent):,} of {total:,} requests have no row yet, the first is number {absent[0]} from 0; start the "
            f"same command again, see {folder / 'errors.jsonl'}, or set missing=skip to leave them out"
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_parquet(partial, shards, places, columns.schema())
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    replace_file(partial / "_SUCCESS", as_json({**rows, "files": files}))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_folder(folder)
    return final
