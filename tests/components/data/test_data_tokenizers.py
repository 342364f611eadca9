"""Tokenizers: exact round trips, no injection, reproducible training, streaming, and files."""

import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from components.contracts import UserError
from components.data.tokenizers import (
    ASSISTANT,
    END,
    EOT,
    SPECIALS,
    USER,
    StreamDecoder,
    Tokenizer,
    _first_bytes,
    bytes_tokenizer,
    check_tokenizer_options,
    train_bpe,
)

CORPUS = [
    f'def method_{i}(self, value):\n    """Return {i}."""\n    if value:\n        return self.value + {i * 137}\n\n' * 5 for i in range(40)
]
TEXTS = [
    "",
    " ",
    "\n\n\n",
    "def f(x):\r\n\treturn  x  # done \n",
    "naïve café ☃ 𝄞 \U0001f468‍\U0001f469‍\U0001f467 e\u0301",
    "\x00\x01\x7f\u00a0\u2028\ufeff\uffff",
    "12345678 1e-3 0xFF",
    "a" * 3000,
    "混合 text 日本語 عربى",
    " \t \n  \f \v x",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 400)


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else bytes_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_bytes_come_back_exactly(tokenizer):
    data = bytes(range(256)) * 2 + "é☃".encode() + b"\xe2\x98" + b"ok" + b"\xff\xfe"
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_bytes_ids_are_the_bytes_and_the_specials_follow():
    tokenizer = bytes_tokenizer()
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert [tokenizer.special_id(name) for name in SPECIALS] == [256, 257, 258, 259, 260]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (261, 256)


def test_special_strings_in_user_text_are_plain_text(tokenizer):
    text = "".join(SPECIALS) + " x" + END
    ids = tokenizer.encode(text)
    assert not set(ids) & {tokenizer.special_id(name) for name in SPECIALS}
    assert tokenizer.decode(ids) == text
    assert not set(tokenizer.encode_batch([text])[0]) & {tokenizer.special_id(name) for name in SPECIALS}


def test_injection_protection_survives_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.eot_id not in again.encode(EOT)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_decode_leaves_specials_out_unless_asked(tokenizer):
    ids = [tokenizer.eot_id, tokenizer.special_id(USER), *tokenizer.encode("hi")]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, keep_specials=True) == f"{EOT}{USER}hi"


def test_bpe_compresses_and_keeps_its_vocabulary_size(bpe):
    assert bpe.vocab_size <= 400
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 3
    assert bpe.decode([bpe.encode("\n        return")[0]]).startswith("\n    ")  # a newline and its indentation are one word


@pytest.mark.parametrize("limit", [1, 5, 6, 7, 12, 100])
def test_training_text_is_limited_in_bytes(limit):
    taken = list(_first_bytes(["é☃a", "bcdé", "never" * 100], limit))  # 6, 5 and 500 bytes
    whole = ("é☃abcdé" + "never" * 100).encode()[:limit]
    assert "".join(taken) == whole.decode("utf-8", "ignore")


SCRIPT = (
    "import sys; from components.data.tokenizers import train_bpe; from tests.components.data.test_data_tokenizers import CORPUS; "
    "sys.stdout.write(train_bpe(CORPUS, 400).fingerprint)"
)


def test_training_twice_gives_the_same_file_with_any_number_of_threads(bpe):
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()}
    made = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert made.stdout == bpe.fingerprint


def test_stream_decoder_holds_bytes_back_until_a_character_is_whole(tokenizer):
    text = "é☃ 𝄞 done"
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.push(tokenizer.special_id(ASSISTANT)) == ""


def test_stream_decoder_flush_marks_an_incomplete_character():
    stream = bytes_tokenizer().stream()
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"


def test_other_tokenizer_files_get_the_specials_they_lack_and_lose_their_settings(tmp_path):
    backend = Backend(models.WordLevel({"hello": 0, "world": 1, EOT: 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([EOT])
    backend.enable_truncation(1)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eot_id == 2
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("hello world") == [0, 1]
    assert tokenizer.decode([0, 1]) == "hello world"
    stream = tokenizer.stream()
    assert stream.push(0) + stream.push(1) + stream.flush() == "hello world"
    with pytest.raises(ValueError, match="byte-level"):
        tokenizer.decode_bytes([0])


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "nonsense \n more"])
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_truncated_tokenizer_file_is_one_line(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_json()[:500])
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\x80\xff")
    with pytest.raises(UserError, match="not even text"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_file_names_the_nearest(tmp_path):
    (tmp_path / "tokeniser.json").write_text("{}")
    with pytest.raises(UserError, match=r"did you mean 'tokeniser.json'"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_an_unknown_special_names_the_nearest(bpe):
    with pytest.raises(UserError, match=r"did you mean '<\|assistant\|>'"):
        bpe.special_id("<|asistant|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bep"}, "data.tokenizer.kind: 'bep'.*did you mean 'bpe'"),
        ({"kind": "hf"}, "data.tokenizer.path: empty"),
        ({"vocab_size": 100}, "data.tokenizer.vocab_size: 100; must be a whole number of at least 261"),
        ({"vocab_size": "2k"}, "data.tokenizer.vocab_size: '2k'"),
        ({"vocabsize": 300}, "data.tokenizer.vocabsize: unknown key.*did you mean 'vocab_size'"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        check_tokenizer_options(options)


def test_kind_may_carry_the_path():
    assert check_tokenizer_options({"kind": "hf:some/dir", "vocab_size": 2048, "path": None})["path"] == "some/dir"


def test_saved_file_is_one_that_the_tokenizers_library_reads(bpe, tmp_path):
    bpe.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode(CORPUS[3], add_special_tokens=False).ids == bpe.encode(CORPUS[3])
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_ids_without_a_token_are_never_said():
    """A vocabulary may have holes: rows of the model that no text was ever made of."""
    vocabulary = {letter: i for i, letter in enumerate("abcdefgh")} | {"z": 30}
    tokenizer = Tokenizer(Backend(models.WordLevel(vocabulary, unk_token="a")))
    specials = {name: tokenizer.special_id(name) for name in SPECIALS}
    holes = set(range(31)) - set(vocabulary.values()) - set(specials.values())
    assert len(holes) > 10 and set(tokenizer.unsaid_ids) == holes | {specials[f"<|{role}|>"] for role in ("system", "user", "assistant")}
