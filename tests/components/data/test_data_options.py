"""The four data options end to end: prepare, cache, streams, baselines, chat form and probes."""

import json
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from components.contracts import IGNORE, UserError
from components.data.baselines import bits_per_byte, order0_probabilities, order2_probabilities
from components.data.chat import ChatData
from components.data.stdlib import StdlibData
from components.data.synthetic import KINDS, SyntheticCorpus, SyntheticData
from components.data.text import TextData
from components.data.tokenizers import bytes_tokenizer

BYTES = {"kind": "bytes", "vocab_size": 300, "path": None}
BPE = {"kind": "bpe", "vocab_size": 300, "path": None}
PROSE = "".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(400))


def text_data(path, tokenizer=BYTES, **changes):
    options = {"seq_len": 32, "batch_size": 4, "val_fraction": 0.1, "val_path": None, "column": "text", "encoding_errors": "strict"}
    options |= {"document_mask": True, "eval_lengths": [], "num_workers": 0, "window_mix": None}
    return TextData(path=path, tokenizer=tokenizer, **(options | changes))


def chat_data(path, **changes):
    options = {"tokenizer": BYTES, "seq_len": 96, "batch_size": 2, "val_fraction": 0.1, "val_path": None, "loss_on": "completion"}
    return ChatData(path=path, **(options | {"pack": True, "encoding_errors": "strict", "num_workers": 0} | changes))


def probes(kind="passkey", **changes):
    options = {
        "length": None,
        "shortest": None,
        "train_documents": 60,
        "val_documents": 8,
        "seed": 0,
        "loss_on": "completion",
        "prompt_share": 1.0,
        "tokenizer": BYTES,
    }
    options |= {"eval_lengths": [], "eval_documents": 6, "window_mix": None}
    return SyntheticData(kind, **(options | {"seq_len": 160, "batch_size": 4, "num_workers": 0} | changes))


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return str(path)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labels_of(batches):
    return [i for batch in batches for i in batch.labels[batch.labels != IGNORE].tolist()]


def test_prepare_once_then_from_the_cache(prose, tmp_path, monkeypatch):
    first = text_data(prose, BPE)
    first.prepare(tmp_path / "cache")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    monkeypatch.setattr("components.data.base.write_token_file", None)  # must not be called again
    monkeypatch.setattr("components.data.base.train_bpe", None)
    again = text_data(prose, BPE)
    again.prepare(tmp_path / "cache")
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    assert again.summary() == first.summary() and again.baselines() == first.baselines()
    assert next(iter(again.train_stream(0))).input_ids.tolist() == next(iter(first.train_stream(0))).input_ids.tolist()


def test_summary_counts_what_is_there(prose, tmp_path):
    data = text_data(prose)
    data.prepare(tmp_path / "cache")
    summary = data.summary()
    assert summary["train_bytes"] + summary["val_bytes"] == len(PROSE)
    assert summary["val_tokens"] == data.val_bytes + 1 == len(labels_of(data.val_batches()))  # bytes and one end mark
    assert data.tokenizer.decode(labels_of(data.val_batches())) == PROSE[-data.val_bytes :]
    assert sum(b.loss_tokens for b in data.val_batches()) == summary["val_tokens"]


def test_changed_text_or_tokenizer_is_tokenised_again(prose, tmp_path):
    data = text_data(prose)
    data.prepare(tmp_path / "cache")
    before = data.summary()
    Path(prose).write_text(PROSE + "one more line\n")
    data = text_data(prose)
    data.prepare(tmp_path / "cache")
    assert data.summary()["train_bytes"] + data.val_bytes == before["train_bytes"] + before["val_bytes"] + 14
    other = text_data(prose, BPE)
    other.prepare(tmp_path / "cache")
    assert other.summary()["train_tokens"] < data.summary()["train_tokens"]


def test_a_damaged_cache_is_made_again_with_one_line(prose, tmp_path, capsys):
    data = text_data(prose)
    data.prepare(tmp_path / "cache")
    wanted = [b.input_ids.tolist() for b in data.train_stream(0)]
    (file,) = (tmp_path / "cache").glob("train-*.bin")
    file.write_bytes(file.read_bytes()[:-40])
    (baselines,) = (tmp_path / "cache").glob("baselines-*.json")
    baselines.write_text("{")
    again = text_data(prose)
    again.prepare(tmp_path / "cache")
    assert [b.input_ids.tolist() for b in again.train_stream(0)] == wanted
    assert again.baselines() == data.baselines()
    assert capsys.readouterr().err.count("making them again") == 1


def test_a_damaged_cached_tokenizer_is_trained_again(prose, tmp_path):
    data = text_data(prose, BPE)
    data.prepare(tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("tokenizer.json")
    file.write_text("{")
    again = text_data(prose, BPE)
    again.prepare(tmp_path / "cache")
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint


def test_a_given_tokenizer_replaces_the_configured_one(prose, tmp_path):
    data = text_data(prose, BPE)
    data.prepare(tmp_path / "cache", bytes_tokenizer())
    assert data.tokenizer.vocab_size == 261
    folder = tmp_path / "own"
    bytes_tokenizer().save(folder)
    loaded = text_data(prose, {"kind": f"hf:{folder}"})
    loaded.prepare(tmp_path / "cache")
    assert loaded.summary() == data.summary()


def test_held_out_text_never_reaches_the_tokenizer(tmp_path):
    (tmp_path / "train.txt").write_text("abcabc\n" * 200)
    (tmp_path / "val.txt").write_text("xyzxyz\n" * 200)
    data = text_data(str(tmp_path / "train.txt"), BPE, val_path=str(tmp_path / "val.txt"))
    data.prepare(tmp_path / "cache")
    assert len(data.tokenizer.encode("xyzxyz")) == 6 > len(data.tokenizer.encode("abcabc"))


def test_a_weighted_mixture_draws_by_weight(tmp_path):
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text((letter * 30 + "\n") * 100)
    data = text_data([{"path": f"{tmp_path}/a.txt", "weight": 1}, {"path": f"{tmp_path}/b.txt", "weight": 3}])
    data.prepare(tmp_path / "cache")
    rows = [row for batch in data.train_stream(1) for row in batch.input_ids.tolist()]
    assert sum(98 in row for row in rows) == round(0.75 * len(rows))
    assert data.val_bytes == 2 * 310


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: text_data(p, seq_len=1), "data.seq_len: 1; must be a whole number of at least 2"),
        (lambda p: text_data(p, batch_size=0), "data.batch_size: 0"),
        (lambda p: text_data(p, num_workers=-1), "data.num_workers: -1"),
        (lambda p: text_data(p, val_fraction=1.0), "data.val_fraction: 1.0; must be between 0 and 1"),
        (lambda p: text_data(p, val_fraction=0), "data.val_fraction: 0"),
        (lambda p: text_data(p, encoding_errors="ignore"), "data.encoding_errors: 'ignore'"),
        (lambda p: text_data(None), "data.path: missing"),
        (lambda p: text_data(p, {"kind": "hf:/nowhere"}), "no such file"),
        (lambda p: text_data(p, seq_len=100_000), "data.seq_len: 100000; the training text has only"),
        (lambda p: text_data(p, val_path=p + ".no"), "data.val_path: .*did you mean 'prose.txt'"),
        (lambda p: chat_data(p), "plain text holds no conversations"),
        (lambda p: chat_data(p, loss_on="answers"), "data.loss_on: 'answers'"),
        (lambda p: probes("passkeys"), "data.kind: 'passkeys'.*did you mean 'passkey'"),
        (lambda p: probes(length=160), "data.length: 160; passkey needs from 128"),
        (lambda p: probes(seq_len=64), "data.length: 63"),
        (lambda p: probes(prompt_share=1.5), "data.prompt_share: 1.5; must be between 0 and 1"),
        (lambda p: probes(shortest=100), "data.shortest: 100; passkey needs from 128 characters to data.length=159"),
        (lambda p: probes(eval_lengths=[100]), "data.eval_lengths: 100; passkey needs at least 128"),
        (lambda p: text_data(p, eval_lengths=[64, 64]), "data.eval_lengths: .*different whole numbers"),
        (lambda p: probes("copy", length=8, train_documents=1, val_documents=20_000), "data.val_documents: 20000; there are not so many"),
        (lambda p: StdlibData(BYTES, 32, 4, 2.0, True, [], 0, None), "data.val_fraction: 2.0"),
    ],
)
def test_mistakes_are_one_line(prose, tmp_path, make, message, monkeypatch):
    monkeypatch.setattr("components.data.synthetic.MOST_TRIES", 1)
    with pytest.raises(UserError, match=message) as error:
        data = make(prose)
        data.prepare(tmp_path / "cache")
        data.train_stream(0)
    assert "\n" not in str(error.value)


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi <|end|>"},
    {"role": "assistant", "content": "Hello é"},
]


def test_chat_form_and_its_labels(tmp_path):
    rows = [{"messages": MESSAGES}] * 20 + [{"prompt": "2+2?", "completion": "4"}] * 20
    data = chat_data(write_rows(tmp_path / "c.jsonl", rows))
    data.prepare(tmp_path / "cache")
    tokenizer = data.tokenizer
    end = tokenizer.special_id("<|end|>")
    shown, learnt = set(), set()
    for batch in data.train_stream(0):
        for ids, labels, segments in zip(batch.input_ids, batch.labels, batch.segment_ids, strict=True):
            for segment in segments.unique():
                here = segments == segment
                shown.add(tokenizer.decode(ids[here].tolist(), keep_specials=True))
                learnt.add(tuple(labels[here][labels[here] != IGNORE].tolist()))
    first = "<|endoftext|><|system|>Be kind.<|end|><|user|>Hi <|end|><|end|><|assistant|>Hello é<|end|>"
    assert {first, "<|endoftext|><|user|>2+2?<|end|><|assistant|>4<|end|>"} <= shown
    assert learnt - {()} == {(*"Hello é".encode(), end, tokenizer.eot_id), (ord("4"), end, tokenizer.eot_id)}
    held_out = Counter(labels_of(data.val_batches()))
    assert held_out[end] == held_out[tokenizer.eot_id] > 0
    assert data.val_bytes == held_out.total() - 2 * held_out[end]
    assert data.summary()["truncated"] == 0


def test_unpacked_conversations_have_a_row_each(tmp_path):
    """The same labels either way, in as many rows as there are conversations."""
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(30)]
    found, counts = [], []
    for pack in (True, False):
        data = chat_data(write_rows(tmp_path / "chats.jsonl", rows), pack=pack, batch_size=1)
        data.prepare(tmp_path / "cache")
        batches = list(data.train_stream(0))
        found.append(sorted(labels_of(batches)))
        counts.append([int((batch.position_ids == 0).sum()) - 1 for batch in batches])  # the padding is one too
    assert found[0] == found[1] and len(counts[0]) < len(counts[1])
    assert set(counts[1]) == {1} and sum(counts[0]) == sum(counts[1])


def test_chat_counts_every_token_with_loss_on_all(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", [{"prompt": f"q{i:02d}", "completion": "a"} for i in range(40)])
    data = chat_data(path, loss_on="all")
    data.prepare(tmp_path / "cache")
    documents = data.summary()["val_tokens"] / 9  # <|user|> q00 <|end|> <|assistant|> a <|end|> and the end mark
    assert documents == int(documents) and data.val_bytes == 4 * documents
    only = chat_data(path)
    only.prepare(tmp_path / "cache")
    assert only.val_bytes == documents and only.summary()["val_tokens"] == 3 * documents


def test_long_conversations_are_cut_in_training_and_whole_when_held_out(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "abcdefghij" * 30} for _ in range(30)])
    data = chat_data(path)
    data.prepare(tmp_path / "cache")
    assert data.summary()["truncated"] > 20
    assert len(labels_of(data.val_batches())) == data.summary()["val_tokens"] == data.val_bytes // 300 * 302


def test_render_asks_for_the_next_turn(tmp_path):
    data = chat_data("unused.jsonl")
    data.tokenizer = bytes_tokenizer()
    ids = data.render(MESSAGES[:2])
    assert data.tokenizer.decode(ids, True) == "<|endoftext|><|system|>Be kind.<|end|><|user|>Hi <|end|><|end|><|assistant|>"
    assert ids.count(data.tokenizer.special_id("<|end|>")) == 2  # the one that the user typed is text
    assert data.tokenizer.decode(data.render(MESSAGES), True).endswith("<|assistant|>Hello é")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 1 has only text; a conversation needs messages"),
        ({"messages": []}, "line 1: a conversation is a list"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "line 1: role of message 0: 'usr'.*did you mean 'user'"),
        ({"messages": [{"role": "user"}]}, "line 1: message 0 is .*needs a role and a content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 1: no assistant message"),
        ({"prompt": "x", "completion": None}, "line 1: message 1"),
    ],
)
def test_bad_conversations_are_one_line(tmp_path, row, message):
    data = chat_data(write_rows(tmp_path / "c.jsonl", [row]))
    with pytest.raises(UserError, match=message):
        data.prepare(tmp_path / "cache")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_probes_fit_are_answerable_and_are_held_out(kind, tmp_path):
    data = probes(kind)
    data.prepare(tmp_path / "cache")
    held_out, train = SyntheticCorpus(kind, 159, 0, 60, 8, "completion").probes
    assert data.examples() == held_out and not set(held_out) & set(train) and len(train) == 60
    assert all(len(prompt + answer) <= 159 for prompt, answer in held_out + train)
    for prompt, answer in held_out:
        if kind == "arithmetic":
            assert int(answer.strip(".")) == eval(prompt.strip("="))
        elif kind == "pairs":
            assert prompt.count(f"#{prompt[-1]}{answer}") == 1
        else:
            assert prompt.count(answer.strip(" .")) == (2 if kind == "passkey" else 1)
    answers = data.tokenizer.decode(labels_of(data.val_batches()))
    each = {"recall": 1, "pairs": 6}.get(kind)  # the questions before the last have answers too
    assert len(answers) == 8 * each if each else answers.count(".") == 8
    assert data.val_bytes == (8 * each if each else sum(len(answer) for _, answer in held_out))
    assert data.summary()["truncated"] == 0


def test_probe_lengths_are_spread(tmp_path):
    _, train = SyntheticCorpus("recall", 40, 0, 300, 20, "completion", shortest=16).probes
    lengths = [len(prompt + answer) for prompt, answer in train]
    assert set(lengths) == set(range(16, 41)) and 25 < sum(lengths) / 300 < 31
    assert (
        SyntheticCorpus("recall", 40, 0, 300, 20, "completion").fingerprint()
        != SyntheticCorpus("recall", 40, 0, 300, 20, "completion", 16).fingerprint()
    )


def test_probes_follow_their_seed():
    assert probes(seed=0).examples() == probes(seed=0).examples() != probes(seed=1).examples()


def test_baselines_by_hand():
    train, text = (np.frombuffer(s, np.uint8) for s in (b"abab", b"ab"))
    p0 = {b: (n + 1) / 260 for b, n in ((97, 2), (98, 2), (99, 0))}
    assert order0_probabilities(train)[[97, 98, 99]].tolist() == pytest.approx(list(p0.values()), rel=1e-12)
    # b follows a: seen 2 of 2 times, one kind of successor; c follows a: never, the rest of the weight over p0
    assert order2_probabilities(train, text, order0_probabilities(train)).tolist() == pytest.approx([p0[97], (2 + p0[98]) / 3], rel=1e-12)
    aba = order2_probabilities(train, np.frombuffer(b"aba", np.uint8), order0_probabilities(train))
    assert aba[2] == pytest.approx((1 + (1 + p0[97]) / 2) / 2, rel=1e-12)  # ab->a once of once; b->a once of once
    bits = bits_per_byte(train, text)
    assert bits["order0"] == pytest.approx(-math.log2(3 / 260), rel=1e-12)
    assert bits["xz"] == 8 * len(lzma.compress(b"ab", preset=9 | lzma.PRESET_EXTREME)) / 2


def test_xz_takes_the_first_bytes_and_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr("components.data.baselines.XZ_BYTES", 5000)
    monkeypatch.setattr("components.data.baselines.XZ_BLOCK", 2000)
    text = np.frombuffer(PROSE.encode(), np.uint8)
    done = []
    bits = bits_per_byte(text, text, done.append)
    assert bits["xz"] == 8 * len(lzma.compress(text[:5000].tobytes(), preset=9 | lzma.PRESET_EXTREME)) / 5000
    assert done == [2000, 2000, 1000]
    assert bits_per_byte(text[:10], text[:700])["xz"] == 8 * len(lzma.compress(text[:700].tobytes(), preset=9 | lzma.PRESET_EXTREME)) / 700


def test_fingerprint_follows_the_data_and_not_the_place(prose, tmp_path):
    def fingerprint(text, **changes):
        Path(prose).write_text(text)
        data = text_data(prose, **changes)
        data.prepare(tmp_path / "cache")
        return data.fingerprint

    first = fingerprint(PROSE)
    assert first["epoch_rows"] == PROSE.index("\n", round(len(PROSE) * 0.9)) // 32  # 90 % of the bytes, to the end of the line
    assert fingerprint(PROSE) == first
    early, late = fingerprint(PROSE.replace("Line 3 ", "Lime 3 ")), fingerprint(PROSE.replace("Line 399 ", "Lime 399 "))
    assert early["val"] == first["val"] and early["train"] != first["train"]
    assert late["train"] == first["train"] and late["val"] != first["val"]
    assert fingerprint(PROSE, seq_len=64) == {**first, "epoch_rows": first["epoch_rows"] // 2}


def test_order2_is_a_distribution_after_any_context():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 7, 500).astype(np.uint8)
    p0 = order0_probabilities(train)
    for context in ((0, 1), (6, 6), (3, 200), (200, 3), (255, 255)):
        texts = np.array([[*context, c] for c in range(256)], np.uint8)
        total = sum(order2_probabilities(train, t, p0)[2] for t in texts)
        assert total == pytest.approx(1.0, rel=1e-9)
