"""The store of a generation job: what is done, rows as they come, and the final files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from components.errors import UserError
from components.store.files import as_json, lock, replace_file, trouble, write_all
from components.store.finish import FINAL, write_final
from components.store.ids import DoneSet, digests_of
from components.store.manifest import Manifest, move_aside, new_manifest, now, read_manifest, refuse_change
from components.store.shards import (
    INDEX_WIDTH,
    ROW_AT,
    ShardWriter,
    encode,
    identity_of,
    index_of,
    recover,
    refuse_lost,
    scan,
    shard_name,
    shards_in,
)

OWN_COLUMNS = ("request_id", "index")  # of the final files; a row has others
log = logging.getLogger(__name__)


class Store:
    """Rows by request. What was saved survives any crash; a request may be asked twice, its row is there once.

    One process writes at a time. Use as a context manager: leaving it saves what is pending.
    """

    def __init__(self, folder: Path, manifest: Manifest, fsync_rows: int, fsync_seconds: float, shard_bytes: int) -> None:
        self.folder, self.manifest = folder, manifest
        self.fsync_rows, self.fsync_seconds, self.shard_bytes = fsync_rows, fsync_seconds, shard_bytes
        self.mended: list[str] = []  # what recovery found and did, one line each
        self._done = DoneSet()
        self._attempts: dict[bytes, int] = {}  # of requests that failed and are not done
        self._errors: int | None = None  # descriptor of errors.jsonl
        self._noted = False  # errors since the last save
        self._lock: int | None = None
        self._writer: ShardWriter | None = None
        self._saved_at = time.monotonic()
        self.broken = False  # a row could not be saved: nothing more is taken

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        space: Mapping[str, Any],
        on_change: str = "refuse",
        fsync_rows: int = 256,
        fsync_seconds: float = 5.0,
        shard_bytes: int = 128 << 20,
        repair: bool = False,
    ) -> Store:
        """Open or make the store in `folder`, and recover it from a crash.

        space: everything that decides the answers of all requests, as JSON; when it differs from that of the rows there, on_change says
        whether to 'refuse' or to move them aside and begin a 'new' store. fsync_rows, fsync_seconds: a row is saved after so many rows or
        seconds, whichever is first. shard_bytes: size at which a shard is full. repair: go on without damaged or lost rows.

        Raises:
            UserError: another process has it, other requests, damaged rows, an unreadable or unwritable folder.
        """
        if on_change not in ("refuse", "new"):
            raise UserError(f"output.on_change: {on_change!r} is not one of refuse, new")
        for key, value in {"fsync_rows": fsync_rows, "shard_bytes": shard_bytes}.items():
            if value < 1:
                raise UserError(f"output.{key}: {value}; must be at least 1")
        store = cls(Path(folder), new_manifest(space), fsync_rows, fsync_seconds, shard_bytes)
        try:
            store._open(on_change == "new", repair)
        except OSError as error:
            store._release()
            raise trouble(store.folder, error) from error
        except BaseException:
            store._release()
            raise
        return store

    def _open(self, may_change: bool, repair: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        old = read_manifest(self.folder)
        if old is not None and old.space_hash != self.manifest.space_hash:
            if not may_change:
                refuse_change(self.folder, old, self.manifest)
            self._mend([f"other requests: the answers of before are in {move_aside(self.folder, old)}"])
            old = None
        if old is not None:
            self.manifest = old
            old.resumed.append(now())
        parts = self.folder / "parts"
        parts.mkdir(exist_ok=True)
        if not repair:
            refuse_lost(self.folder, self.manifest.shards)
        shards, rows = shards_in(self.folder), 0
        full: list[dict[str, Any]] = []
        for path in shards:
            rows, notes = recover(path, path == shards[-1], self._done, repair)
            self._mend(notes)
            full.append({"name": path.name, "rows": rows, "bytes": path.stat().st_size})
        doubled = self._done.settle()
        if doubled:
            self._mend([f"{doubled} rows are there twice; the first of each counts"])
        if full and full[-1]["bytes"] < self.shard_bytes:
            last = parts / full.pop()["name"]
        else:
            last, rows = parts / shard_name(int(shards[-1].stem.removeprefix("part-")) + 1 if shards else 0), 0
        self.manifest.shards = full
        self.manifest.write(self.folder)
        self._writer = ShardWriter(last, rows)
        self._read_errors()
        self._errors = os.open(self.folder / "errors.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def _mend(self, notes: list[str]) -> None:
        self.mended += notes
        for note in notes:
            log.warning("%s: %s", self.folder, note)

    def _read_errors(self) -> None:
        path, end = self.folder / "errors.jsonl", 0
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                end += len(line) if line.endswith(b"\n") else 0
                with suppress(ValueError, KeyError, TypeError):
                    found = json.loads(line)
                    if (digest := bytes.fromhex(found["id"])) not in self._done:
                        self._attempts[digest] = max(int(found["attempt"]), self._attempts.get(digest, 0))
        os.truncate(path, end)  # a torn last line would swallow the next one

    def __len__(self) -> int:
        """Finished rows."""
        return len(self._done)

    def __contains__(self, identity: str) -> bool:
        return bytes.fromhex(identity) in self._done

    def attempts(self, identity: str) -> int:
        """How often a request that is not done has failed, in all runs."""
        return self._attempts.get(bytes.fromhex(identity), 0)

    def rows(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(id, index, row) of all that is saved, in the order in which it came."""
        for path in shards_in(self.folder):
            for _, line in scan(path, []):
                yield identity_of(line).decode(), index_of(line), json.loads(line[ROW_AT:-2])

    @property
    def failed(self) -> int:
        """Requests that failed and are not done."""
        return len(self._attempts)

    def append(self, identity: str, index: int, row: Mapping[str, Any]) -> bool:
        """Take the row of a request; it is saved at the latest fsync_seconds later if `tick` is called. False: it is there already.

        identity: 32 hex digits of `request_id`. index: place of the request in the input, from 0. row: a JSON object; lone surrogates in
        its text become U+FFFD. Raises UserError when it cannot be saved.
        """
        digest = bytes.fromhex(identity)
        if len(digest) != 16 or not 0 <= index < 10**INDEX_WIDTH:
            raise ValueError(f"a row needs an id of 32 hex digits and an index of at most {INDEX_WIDTH} digits, not {identity!r}, {index}")
        if digest in self._done:
            return False
        if any(name in row for name in OWN_COLUMNS):
            raise ValueError(f"a row cannot have the columns {' and '.join(OWN_COLUMNS)}, which the final files have anyway")
        writer = self._open_writer()
        writer.add(encode(digest.hex(), index, payload_of(row)))
        self._done.add(digest)
        if self._attempts:
            self._attempts.pop(digest, None)
        if writer.pending >= self.fsync_rows or writer.full:
            self.commit()
        else:
            self.tick()
        return True

    def error(self, identity: str, index: int, error: str, attempt: int) -> None:
        """Note that a request has failed for the `attempt`-th time, counted over all runs. Raises UserError when it cannot be saved."""
        self._attempts[bytes.fromhex(identity)] = attempt
        line = json.dumps({"id": identity, "i": index, "attempt": attempt, "error": error, "time": now()}) + "\n"
        assert self._errors is not None, "the store is closed"
        try:
            write_all(self._errors, line.encode())
            self._noted = True
        except OSError as failure:
            raise self._trouble(failure) from failure

    def tick(self) -> None:
        """Save when fsync_seconds have passed. Call it now and then while no row comes."""
        if time.monotonic() - self._saved_at >= self.fsync_seconds:
            self.commit()

    def commit(self) -> None:
        """Save every row so far. Raises UserError when that is not possible; what was saved before is kept."""
        writer = self._open_writer()
        try:
            if writer.pending:
                writer.commit()
            if self._noted and self._errors is not None:
                os.fsync(self._errors)
                self._noted = False
            if writer.bytes >= self.shard_bytes:
                self.manifest.shards.append({"name": writer.path.name, "rows": writer.rows, "bytes": writer.bytes})
                self.manifest.write(self.folder)
                number = int(writer.path.stem.removeprefix("part-")) + 1
                self._writer = ShardWriter(writer.path.with_name(shard_name(number)), 0)
                writer.close()
        except OSError as error:
            raise self._trouble(error) from error
        self._saved_at = time.monotonic()

    def progress(self, record: Mapping[str, Any]) -> None:
        """Replace progress.json. Raises UserError."""
        try:
            replace_file(self.folder / "progress.json", as_json(record), durable=False)
        except OSError as error:
            raise self._trouble(error) from error

    def finish(self, total: int, missing: str = "refuse", order: Iterable[str] | None = None, others: bool = False) -> Path:
        """Write `final/`: the rows in input order as parquet, and _SUCCESS with their sizes; returns the folder.

        Where they are there already, in those sizes, nothing is written.

        total: requests of the input. missing: 'skip' leaves requests without a row out, 'refuse' raises UserError. order: ids of all
        requests of the input, as it is now; None: their places are those of when they were asked. others: rows of requests that are not in
        `order` are left out, not refused. See `write_final`.
        """
        self.commit()
        names = None if order is None else digests_of(order)
        try:
            return write_final(self.folder, total, self._done, missing, names, others)
        except OSError as error:
            with suppress(OSError):
                shutil.rmtree(self.folder / f"{FINAL}.partial")
            raise trouble(self.folder, error, len(self)) from error

    def close(self) -> None:
        """Save what is pending and give the folder back. Raises UserError when it cannot be saved."""
        try:
            if self._writer is not None and not self.broken:
                self.commit()
        finally:
            self._release()

    def _open_writer(self) -> ShardWriter:
        if self._writer is None or self.broken:
            raise UserError(f"output: {self.folder} is closed; open it again")
        return self._writer

    def _trouble(self, error: OSError) -> UserError:
        self.broken = True
        unsaved = self._writer.pending if self._writer is not None else 0
        return trouble(self.folder, error, len(self._done) - unsaved, unsaved)

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for descriptor in (self._errors, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._writer = self._errors = self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with suppress(UserError):  # the first error is the one to be told
                self.close()


def payload_of(row: Mapping[str, Any]) -> bytes:
    """JSON of a row in UTF-8. Halves of a character that a server sent apart are joined, and a half alone becomes U+FFFD."""
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a reader of the store will find it."""
    found: dict[str, Any] = json.loads(payload_of(row))
    return found
