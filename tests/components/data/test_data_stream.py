"""Token files, rows and streams: what is a label when, exact resume, exact counts, cache failures."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from components.contracts import IGNORE, UserError
from components.data.documents import Document, Piece
from components.data.rows import DocumentRows, RunningRows, make_batch, pack
from components.data.stream import HeldOutBatches, PackedStream, quotas
from components.data.token_file import TokenFile, cache_lock, cut, intact, write_token_file
from components.data.tokenizers import SPLIT_PATTERN, Tokenizer, bytes_tokenizer, train_bpe

TOKENIZER = bytes_tokenizer()
E = TOKENIZER.eot_id


def documents(*texts):
    return [Document(str(i), (Piece(text),)) for i, text in enumerate(texts)]


def token_file(folder, docs, name="t"):
    write_token_file(Path(folder), name, docs, TOKENIZER)
    return TokenFile(Path(folder), name)


def random_texts(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(97, 123, size=rng.integers(1, longest + 1)))) for _ in range(count)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("tokens"), documents(*random_texts(40, 60)))


def stream_of(*sources, seq_len=8, batch_size=2, seed=3, **options):
    return PackedStream([RunningRows(f, seq_len) for f in sources], seq_len, batch_size, E, seed, **options)


def equal(a, b):
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.segment_ids, b.segment_ids)
        and (a.loss_tokens, a.index) == (b.loss_tokens, b.index)
    )


def test_layout_of_a_token_file(tmp_path):
    file = token_file(tmp_path, documents("ab", "cde"))
    assert file.tokens.tolist() == [E, 97, 98, E, 99, 100, 101, E]
    assert file.documents.tolist() == [0, 3, 7]
    assert (file.labels, file.text_bytes, file.mask, file.tokens.dtype) == (7, 5, None, np.dtype("<u2"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.bin", "t.docs.npy", "t.json"]


def test_the_mask_follows_pieces_and_the_end_mark_its_document(tmp_path):
    asked = Document("0", (Piece("<|user|>", special=True, loss=False), Piece("q", loss=False), Piece("ab")))
    silent = Document("1", (Piece("x"), Piece("y", loss=False)))
    file = token_file(tmp_path, [asked, silent])
    assert file.tokens.tolist() == [E, 258, 113, 97, 98, E, 120, 121, E]
    assert file.mask[1:].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]  # the E after `ab` counts, the one after `y` does not
    assert (file.labels, file.text_bytes) == (4, 3)


def test_make_batch_by_hand(tmp_path):
    file = token_file(tmp_path, documents("ab", "c", "defg"))
    batch = make_batch([(file, [(0, 3), (3, 2)]), (file, [(6, 3)])], 7, E)
    assert batch.input_ids.tolist() == [[E, 97, 98, E, 99, E, E], [100, 101, 102, E, E, E, E]]
    assert batch.labels.tolist() == [[97, 98, E, 99, E, IGNORE, IGNORE], [101, 102, 103] + [IGNORE] * 4]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.segment_ids.dtype) == (torch.int64, torch.int64, torch.int32)


def test_a_row_round_the_ring_goes_on_at_the_first_document(tmp_path):
    file = token_file(tmp_path, documents("ab", "cd"))
    batch = make_batch([(file, RunningRows(file, 4).spans(4))], 4, E)
    assert batch.input_ids.tolist() == [[99, 100, E, 97]]
    assert batch.labels.tolist() == [[100, E, 97, 98]]


@pytest.mark.parametrize("split_long", [False, True])
def test_packing_loses_no_label_and_keeps_documents_whole(tmp_path, split_long):
    texts = random_texts(60, 40)
    file = token_file(tmp_path, documents(*texts))
    rows = DocumentRows(file, 24, split_long)
    spans = sorted(span for key in range(rows.count) for span in rows.spans(key))
    assert all(sum(n for _, n in rows.spans(key)) <= 24 for key in range(rows.count))
    if split_long:
        covered = np.concatenate([np.arange(start, start + n) for start, n in spans])
        assert covered.tolist() == list(range(len(file.tokens) - 1))
    else:
        assert [start for start, _ in spans] == file.documents[:-1].tolist()
        assert [n for _, n in spans] == [min(len(t) + 1, 24) for t in texts]
    assert rows.truncated == sum(len(t) + 1 > 24 for t in texts)
    keys = np.arange(rows.count)
    counted = [int((make_batch([(file, rows.spans(k))], 24, E).labels != IGNORE).sum()) for k in keys]
    assert rows.label_counts(keys).tolist() == counted


def test_best_fit_packs_by_hand():
    assert pack([(0, 5), (10, 6), (20, 4), (30, 3)], [], 10) == [[(10, 6), (20, 4)], [(0, 5), (30, 3)]]
    assert pack([(0, 5), (10, 2)], [(50, 8)], 10) == [[(50, 8), (10, 2)], [(0, 5)]]


def test_held_out_labels_are_every_token_and_end_mark_once(tmp_path):
    texts = random_texts(23, 50, seed=5)
    file = token_file(tmp_path, documents(*texts))
    wanted = sorted(i for t in texts for i in [*TOKENIZER.encode(t), E])
    for whole in (False, True):
        batches = HeldOutBatches([file], 16, 3, E, whole_documents=whole)
        for _ in range(2):  # re-iterable
            got = sorted(i for b in batches for i in b.labels[b.labels != IGNORE].tolist())
            assert got == wanted
        assert len(list(batches)) == len(batches)


def test_an_epoch_has_no_label_twice_and_few_missing(file):
    ring = len(file.tokens) - 1
    rows = RunningRows(file, 8)
    for epoch in range(3):
        keys = rows.draw(np.random.default_rng(epoch))
        labels = np.concatenate([np.arange(start + 1, start + n + 1) for k in keys for start, n in rows.spans(int(k))])
        assert len(set(labels.tolist())) == len(labels) > ring - 8


def test_over_epochs_every_token_is_a_label_equally_often(tmp_path):
    file = token_file(tmp_path, documents("abcdefg", "hijklmn", "op"))  # ring of 19: two rows of 7, five left out
    counts, epochs = np.zeros(len(file.tokens)), 2000
    rows = RunningRows(file, 7)
    for epoch in range(epochs):
        for key in rows.draw(np.random.default_rng(epoch)):
            for start, n in rows.spans(int(key)):
                counts[start + 1 : start + n + 1] += 1
    share = counts[1:] / epochs
    assert np.abs(share - 14 / 19).max() < 5 * np.sqrt(14 / 19 * 5 / 19 / epochs)  # five standard deviations of a binomial


def test_order_is_a_function_of_seed_and_epoch(file):
    first, again, other = stream_of(file), stream_of(file), stream_of(file, seed=4)
    epochs = [list(first) for _ in range(2)]
    assert all(equal(a, b) for epoch in epochs for a, b in zip(epoch, again, strict=True))
    assert not any(torch.equal(a.input_ids, b.input_ids) for a, b in zip(epochs[0][:5], list(other)[:5]))
    assert not any(torch.equal(a.input_ids, b.input_ids) for a, b in zip(epochs[0][:5], epochs[1][:5]))


def test_no_global_generator_is_touched(file):
    for workers in (0, 1):
        torch.manual_seed(0)
        np.random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        iterator = iter(stream_of(file, num_workers=workers))
        next(iterator)
        del iterator
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()


def take(stream, count):
    taken = []
    while len(taken) < count:
        for batch in stream:
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_everywhere(file, workers):
    length = len(stream_of(file, accumulate=4))
    whole = take(stream_of(file, accumulate=4), 2 * length + 3)
    stops = [5, length - 1, length, length + 1] if workers else [1, 3, 4, 5, length - 1, length, length + 1, 2 * length]
    for stop in stops:
        first = stream_of(file, accumulate=4, num_workers=workers)
        take(first, stop)
        state = first.state_dict()
        assert state == {"epoch": stop // length, "position": stop % length}  # delivered, not prefetched
        second = stream_of(file, accumulate=4, num_workers=workers)
        second.load_state_dict(state)
        assert all(equal(a, b) for a, b in zip(whole[stop : stop + 4], take(second, 4), strict=False))


def test_a_state_at_the_end_of_an_epoch_is_the_next_one(file):
    stream = stream_of(file)
    stream.load_state_dict({"epoch": 0, "position": len(stream)})
    assert stream.state_dict() == {"epoch": 1, "position": 0}
    assert len(list(stream)) == len(stream)


def test_a_state_beyond_the_epoch_is_refused(file):
    with pytest.raises(UserError, match=r"resume: the run stopped at batch 9999 .* data.batch_size"):
        stream_of(file).load_state_dict({"epoch": 0, "position": 9999})


def test_ranks_share_an_epoch_and_count_together(tmp_path):
    mixed = [Document(str(i), (Piece(t[: len(t) // 2], loss=False), Piece(t[len(t) // 2 :]))) for i, t in enumerate(random_texts(90, 20))]
    rows = DocumentRows(token_file(tmp_path, mixed), 24)
    ranks = [list(PackedStream([rows], 24, 2, E, 1, accumulate=3, rank=r, world_size=2)) for r in range(2)]
    assert len(ranks[0]) % 3  # so that the last window is a short one
    count = [sum(int((b.labels != IGNORE).sum()) for b in pair) for pair in zip(*ranks, strict=True)]
    for i, pair in enumerate(zip(*ranks, strict=True)):
        window = i // 3 * 3
        assert pair[0].loss_tokens == pair[1].loss_tokens == sum(count[window : window + 3])
    seen = [tuple(row.tolist()) for batches in ranks for b in batches for row in b.labels]
    assert len(seen) == len(set(seen)) == 2 * 2 * len(ranks[0])


def test_mixtures_keep_their_weights_and_repeat_the_smaller_source(tmp_path):
    small = token_file(tmp_path, documents("a" * 100), "small")
    large = token_file(tmp_path, documents("b" * 1000), "large")
    stream = stream_of(small, large, weights=[3.0, 1.0], seq_len=9)
    rows = [row for batch in stream for row in batch.input_ids]
    from_small = sum(97 in row for row in rows)
    assert from_small == round(len(rows) * 0.75)
    natural = [row for batch in stream_of(small, large, seq_len=9) for row in batch.input_ids]
    assert sum(97 in row for row in natural) in (10, 11)


def test_quotas_are_exact_to_rounding():
    assert quotas([1, 1, 1], 100) == [34, 33, 33]
    assert quotas([0.7, 0.2, 0.1], 1000) == [700, 200, 100]
    assert sum(quotas(np.random.default_rng(0).random(7).tolist(), 9999)) == 9999


def test_too_little_text_for_a_batch_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data.batch_size: 4 x 2 process\(es\) x 8 tokens.*only 3 row"):
        stream_of(token_file(tmp_path, documents("a" * 25)), batch_size=4, world_size=2)


def test_no_text_at_all_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        token_file(tmp_path, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    if call == "fsync":

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        folder = tmp_path
    else:  # a device that is always full
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        folder, real = tmp_path, Path.open
        monkeypatch.setattr(Path, "open", lambda self, *a, **k: real(Path("/dev/full") if "tmp" in self.suffix else self, *a, **k))
    with pytest.raises(UserError, match="no space left for the token cache"):
        write_token_file(folder, "t", documents("x" * 300_000), TOKENIZER)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncate", "flip", "sidecar", "remove"])
def test_a_damaged_file_is_noticed(tmp_path, capsys, damage):
    token_file(tmp_path, documents("abcdef"))
    assert intact(tmp_path, "t") and not intact(tmp_path, "other")
    data = (tmp_path / "t.bin").read_bytes()
    if damage == "truncate":
        (tmp_path / "t.bin").write_bytes(data[:-2])
    elif damage == "flip":
        (tmp_path / "t.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "sidecar":
        (tmp_path / "t.json").write_text('{"files": {"t.b')
    else:
        (tmp_path / "t.bin").unlink()
    assert not intact(tmp_path, "t")
    assert "damaged; making them again" in capsys.readouterr().err


def _hold(folder, held, seconds):
    with cache_lock(Path(folder)):
        held.set()
        time.sleep(seconds)


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_waits_and_a_dead_one_blocks_nobody(tmp_path, capsys, killed):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, 60 if killed else 0.5))
    process.start()
    assert held.wait(10)
    if killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    (tmp_path / ".t.bin.1.tmp").touch()  # what a killed process leaves
    with cache_lock(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == ["prepare.lock"]
    process.join()
    assert ("waiting for another process" in capsys.readouterr().err) != killed


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="token cache cannot be written"), cache_lock(tmp_path / "file" / "cache"):
        pass


def test_long_texts_are_cut_where_a_word_begins_anyway():
    texts = [*random_texts(1, 40, seed=2), "def f(x):\r\n    return x  \n\n\n  if y:\n\tz = [1,\n 2]\n" * 30]
    bpe = train_bpe(texts, 300)
    parts = cut(texts[1], size=50)
    assert "".join(parts) == texts[1] and len(parts) > 10
    assert [i for part in parts for i in bpe.encode(part)] == bpe.encode(texts[1])
    assert cut("", 5) == [] and cut("abc", 2) == ["abc"]


VOCABULARY = {char: i for i, char in enumerate(sorted({*pre_tokenizers.ByteLevel.alphabet(), "\u2581"}))}


def foreign(kind):
    """A tokenizer.json from elsewhere, for which a cut before a newline changes tokens."""
    merges = [] if kind == "added" else [("a", "\u010a")]  # U+010A stands for the newline
    backend = Backend(models.BPE(vocab={**VOCABULARY, "a\u010a": len(VOCABULARY)}, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), level])
    backend.pre_tokenizer = {
        "merges across the cut": pre_tokenizers.Sequence([level]),
        "space before each text": pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
    }.get(kind, own)
    if kind == "normalised":
        backend.normalizer = normalizers.Strip()
    if kind == "added":
        backend.add_tokens(["a\n"])
    return Tokenizer(backend)


@pytest.mark.parametrize("kind", ["merges across the cut", "space before each text", "normalised", "added"])
def test_tokenizers_from_elsewhere_see_whole_texts(tmp_path, monkeypatch, kind):
    text = "a\na\naa\n  a\n" * 20
    tokenizer = foreign(kind)
    parts = cut(text, size=10)
    assert [i for part in parts for i in tokenizer.encode(part)] != tokenizer.encode(text)  # cutting would do harm
    monkeypatch.setattr("components.data.token_file.cut", lambda text: cut(text, size=10))
    write_token_file(tmp_path, "t", documents(text), tokenizer)
    assert TokenFile(tmp_path, "t").tokens[1:-1].tolist() == tokenizer.encode(text)


def test_own_tokenizers_see_parts_also_when_saved(tmp_path):
    bpe = train_bpe(["abc abc\n" * 20], 270)
    for tokenizer in (bpe, bytes_tokenizer()):
        tokenizer.save(tmp_path)
        assert tokenizer.splits_before_newlines and Tokenizer.load(tmp_path).splits_before_newlines


def test_a_token_file_is_known_by_its_content(tmp_path):
    first, again = token_file(tmp_path, documents("ab", "cd")), token_file(tmp_path, documents("ab", "cd"), "other")
    assert first.fingerprint == again.fingerprint
    others = [documents("ab", "ce"), documents("abc", "d"), [Document("0", (Piece("ab"),)), Document("1", (Piece("cd", loss=False),))]]
    prints = {token_file(tmp_path, docs, f"t{i}").fingerprint for i, docs in enumerate(others)}
    assert len(prints | {first.fingerprint}) == 4
