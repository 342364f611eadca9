"""Text to token ids and back: one class round the `tokenizers` library, for trained byte-level BPE, plain bytes and any tokenizer.json.

Example:
    >>> tokenizer = bytes_tokenizer()
    >>> tokenizer.encode("hi"), tokenizer.decode([104, 105]), tokenizer.eot_id
    ([104, 105], 'hi', 256)
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from components.contracts import UserError
from components.data.errors import at_least, choice, did_you_mean, no_such_file, unreadable, unwritable

EOT, SYSTEM, USER, ASSISTANT, END = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (EOT, SYSTEM, USER, ASSISTANT, END)
KINDS = ("bpe", "bytes", "hf")
FILE_NAME = "tokenizer.json"
STOPS_FILES = ("generation_config.json", "config.json")  # beside it, the first that names eos_token_id says where generation stops
TRAIN_BYTES = 64 * 2**20  # BPE merges are settled by far less text; the rest would only cost time

SPLIT_PATTERN = "|".join(
    (
        r"(?:\r?\n[ \t]*)+",  # a run of newlines with the indentation of the line after it
        r"[^\r\n\t\p{L}\p{N}]?\p{L}[\p{L}\p{M}]*",  # a word with the one space or sign before it: ` self`, `.join`, `_name`
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"[^\S\r\n]+(?!\S)",  # spaces inside a line, all but the one that belongs to the next word
        r"\s",
    )
)


def _byte_alphabet() -> dict[int, str]:
    """Map every byte to the printable character that stands for it in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Tokenizer:
    """A `tokenizers` tokenizer that never turns user text into a special token, and that knows the five specials by name.

    Specials that the backend lacks are appended to its vocabulary; those it has keep their ids. `stop_ids` end what a model says: the end
    of text, the end of a turn, and the ids in `stops`, which others' models have besides; they are not stored in tokenizer.json.
    `unsaid_ids` begin a turn, which is never the model's to do, or stand for no token: a vocabulary may have holes.
    """

    def __init__(self, backend: Backend, stops: Iterable[int] = ()) -> None:
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # special strings in user text stay text; not stored in tokenizer.json
        self._backend = backend
        self._specials = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(self._specials.values())
        known = set(backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size: int = max(known) + 1
        self.eot_id: int = self._specials[EOT]
        own = (self.eot_id, self._specials[END])
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *(i for i in stops if 0 <= i < self.vocab_size)]))
        unsaid = {self._specials[role] for role in (SYSTEM, USER, ASSISTANT)} - set(self.stop_ids) | (set(range(self.vocab_size)) - known)
        self.unsaid_ids: tuple[int, ...] = tuple(sorted(unsaid))

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer.json, or the one inside a folder, and the stop ids beside it. Raises UserError when it is missing or none."""
        given = Path(path).expanduser()
        file = given / FILE_NAME if given.is_dir() else given
        if not file.exists():
            raise no_such_file("tokenizer", file)
        try:
            content = file.read_text(encoding="utf-8")
        except OSError as error:
            raise unreadable(file, error) from None
        except UnicodeDecodeError:
            raise UserError(f"{file}: not a tokenizer.json of the tokenizers library (not even text)") from None
        try:
            return cls(Backend.from_str(content), stops_beside(file))
        except Exception as error:  # the library raises a bare Exception for everything
            raise UserError(f"{file}: not a tokenizer.json of the tokenizers library ({str(error).splitlines()[0]})") from None

    def save(self, folder: Path) -> None:
        """Write `folder`/tokenizer.json (temporary name, then renamed), and the stop ids beside it where there are further ones."""
        files = {FILE_NAME: self.to_json()}
        if len(self.stop_ids) > 2:
            files[STOPS_FILES[0]] = json.dumps({"eos_token_id": list(self.stop_ids)}) + "\n"
        folder = Path(folder)
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                temporary.write_text(content, encoding="utf-8")
                os.replace(temporary, folder / name)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise unwritable(folder, error) from None

    def to_json(self) -> str:
        """Return the content of tokenizer.json."""
        return self._backend.to_str(pretty=True)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes an id."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @cached_property
    def splits_before_newlines(self) -> bool:
        """Whether text may be cut before a newline that follows a word without changing a token: true of the tokenizers made here.

        A tokenizer.json from elsewhere may normalise, split or merge across the cut, or add a sign at the start of each text.
        """
        own, saved = json.loads(_byte_level(models.BPE(), SPLIT_PATTERN).to_str()), json.loads(self._backend.to_str())
        unmerged = json.loads(_byte_level(models.BPE(), None).to_str())["pre_tokenizer"]  # of plain bytes: nothing to merge
        if saved["normalizer"] is not None or any(not token["special"] for token in saved["added_tokens"]):
            return False
        if saved["model"].get("type") != "BPE" or saved["model"].get("dropout"):
            return False
        return saved["pre_tokenizer"] == own["pre_tokenizer"] or (saved["pre_tokenizer"] == unmerged and not saved["model"]["merges"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, no special token among them."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        # Said aloud, the setting stops the library's warning when a data worker is forked later; the workers never tokenise.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode bytes that need not be UTF-8; `decode_bytes` gives them back. Raises ValueError when the vocabulary is not byte-level."""
        if self._byte_pieces is None:
            raise ValueError("encode_bytes needs a byte-level tokenizer")
        ids: list[int] = []
        text = data.decode("utf-8", "surrogateescape")  # each byte that is not UTF-8 becomes one of U+DC80..U+DCFF
        start = 0
        for i, char in enumerate(text):
            if "\udc80" <= char <= "\udcff":
                ids += self.encode(text[start:i]) if i > start else []
                ids.append(self._id_of_byte[ord(char) - 0xDC00])
                start = i + 1
        return ids + (self.encode(text[start:]) if start < len(text) else [])

    def decode(self, ids: Iterable[int], keep_specials: bool = False) -> str:
        """Return the text of `ids`; special tokens are left out unless asked for, bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if self._byte_pieces is not None:
            return self.decode_bytes(ids, keep_specials).decode("utf-8", "replace")
        return self._backend.decode(ids, skip_special_tokens=not keep_specials)

    def decode_bytes(self, ids: Iterable[int], keep_specials: bool = False) -> bytes:
        """Return the exact bytes of `ids`. Raises ValueError when the vocabulary is not byte-level."""
        pieces = self._byte_pieces
        if pieces is None:
            raise ValueError("decode_bytes needs a byte-level tokenizer")
        return b"".join(pieces.get(int(i), b"") for i in ids if keep_specials or int(i) not in self._special_ids)

    def special_id(self, name: str) -> int:
        """Return the id of the special token `name`. Raises UserError with the nearest name when there is none."""
        if name not in self._specials:
            raise UserError(f"special token {name!r}: unknown to this tokenizer{did_you_mean(name, self._specials)}")
        return self._specials[name]

    def stream(self) -> StreamDecoder:
        """Return a decoder for ids that arrive one at a time."""
        return StreamDecoder(self)

    def token_bytes(self, first: bool = False) -> list[bytes]:
        """The bytes that each id adds to a text, b"" for those that add none: special tokens and holes in the vocabulary.

        first: at the beginning of a text, where some tokenizers leave out a space.
        Raises UserError where text is more than that of its tokens one after the other.
        """
        if self._byte_pieces is not None:
            pieces = self._byte_pieces
            return [b"" if i in self._special_ids else pieces.get(i, b"") for i in range(self.vocab_size)]
        return self._foreign_bytes[0 if first else 1]

    @cached_property
    def _foreign_bytes(self) -> tuple[list[bytes], list[bytes]]:
        """Bytes of every id at the beginning of a text, and after a token, where the backend does not decode byte by byte."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        single: dict[int, bytes] = {}
        if "ByteFallback" in json.dumps(json.loads(self._backend.to_str())["decoder"]):
            spelled = {i: int(t[3:5], 16) for t, i in vocabulary.items() if len(t) == 6 and t.startswith("<0x") and t.endswith(">")}
            single = {i: bytes([byte]) for i, byte in spelled.items() if byte > 0x7F}  # parts of characters; the others have a text
        known = [i for i in sorted(vocabulary.values()) if i not in self._special_ids and i not in single]
        alone = dict(zip(known, self._backend.decode_batch([[i] for i in known]), strict=True))
        anchor = next((i for i, text in alone.items() if text.strip() and "\ufffd" not in text), None)
        after = self._backend.decode_batch([[anchor, i] for i in known]) if anchor is not None else []
        start = alone[anchor] if anchor is not None else ""
        later = {i: text[len(start) :] for i, text in zip(known, after, strict=False) if text.startswith(start)}
        sample = np.random.default_rng(0).choice(known or [0], size=(256, 8)).tolist()
        joined = [alone.get(row[0], "") + "".join(later.get(i, "") for i in row[1:]) for row in sample]
        if not later or self._backend.decode_batch(sample) != joined:
            raise UserError("data.tokenizer: text is more than its tokens one after the other, so that no answer can be held to a pattern")
        tables = (alone, later)
        first, rest = ([single.get(i, table.get(i, "").encode()) for i in range(self.vocab_size)] for table in tables)
        return first, rest

    @cached_property
    def _id_of_byte(self) -> dict[int, int]:
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        return {byte: vocabulary[char] for byte, char in _byte_alphabet().items()}

    @cached_property
    def _byte_pieces(self) -> dict[int, bytes] | None:
        """Bytes of every id, or None when the backend does not decode byte by byte."""
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        if "ByteLevel" not in [decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))]:
            return None
        from_char = {char: byte for byte, char in _byte_alphabet().items()}
        added = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}
        pieces = {i: text.encode() for i, text in added.items()}
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            if i not in added:
                pieces[i] = bytes(from_char[c] for c in token) if all(c in from_char for c in token) else token.encode()
        return pieces


def stops_beside(file: Path) -> list[int]:
    """The ids that generation_config.json or config.json beside a tokenizer.json gives as eos_token_id; [] where they say nothing."""
    for name in STOPS_FILES:
        try:
            told = json.loads((file.parent / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return [i for i in (told if isinstance(told, list) else [told]) if isinstance(i, int) and not isinstance(i, bool)]
    return []


class StreamDecoder:
    """Turns ids into text as they arrive and holds back a character until its last byte is there.

    Example:
        >>> stream = bytes_tokenizer().stream()
        >>> [stream.push(b) for b in "é!".encode()]
        ['', 'é', '!']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # the last ones shown, whose text tells how the next begins, then those held back
        self._shown = 0  # how many of them were shown

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; "" while a character is incomplete, and for special tokens."""
        if self._tokenizer._byte_pieces is not None:
            return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))
        if int(token_id) in self._tokenizer._special_ids:
            return ""
        self._ids.append(int(token_id))
        return self._show(final=False)

    def flush(self) -> str:
        """Return what is still held back; incomplete bytes become U+FFFD."""
        if self._tokenizer._byte_pieces is not None:
            return self._utf8.decode(b"", final=True)
        return self._show(final=True)

    def _show(self, final: bool) -> str:
        """The text of the ids held back: what decoding them after those shown before adds to these."""
        known, text = self._tokenizer.decode(self._ids[: self._shown]), self._tokenizer.decode(self._ids)
        if len(text) <= len(known) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(known) :]


def _byte_level(model: models.BPE, pattern: str | None) -> Backend:
    backend = Backend(model)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend


def bytes_tokenizer() -> Tokenizer:
    """Make the tokenizer whose ids 0..255 are the bytes of UTF-8, followed by the specials."""
    return Tokenizer(_byte_level(models.BPE(vocab={char: byte for byte, char in _byte_alphabet().items()}, merges=[]), None))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) on the first 64 MiB of `texts`.

    `vocab_size` counts the 256 bytes and the specials; a small corpus gives fewer. The same texts always give the same file.
    Raises UserError when vocab_size cannot hold the bytes and the specials.
    """
    smallest = 256 + len(SPECIALS)
    at_least("data.tokenizer.vocab_size", vocab_size, smallest)
    backend = _byte_level(models.BPE(), SPLIT_PATTERN)
    alphabet = sorted(_byte_alphabet().values())  # the library's own list comes in hash order
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    backend.train_from_iterator(_first_bytes(texts, TRAIN_BYTES), trainer)
    return Tokenizer(backend)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield the texts up to `limit` bytes of UTF-8; the one that goes beyond is cut at the last whole character before."""
    for text in texts:
        data = text.encode()
        yield text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
        limit -= len(data)
        if limit <= 0:
            return


def check_tokenizer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the node `data.tokenizer` ({kind, vocab_size, path}; kind may be written hf:PATH) and return it with every key present."""
    known = ("kind", "vocab_size", "path")
    for key in options:
        if key not in known:
            raise UserError(f"data.tokenizer.{key}: unknown key; allowed are {', '.join(known)}{did_you_mean(key, known)}")
    node = {"kind": "bpe", "vocab_size": 2048, "path": None} | dict(options)
    if str(node["kind"]).startswith("hf:"):
        node["kind"], node["path"] = "hf", str(node["kind"])[3:]
    choice("data.tokenizer.kind", node["kind"], KINDS)
    if node["kind"] == "hf" and not node["path"]:
        raise UserError("data.tokenizer.path: empty; kind 'hf' needs the path of a tokenizer.json or of the folder that holds it")
    if node["kind"] == "bpe":
        at_least("data.tokenizer.vocab_size", node["vocab_size"], 256 + len(SPECIALS))
    return node
