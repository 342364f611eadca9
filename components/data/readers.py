"""Files to records: plain text, jsonl, json and parquet (each also gzipped, parquet excepted), and data sets of the `datasets` hub.

A record is a `str` (a whole text file) or a `dict` (a row of a table). Every way a file can be bad is one UserError naming file and place.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal

from components.contracts import UserError
from components.data.errors import did_you_mean, no_such_file, unreadable

Errors = Literal["strict", "replace"]
HUB = "hub:"


def expand(key: str, path: str) -> list[tuple[str, Path]]:
    """List the files that a path, folder or glob means: (name relative to what was given, path), sorted by name.

    Hidden files and folders are skipped inside folders. Raises UserError when nothing is there.
    """
    given = Path(path).expanduser()
    if has_magic(path) and not given.exists():
        found = sorted(p for p in map(Path, glob(str(given), recursive=True)) if p.is_file())
        if not found:
            raise UserError(f"{key}: {path}: no file matches this glob; '**' means any depth of folders")
        base = Path(os.path.commonpath([p.parent for p in found]))
        return sorted((p.relative_to(base).as_posix(), p) for p in found)
    if given.is_dir():
        inside = [(p.relative_to(given), p) for p in given.rglob("*")]
        found_in = sorted((r.as_posix(), p) for r, p in inside if not any(part.startswith(".") for part in r.parts) and p.is_file())
        if not found_in:
            raise UserError(f"{key}: {path}: the folder holds no file; give one with text files, .jsonl or .parquet in it")
        return found_in
    if not given.exists():
        raise no_such_file(key, given)
    return [(given.name, given)]


def suffix_of(path: Path) -> str:
    """Return the suffix that decides the format, without a trailing .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def is_table(path: Path, column: str | None) -> bool:
    """Say whether each row of the file is a document of its own: of .json only where whole rows are read, else it is a text."""
    return suffix_of(path) in (".jsonl", ".parquet") or (column is None and suffix_of(path) == ".json")


def read_records(path: Path, errors: Errors = "strict", column: str | None = None) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Yield (place, record) for each record: place is "" for a whole text file, else "line 12" or "row 12" (from 1).

    `column` lets parquet read that column only, and makes a .json file a text; without it that must be a list of rows.
    Raises UserError on anything that cannot be read.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _read_parquet(path, column)
    elif suffix == ".jsonl":
        yield from _read_jsonl(path, errors)
    elif is_table(path, column):
        yield from _read_json(path, errors)
    else:
        yield "", decode(path, read_bytes(path), errors)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, unpacked when its name ends in .gz. Raises UserError when it is unreadable."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise unreadable(path, error) from None
    return data


def decode(path: Path, data: bytes, errors: Errors, place: str = "") -> str:
    """Decode UTF-8. Raises UserError with the offset of the first bad byte; `errors="replace"` puts U+FFFD there instead."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        where = f"{place}, byte" if place else "byte"
        raise UserError(
            f"{path}: {where} {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, name text files only "
            "(a glob such as DIR/**/*.txt), or set data.encoding_errors=replace"
        ) from None


def text_of(path: Path | str, place: str, record: str | dict[str, Any], column: str, errors: Errors) -> str:
    """Return the text of a record. Raises UserError for a missing column (listing what is there) or a value that is no text."""
    if isinstance(record, str):
        return record
    at = f"{path}, {place}"
    if column not in record:
        raise UserError(f"data.column: {column!r}: {at} has only {', '.join(map(str, record))}{did_you_mean(column, map(str, record))}")
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"data.column: {column!r}: {at} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which UTF-8 cannot
        if errors == "strict":
            raise UserError(f"{at}: half a surrogate pair at character {error.start}; set data.encoding_errors=replace") from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _read_jsonl(path: Path, errors: Errors) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"line {number}"
                try:
                    record = json.loads(decode(path, line, errors, place))
                except ValueError as error:
                    raise UserError(f"{path}: {place} is not valid JSON ({error}); one object a line, and is the file complete?") from None
                if not isinstance(record, dict):
                    raise UserError(f'{path}: {place} is a {type(record).__name__}, not an object such as {{"text": ...}}')
                yield place, record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _read_json(path: Path, errors: Errors) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        records = json.loads(decode(path, read_bytes(path), errors))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); is the file complete?") from None
    if not isinstance(records, list):
        raise UserError(f'{path}: holds a {type(records).__name__}, not a list of rows [{{"field": ...}}, ...]')
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}: row {number} is a {type(record).__name__}, not an object with fields")
        yield f"row {number}", record


def _read_parquet(path: Path, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column is not None and column not in names:
                raise UserError(f"data.column: {column!r}: {path} has only {', '.join(names)}{did_you_mean(column, names)}")
            number = 0
            for block in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
                for record in block.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None


def hub_parts(key: str, path: str) -> tuple[str, str | None, str]:
    """Read `hub:NAME[:config][:split]` as (name, config, split); split defaults to train. Raises UserError for any other form."""
    name, *rest = path.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{key}: {path!r}; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    return name, (rest[0] or None) if rest else None, rest[1] if len(rest) == 2 else "train"


def open_hub(key: str, path: str) -> Any:
    """Load a data set of the hub (see `hub_parts`) through the `datasets` library. Raises UserError when it cannot be had."""
    name, config, split = hub_parts(key, path)
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # the library raises dozens of types for one cause: it could not be fetched
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}: {path}: not to be had from the hub or its cache ({reason}); check name and network, or give a file"
        ) from None
    finally:
        if shown:
            enable_progress_bar()
