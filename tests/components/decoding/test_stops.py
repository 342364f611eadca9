"""Text as it is written, against the whole text cut at its first stop string."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from components.contracts import Constraint, SamplingParams
from components.data.tokenizers import ASSISTANT, Tokenizer, bytes_tokenizer, train_bpe
from components.decoding.stops import TextStream, needs_text

LETTERS = ["a", "b", "é", "☃", "𝄞", " "]


def pieces_tokenizer() -> Tokenizer:
    """SentencePiece's way: a sign for the space, bytes where no token fits, and no space at the beginning."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "é", "☃", "▁a", "▁b", "ab", "ba", "aba"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("b", "a"), ("ab", "a")]
    vocabulary = {"<unk>": 0} | {token: i + 1 for i, token in enumerate(letters)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    )
    return Tokenizer(backend)


TOKENIZERS = {
    "bytes": bytes_tokenizer(),
    "bpe": train_bpe(["abab aba ☃é éé ba ab 𝄞a b" * 30], 290),
    "pieces": pieces_tokenizer(),
}


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the first stop string, one character at a time: the longest of those that are complete there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def random_ids(tokenizer: Tokenizer, draws: random.Random, broken: bool) -> list[int]:
    """A random text, cut into tokens that need not be those that `encode` would choose; where `broken`, sometimes with a byte left out."""
    text = "".join(draws.choices(LETTERS, k=draws.randrange(1, 25)))
    parts = [text[i : i + 3] for i in range(0, len(text), 3)] if draws.random() < 0.5 else [text]
    ids = [token for part in parts for token in tokenizer.encode(part)]
    if broken and draws.random() < 0.3 and len(ids) > 1:
        del ids[draws.randrange(len(ids))]
    if draws.random() < 0.2:
        ids.insert(draws.randrange(len(ids) + 1), tokenizer.special_id(ASSISTANT))
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_text_cut_at_the_first_stop_string(name):
    tokenizer, draws = TOKENIZERS[name], random.Random(0)
    stopped = 0
    for _ in range(1500):
        # a byte left out makes the library give up the whole run of byte tokens, back to characters that were complete and shown
        ids = random_ids(tokenizer, draws, broken=name != "pieces")
        stops = ["".join(draws.choices(LETTERS, k=draws.randrange(1, 5))) for _ in range(draws.randrange(4))]
        stream = TextStream(tokenizer, stops)
        shown, count = "", 0
        expected, found = cut(tokenizer.decode(ids), stops)
        for token in ids:
            shown += stream.push(token)
            count += stream.stopped is None
            assert expected.startswith(shown)  # what was shown is never taken back, and no part of the stop string is in it
        shown += stream.flush()
        assert (shown, stream.text, stream.stopped) == (expected, expected, found)
        if found is None:
            assert stream.tokens == len(ids)
        elif stream.tokens == count + 1:  # not in the flush of an incomplete character
            assert cut(tokenizer.decode(ids[: count + 1]), stops)[1] == found
            stopped += 1
    assert stopped > 200


def test_tokens_end_with_the_one_that_completes_the_stop_string():
    stream = TextStream(bytes_tokenizer(), ["END"])
    assert stream.extend(b"ok ENxEND and more") == "ok ENx"
    assert (stream.tokens, stream.stopped, stream.push(65), stream.flush()) == (9, "END", "", "")


def test_text_that_only_began_as_a_stop_string_is_shown():
    stream = TextStream(bytes_tokenizer(), ["aab"])
    assert [stream.push(byte) for byte in b"aaaab"] == ["", "", "a", "a", ""]
    assert stream.text == "aa"
    stream = TextStream(bytes_tokenizer(), ["END"])
    assert (stream.extend(b"xEN"), stream.flush()) == ("x", "EN")


def test_of_stop_strings_that_end_together_the_longest_counts():
    assert TextStream(bytes_tokenizer(), ["c", "abc", "bc"]).extend(b"xabcx") == "x"
    early = TextStream(bytes_tokenizer(), ["abcd", "bc"])  # bc is complete first
    assert (early.extend(b"abcd"), early.stopped) == ("a", "bc")


def test_a_stop_string_inside_one_token_is_seen():
    tokenizer = pieces_tokenizer()
    (token,) = [i for i, piece in enumerate(tokenizer.token_bytes()) if piece == b"aba"]
    stream = TextStream(tokenizer, ["b"])
    assert (stream.push(token), stream.stopped, stream.tokens) == ("a", "b", 1)


def test_only_rows_with_stop_strings_or_constraints_need_their_text():
    assert not needs_text(SamplingParams(stop_ids=(3,), min_p=0.1))
    assert needs_text(SamplingParams(stop=("x",))) and needs_text(SamplingParams(constraint=Constraint(regex="x")))
