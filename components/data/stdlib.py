"""`data=stdlib`: the source files of the running Python's own standard library, real text that every Python machine already has."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from components.contracts import UserError
from components.data.base import CorpusData
from components.data.documents import Corpus, Document, Piece, digest, held_out_keys
from components.data.errors import fraction, lengths, unreadable
from components.data.window_mix import WindowMix

LEFT_OUT_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "lib-dynload", "node_modules")
)
GENERATED_MARKS = (b"decoding_table", b"decoding_map")  # character tables of encodings/, written by a program


def stdlib_files(root: Path) -> list[tuple[str, Path]]:
    """List (path relative to root, path) of the hand-written sources under `root`, sorted.

    Left out: installed packages, tests, the pydoc topics, build configuration (_sysconfigdata*, config-*) and links.
    """
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in LEFT_OUT_FOLDERS and not name.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and not path.is_symlink():
                files.append((path.relative_to(root).as_posix(), path))
    return sorted(files)


class StdlibCorpus:
    """The standard library as documents, one a file; whole files are held out by a hash of their relative path."""

    name = f"Python {platform.python_version()} standard library"
    weight: float | None = None

    def __init__(self, root: Path, val_fraction: float) -> None:
        self._root, self._fraction = root, val_fraction

    @cached_property
    def _texts(self) -> dict[str, str]:
        texts = {}
        for key, path in stdlib_files(self._root):
            try:
                data = path.read_bytes()
            except OSError as error:
                raise unreadable(path, error) from None
            if key.startswith("encodings/") and any(mark in data for mark in GENERATED_MARKS):
                continue
            try:
                texts[key] = data.decode()
            except UnicodeDecodeError:  # a file that declares another encoding; none does in CPython's own releases
                continue
        found = {key: text for key, text in texts.items() if text}
        if len(found) < 2:
            raise UserError(f"data: {self._root}: this Python has no standard library sources; use data=text data.path=FILE|DIR")
        return found

    def fingerprint(self) -> str:
        return digest(self._fraction, *(part for item in self._texts.items() for part in item))

    def train(self) -> Iterator[Document]:
        return (Document(key, (Piece(text),)) for key, text in self._texts.items() if key not in self._held_out)

    def held_out(self) -> Iterator[Document]:
        return (Document(key, (Piece(text),)) for key, text in self._texts.items() if key in self._held_out)

    def size(self, split: str) -> int:
        return sum(len(text) for key, text in self._texts.items() if (key in self._held_out) == (split == "val"))

    @cached_property
    def _held_out(self) -> set[str]:
        return held_out_keys(self._texts, self._fraction)


class StdlibData(CorpusData):
    """The default data (see CorpusData for the arguments): about 10 MB of Python, of which `val_fraction` of the files is held out."""

    def __init__(
        self, tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, val_fraction: float, document_mask: bool,
        eval_lengths: Sequence[int], num_workers: int, window_mix: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        self.window_mix = WindowMix.of(window_mix)
        self.document_mask, self.eval_lengths = document_mask, lengths("data.eval_lengths", eval_lengths)
        self._corpus = StdlibCorpus(Path(sysconfig.get_path("stdlib")), fraction("data.val_fraction", val_fraction))
        self.source = self._corpus.name

    def _corpora(self) -> Sequence[Corpus]:
        return [self._corpus]
