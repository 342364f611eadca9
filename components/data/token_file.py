"""Token files: a corpus tokenised once into a flat memory-mapped array, verified when opened and replaced as a whole.

`NAME.bin` holds the stream E d1 E d2 ... E (E = end-of-text) as little-endian uint16 or uint32, `NAME.docs.npy` the position of every
E (int64, documents + 1), `NAME.mask.bin` one byte a token (1: a label) where not everything is one, and `NAME.json`, written last, their
checksums.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from components.contracts import UserError
from components.data.documents import Document, digest
from components.data.errors import unwritable
from components.data.progress import note
from components.data.tokenizers import Tokenizer

CODE_VERSION = 2  # raise it when the layout or the tokenisation changes: old files are then left alone and new ones made
BATCH_CHARS = 4 * 2**20  # text tokenised at a time
PIECE_CHARS = 2**20  # longer texts are cut here where that changes no token, so that one huge file still uses all cores and little memory
CHECKED_BYTES = 64 * 2**20  # a larger file is verified by its size and its two ends of half this
LOCK_NAME = "prepare.lock"

_CUT = re.compile(r"(?<=\S)(?=\n)")  # SPLIT_PATTERN starts a new word here anyway, so that cutting changes no token


class TokenFile:
    """A token file opened for reading. Pickles as its path, so that data workers map it themselves.

    task: id of the task that its text belongs to, in data with tasks; it is no part of the file, since another run may number it otherwise.
    """

    def __init__(self, folder: Path, name: str, task: int | None = None) -> None:
        self.folder, self.name, self.task = Path(folder), name, task
        self.meta: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        self.tokens: np.ndarray = np.memmap(self.folder / f"{name}.bin", dtype=self.meta["dtype"], mode="r")  # (N,)
        self.documents: np.ndarray = np.load(self.folder / f"{name}.docs.npy", mmap_mode="r")  # (documents + 1,) int64, position of each E
        masked = f"{name}.mask.bin" in self.meta["files"]
        self.mask: np.ndarray | None = np.memmap(self.folder / f"{name}.mask.bin", dtype=np.uint8, mode="r") if masked else None  # (N,)

    def __reduce__(self) -> tuple[type[TokenFile], tuple[Path, str, int | None]]:
        return TokenFile, (self.folder, self.name, self.task)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the tokens, documents and mask, wherever they lie; of a file above CHECKED_BYTES, its size and two ends."""
        return digest(*(self.meta[key] for key in ("dtype", "tokens", "labels", "documents", "text_bytes")), *self.meta["files"].values())

    @property
    def labels(self) -> int:
        """Tokens that count in the loss, end marks included; the first E follows nothing and is no label."""
        return int(self.meta["labels"])

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text whose tokens are labels."""
        return int(self.meta["text_bytes"])


def checksum(path: Path) -> int:
    """CRC-32 of a file, or of its two ends when it is larger than CHECKED_BYTES."""
    size, crc = path.stat().st_size, 0
    spans = [(0, size)] if size <= CHECKED_BYTES else [(0, CHECKED_BYTES // 2), (size - CHECKED_BYTES // 2, size)]
    with path.open("rb") as file:
        for start, end in spans:
            file.seek(start)
            while start < end and (block := file.read(min(2**20, end - start))):
                crc, start = zlib.crc32(block, crc), start + len(block)
    return crc


def intact(folder: Path, name: str) -> bool:
    """Say whether a complete token file is there; a damaged one is removed, with one line on stderr."""
    sidecar = folder / f"{name}.json"
    if not sidecar.exists():
        return False
    try:
        files: dict[str, list[int]] = json.loads(sidecar.read_text())["files"]
        bad = [f for f, (size, crc) in files.items() if (folder / f).stat().st_size != size or checksum(folder / f) != crc]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        bad = [sidecar.name]
    if bad:
        note(f"{folder / bad[0]}: the cached tokens are damaged; making them again")
        sidecar.unlink(missing_ok=True)
    return not bad


@contextmanager
def cache_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; another process waits, with one line on stderr. The kernel frees the lock of a process that dies.

    What such a process left half-written is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a")
    except OSError as error:
        raise unwritable(folder, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"waiting for another process that is preparing the data in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield


@contextmanager
def replacing(folder: Path, names: list[str]) -> Iterator[list[BinaryIO]]:
    """Open temporary files; on success flush them to the disk and rename them to `names` in order, on any failure leave none behind.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    temporary = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    files: list[BinaryIO] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [path.open("wb") for path in temporary]
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, folder / name)
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        for file in files:
            _close_quietly(file)
        for path in temporary:
            path.unlink(missing_ok=True)


def _close_quietly(file: BinaryIO) -> None:
    try:
        file.close()
    except OSError:  # a full disk refuses the last buffer again; it was reported already and the file is thrown away
        return


def write_token_file(
    folder: Path, name: str, documents: Iterable[Document], tokenizer: Tokenizer, advance: Callable[[int], None] = lambda n: None
) -> None:
    """Tokenise `documents` into the token file `name`. `advance` is told the bytes done.

    Raises UserError when there is no text, or no space for it.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    names = [f"{name}.bin", f"{name}.docs.npy", f"{name}.mask.bin"]
    positions: list[int] = []
    tokens = labels = text_bytes = 0
    with replacing(folder, names) as (bin_file, docs_file, mask_file):
        ends = True  # whether the E about to be written, the end mark of the document before, is a label
        for document, ids, mask in encoded(documents, tokenizer):
            positions.append(tokens)
            bin_file.write(np.concatenate([[tokenizer.eot_id], ids]).astype(dtype).tobytes())
            mask_file.write(np.concatenate([[ends], mask]).astype(np.uint8).tobytes())
            labels += int(mask.sum()) + (ends and tokens > 0)
            ends, tokens = bool(mask[-1]), tokens + 1 + len(ids)
            text_bytes += len(document.text(loss_only=True).encode())
            advance(len(document.text().encode()))
        if not positions:
            raise UserError("data.path: holds no text to learn from or to hold out; give more")
        bin_file.write(np.array([tokenizer.eot_id], dtype).tobytes())
        mask_file.write(np.array([ends], np.uint8).tobytes())
        labels, tokens = labels + ends, tokens + 1
        packed = io.BytesIO()  # np.save into a real file hides the error number of a full disk
        np.save(packed, np.array([*positions, tokens - 1], np.int64))
        docs_file.write(packed.getvalue())
    if labels == tokens - 1:
        names = names[:2]
        (folder / f"{name}.mask.bin").unlink()
    meta = {
        "version": CODE_VERSION, "dtype": dtype.str, "tokens": tokens, "labels": labels, "documents": len(positions),
        "text_bytes": text_bytes, "files": {n: [(folder / n).stat().st_size, checksum(folder / n)] for n in names},
    }  # fmt: skip
    with replacing(folder, [f"{name}.json"]) as (file,):
        file.write(json.dumps(meta, indent=1).encode())


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Yield (document, ids (n,) int64, mask (n,) bool) with n > 0, tokenising about BATCH_CHARS at a time."""
    waiting: list[Document] = []
    size = 0
    for document in documents:
        waiting.append(document)
        size += sum(len(piece.text) for piece in document.pieces)
        if size >= BATCH_CHARS:
            yield from _encode_batch(waiting, tokenizer)
            waiting, size = [], 0
    yield from _encode_batch(waiting, tokenizer)


def _encode_batch(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    parts_of = cut if tokenizer.splits_before_newlines else whole
    texts = [part for document in documents for piece in document.pieces if not piece.special for part in parts_of(piece.text)]
    encoded = iter(tokenizer.encode_batch(texts))
    for document in documents:
        ids: list[int] = []
        mask: list[bool] = []
        for piece in document.pieces:
            if piece.special:
                new = [tokenizer.special_id(piece.text)]
            else:
                new = [i for _ in parts_of(piece.text) for i in next(encoded)]
            ids += new
            mask += [piece.loss] * len(new)
        if ids:
            yield document, np.array(ids, np.int64), np.array(mask, bool)


def cut(text: str, size: int = PIECE_CHARS) -> list[str]:
    """Cut a text into parts of about `size` characters where SPLIT_PATTERN starts a word anyway; "" gives no part."""
    parts, start = [], 0
    while len(text) - start > size:
        found = _CUT.search(text, start + size)
        if found is None:
            break
        parts.append(text[start : found.start()])
        start = found.start()
    return [*parts, text[start:]] if start < len(text) else parts


def whole(text: str) -> list[str]:
    """Return the text as its only part; "" gives no part."""
    return [text] if text else []
