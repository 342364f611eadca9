"""What every data option shares (contract: Data): prepare once, cached and locked; streams, held-out batches, baselines, summary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.contracts import Batch, UserError
from components.data import baselines as models
from components.data.documents import Corpus, Document, digest
from components.data.errors import at_least
from components.data.progress import progress
from components.data.rows import DocumentRows, Rows, RunningRows
from components.data.stream import HeldOutBatches, PackedStream
from components.data.token_file import CODE_VERSION, TokenFile, cache_lock, intact, replacing, write_token_file
from components.data.tokenizers import FILE_NAME, SPLIT_PATTERN, Tokenizer, bytes_tokenizer, check_tokenizer_options, train_bpe
from components.data.window_mix import WindowMix

SPLITS = ("train", "val")


class CorpusData:
    """Base of the data options: an option gives its corpora (`_corpora`) and says how their documents lie in rows.

    tokenizer: {kind: bpe | bytes | hf, vocab_size, path}; seq_len: tokens of a row; batch_size: rows of a micro-batch on one rank;
    num_workers: processes that read batches ahead, 0 to read them in the training process. Raises UserError for values out of range.
    """

    document_mask = True  # attention, state and positions stay inside a document of a packed row
    window_mix: WindowMix | None = None  # rows of two window lengths, each with its RoPE regime
    eval_lengths: Sequence[int] = ()  # further lengths of rows that the held-out text is measured in
    whole_documents = False  # pack whole documents into rows instead of cutting running text
    packed = True  # several of those documents in a row
    task_names: tuple[str, ...] = ()  # of data with tasks: one a corpus, in their order; ids of batches are places in it
    source = ""  # what the summary calls the data
    stream_type: type[PackedStream] = PackedStream

    def __init__(self, tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, num_workers: int) -> None:
        self.seq_len = at_least("data.seq_len", seq_len, 2)
        self.batch_size = at_least("data.batch_size", batch_size, 1)
        self._drawn = self.batch_size  # rows that a micro-batch draws, or pairs of rows
        self._num_workers = at_least("data.num_workers", num_workers, 0)
        self._tokenizer_options = check_tokenizer_options(tokenizer)
        self._tokenizer: Tokenizer | None = None
        self._files: dict[str, list[TokenFile]] = {}
        self._weights: list[float] | None = None
        self._baselines: dict[str, float] = {}
        self._rows: list[Rows] | None = None

    def _corpora(self) -> Sequence[Corpus]:
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data; there after `prepare`, or when set for rendering alone."""
        if self._tokenizer is None:
            raise RuntimeError("prepare() must run before the data can be used")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def prepare(self, cache_dir: Path, tokenizer: Tokenizer | None = None) -> None:
        """Make what the cache lacks: tokenizer, token files, baselines. A given tokenizer replaces the configured one.

        Raises UserError for anything wrong with the data, and when the cache cannot be written.
        """
        folder = Path(cache_dir)
        self._rows = None
        corpora = list(self._corpora())
        with cache_lock(folder):
            prints = [corpus.fingerprint() for corpus in corpora]
            self._tokenizer = tokenizer or self._make_tokenizer(folder, corpora, digest(*prints))
            for split in SPLITS:
                made = [self._token_file(folder, corpus, mark, split) for corpus, mark in zip(corpora, prints, strict=True)]
                for task, file in enumerate(made if self.task_names else ()):
                    if file is not None:
                        file.task = task
                self._files[split] = [file for file in made if file is not None]
            self._baselines = self._make_baselines(folder, corpora, digest(*prints))
        if not self._files["val"]:
            raise UserError(
                f"data: {self.source} is too short to hold anything out of it; give more text, or held-out text of its own (data.val_path)"
            )
        self.evaluations()  # what cannot be measured at the end of a run is refused before its beginning
        weights = [corpus.weight for corpus in corpora if corpus.weight is not None]
        self._weights = weights if len(weights) == len(corpora) else None

    def train_stream(self, seed: int, accumulate: int = 1, rank: int = 0, world_size: int = 1) -> PackedStream:
        """Return the endless stream of micro-batches of one rank. Raises UserError when the data fill no micro-batch."""
        return self.stream_type(
            self._train_rows(),
            self.seq_len,
            self._drawn,
            self.tokenizer.eot_id,
            seed,
            weights=self._stream_weights(),
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            num_workers=self._num_workers,
            document_mask=self.document_mask,
            window_mix=self.window_mix,
        )

    def _stream_weights(self) -> list[float] | None:
        """How often rows of each corpus are drawn relative to the others; None: each row once an epoch."""
        return self._weights

    def _train_rows(self) -> list[Rows]:
        if self._rows is not None:
            return self._rows
        rows: list[Rows] = []
        for file in self._files["train"]:
            whole = self.whole_documents
            one: Rows = DocumentRows(file, self.seq_len, packed=self.packed) if whole else RunningRows(file, self.seq_len)
            if one.count == 0:
                raise UserError(
                    f"data.seq_len: {self.seq_len}; the training text has only {len(file.tokens) - 1} tokens, fewer than one row; lower it "
                    "or give more text"
                )
            rows.append(one)
        self._rows = rows
        return rows

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What a run must find unchanged to go on exactly: digests of the training and held-out tokens, and the rows of an epoch.

        Raises UserError when the training text does not fill a row.
        """
        digests = {split: digest(*(file.fingerprint for file in self._files[split])) for split in SPLITS}
        return {**digests, "epoch_rows": sum(rows.count for rows in self._train_rows())}

    def val_batches(self) -> HeldOutBatches:
        """Return the held-out batches: every held-out label exactly once."""
        return self._held_out_batches(self.seq_len, self.batch_size)

    def _held_out_batches(
        self, seq_len: int, rows: int, multiple_of: int | None = None, files: Sequence[TokenFile] | None = None
    ) -> HeldOutBatches:
        files, eot = self._files["val"] if files is None else files, self.tokenizer.eot_id
        return HeldOutBatches(files, seq_len, rows, eot, self.whole_documents, self.document_mask, multiple_of)

    def evaluations(self) -> dict[str, Iterable[Batch]]:
        """Return the held-out text in rows of each of `eval_lengths`, by name: the same tokens, as many as fill rows of the longest one.

        Raises UserError when there are not so many.
        """
        longest, shortest_file = max(self.eval_lengths, default=0), min(len(file.tokens) - 1 for file in self._files["val"])
        if longest > shortest_file:
            raise UserError(
                f"data.eval_lengths: {longest}; the held-out text has only {shortest_file} tokens; hold out more or go less far"
            )
        tokens = self.seq_len * self.batch_size
        return {
            f"length_{length}": self._held_out_batches(length, max(1, tokens // length), multiple_of=longest)
            for length in self.eval_lengths
        }

    @property
    def val_bytes(self) -> int:
        """UTF-8 bytes of the held-out text whose tokens are labels."""
        return sum(file.text_bytes for file in self._files["val"])

    def baselines(self) -> dict[str, float]:
        """Return bits per byte of order-0, order-2 and xz on the bytes that `val_bytes` counts."""
        return dict(self._baselines)

    def summary(self) -> dict[str, int | float | str]:
        """Return what was read: tokens that are labels, bytes of their text, documents, source, vocabulary."""
        train, val = self._files["train"], self._files["val"]
        result: dict[str, int | float | str] = {
            "source": self.source,
            "documents": sum(int(file.meta["documents"]) for file in [*train, *val]),
            "train_tokens": sum(file.labels for file in train),
            "val_tokens": sum(file.labels for file in val),
            "train_bytes": sum(file.text_bytes for file in train),
            "val_bytes": self.val_bytes,
            "vocab_size": self.tokenizer.vocab_size,
        }
        if self.whole_documents:
            result["truncated"] = sum(DocumentRows(file, self.seq_len).truncated for file in train)
        return result

    def _make_tokenizer(self, folder: Path, corpora: Sequence[Corpus], fingerprint: str) -> Tokenizer:
        options = self._tokenizer_options
        if options["kind"] == "bytes":
            return bytes_tokenizer()
        if options["kind"] == "hf":
            return Tokenizer.load(options["path"])
        home = folder / f"tokenizer-{digest(CODE_VERSION, SPLIT_PATTERN, options['vocab_size'], fingerprint)}"
        if (home / FILE_NAME).exists():
            try:
                return Tokenizer.load(home)
            except UserError:  # damaged in the cache: nothing that the user must mend
                (home / FILE_NAME).unlink()
        with progress("training the tokenizer,", sum(corpus.size("train") for corpus in corpora)) as advance:
            tokenizer = train_bpe(_counted(_documents(corpora, "train"), advance), int(options["vocab_size"]))
        tokenizer.save(home)
        return tokenizer

    def _token_file(self, folder: Path, corpus: Corpus, fingerprint: str, split: str) -> TokenFile | None:
        """Open the cached token file of a corpus, made first when it is not there; None for a corpus without held-out documents."""
        name = f"{split}-{digest(CODE_VERSION, self.tokenizer.fingerprint, fingerprint)}"
        if not intact(folder, name):
            if split == "val" and next(corpus.held_out(), None) is None:
                return None
            with progress(f"tokenising {split} text,", corpus.size(split)) as advance:
                write_token_file(folder, name, _documents([corpus], split), self.tokenizer, advance)
        return TokenFile(folder, name)

    @staticmethod
    def _make_baselines(folder: Path, corpora: Sequence[Corpus], fingerprint: str) -> dict[str, float]:
        name = f"baselines-{digest(CODE_VERSION, fingerprint)}.json"
        try:
            return {key: float(value) for key, value in json.loads((folder / name).read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            held_out = models.gather(d.text(loss_only=True) for d in _documents(corpora, "val"))
        if not len(held_out):
            return {}
        train = models.gather((d.text(loss_only=True) for d in _documents(corpora, "train")), models.TRAIN_BYTES)
        with progress("compressing held-out text,", min(len(held_out), models.XZ_BYTES)) as advance:
            result = models.bits_per_byte(train, held_out, advance)
        with replacing(folder, [name]) as (file,):
            file.write(json.dumps(result).encode())
        return result


def _documents(corpora: Iterable[Corpus], split: str) -> Iterator[Document]:
    for corpus in corpora:
        yield from corpus.train() if split == "train" else corpus.held_out()


def _counted(documents: Iterable[Document], advance: Any) -> Iterator[str]:
    for document in documents:
        text = document.text()
        yield text
        advance(len(text))
