"""The store by itself: names, the set of done ids, rows, errors, changes, the lock, unwritable places."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_worker import SPACE, identity, row_of

from components.errors import UserError
from components.store import Meter, Store, ids, request_id, shards
from components.store.files import lock

ROOT = Path(__file__).resolve().parents[3]


def fill(folder, rows, **options):
    with Store.open(folder, space=SPACE, **options) as store:
        for index in rows:
            store.append(identity(index), index, row_of(index))
    return folder


def open_again(folder, **options):
    return Store.open(folder, space=SPACE, **options)


def test_a_name_is_blake2b_of_canonical_json():
    text = '{"prompt":"é","sampling":{"a":1,"b":2}}'
    want = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert request_id(sampling={"b": 2, "a": 1}, prompt="é") == want
    assert request_id(prompt="é") != request_id(prompt="é", replica=1)


@pytest.mark.parametrize("fresh", [1, 7, 64])
def test_done_set_agrees_with_a_python_set(monkeypatch, fresh):
    monkeypatch.setattr(ids, "FRESH", fresh)
    draw = random.Random(fresh)
    digests = [draw.randbytes(draw.choice([0, 15])).ljust(16, b"\0")[:: draw.choice([1, -1])] for _ in range(400)] + [b"\xff" * 16]
    done, want = ids.DoneSet(), set(digests[:150])
    done.load(b"".join(digests[:100]))
    done.load(b"".join(digests[100:150]))
    assert done.settle() == 150 - len(want)
    for digest in digests:
        assert (digest in done) == (digest in want)
        if digest not in want:
            done.add(digest)
            want.add(digest)
        assert len(done) == len(want)
    assert all(digest in done for digest in want)
    assert done.sha256() == hashlib.sha256(b"".join(sorted(want))).hexdigest()
    assert (np.diff(np.array([int.from_bytes(one, "big") for one in sorted(want)], dtype=object)) > 0).all()


def test_done_set_costs_14_bytes_a_row():
    done = ids.DoneSet()
    for number in range(3 * ids.FRESH):
        done.add(hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest())
    assert done._rest.nbytes == 14 * 3 * ids.FRESH and not done._fresh and not done._loaded.nbytes


def test_digests_that_differ_in_one_bit_are_told_apart():
    """Whichever bit it is: of the part that is stored, or of the part that the place of a digest tells."""
    done, digest = ids.DoneSet(), hashlib.blake2b(b"one", digest_size=16).digest()
    done.load(digest)
    done.settle()
    others = [bytes(a ^ (1 << bit if at == place else 0) for at, a in enumerate(digest)) for place in range(16) for bit in range(8)]
    assert digest in done and not any(other in done for other in others)
    for other in others:
        done.add(other)
    assert done.sha256() == hashlib.sha256(b"".join(sorted([digest, *others]))).hexdigest() and all(other in done for other in others)


def test_line_is_json_at_fixed_places_and_covers_every_byte():
    payload = json.dumps(row_of(3)).encode()
    line = shards.encode(identity(3), 3, payload)
    found = json.loads(line)
    assert found == {"v": 1, "id": identity(3), "i": 3, "crc": found["crc"], "row": row_of(3)}
    assert shards.is_whole(line) and shards.index_of(line) == 3 and shards.identity_of(line).decode() == identity(3)
    for place in range(len(line)):
        for flip in (1, 0x20, 0x80):
            assert not shards.is_whole(line[:place] + bytes([line[place] ^ flip]) + line[place + 1 :]), place


def test_rows_come_back_and_one_row_a_request(tmp_path):
    fill(tmp_path, [4, 2, 0])
    with open_again(tmp_path) as store:
        assert len(store) == 3 and identity(2) in store and identity(1) not in store
        assert not store.append(identity(2), 2, {"prompt": "another"})
        assert store.append(identity(1), 1, row_of(1)) and not store.append(identity(1), 1, row_of(1))
    lines = [json.loads(line) for line in (tmp_path / "parts/part-00000.jsonl").read_text().splitlines()]
    assert [(line["i"], line["row"]) for line in lines] == [(index, row_of(index)) for index in (4, 2, 0, 1)]
    assert len(json.loads((tmp_path / "manifest.json").read_text())["resumed"]) == 1


def test_shards_are_filled_one_after_the_other(tmp_path):
    fill(tmp_path, range(200), fsync_rows=10, shard_bytes=3000)
    names = [path.name for path in shards.shards_in(tmp_path)]
    full = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert len(names) > 3 and [shard["name"] for shard in full] == names[:-1]
    assert all(shard["bytes"] == (tmp_path / "parts" / shard["name"]).stat().st_size >= 3000 for shard in full)
    with open_again(tmp_path, shard_bytes=3000) as store:
        assert len(store) == 200


def test_a_row_is_safe_after_fsync_rows_or_fsync_seconds(tmp_path):
    path = tmp_path / "parts/part-00000.jsonl"
    with open_again(tmp_path, fsync_rows=3, fsync_seconds=1e9) as store:
        for index, lines in enumerate([0, 0, 3, 3]):
            store.append(identity(index), index, row_of(index))
            assert len(path.read_bytes().splitlines()) == lines
        store.fsync_seconds = 0
        store.tick()
        assert len(path.read_bytes().splitlines()) == 4


def test_rows_of_many_bytes_do_not_wait_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PENDING_BYTES", 1000)
    with open_again(tmp_path, fsync_rows=1000, fsync_seconds=1e9) as store:
        store.append(identity(0), 0, {"text": "x" * 1000})
        assert (tmp_path / "parts/part-00000.jsonl").stat().st_size > 1000


def test_halves_of_characters_are_joined_or_replaced(tmp_path):
    with open_again(tmp_path) as store:
        store.append(identity(0), 0, {"text": "\ud83d\ude00 \ud83d!"})
    assert json.loads((tmp_path / "parts/part-00000.jsonl").read_bytes())["row"] == {"text": "😀 \ufffd!"}


def test_errors_keep_their_attempts_until_there_is_a_row(tmp_path):
    with open_again(tmp_path) as store:
        store.error(identity(0), 0, "timeout: 30 s", 1)
        store.error(identity(1), 1, "refused: no", 1)
        store.error(identity(0), 0, "timeout: 30 s", 2)
        store.append(identity(1), 1, row_of(1))
    with (tmp_path / "errors.jsonl").open("a") as file:
        file.write('[]\nnonsense\n{"id": "torn')
    with open_again(tmp_path) as store:
        assert (store.attempts(identity(0)), store.attempts(identity(1)), store.failed) == (2, 0, 1)
        store.error(identity(0), 0, "timeout: 30 s", 3)
    with open_again(tmp_path) as store:
        assert store.attempts(identity(0)) == 3


def test_other_requests_are_refused_or_moved_aside(tmp_path):
    fill(tmp_path, range(5))
    other = {"model": "none", "sampling": {"temperature": 0.7}, "template": "new"}
    with pytest.raises(UserError, match=r"sampling.temperature: 0.5 -> 0.7; template: null -> \"new\".*on_change=new"):
        Store.open(tmp_path, space=other)
    with Store.open(tmp_path, space=other, on_change="new") as store:
        assert len(store) == 0 and "moved" not in store.mended[0] and "before-" in store.mended[0]
        store.append(identity(9), 9, row_of(9))
    aside = next(tmp_path.glob("before-*"))
    with open_again(aside) as old:
        assert len(old) == 5
    with Store.open(tmp_path, space=other) as store:
        assert len(store) == 1
    with pytest.raises(UserError, match="on_change: 'append' is not one of refuse, new"):
        Store.open(tmp_path, space=other, on_change="append")


def test_a_second_process_fails_fast(tmp_path):
    script = "import sys; from components.store import Store; Store.open(sys.argv[1], space={})"
    with Store.open(tmp_path, space={}) as store:
        store.append(identity(0), 0, row_of(0))
        done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert f"is being written by process {os.getpid()}; wait for it" in done.stderr
    os.close(lock(tmp_path))


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*Not a directory|cannot be written.*File exists"):
        open_again(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        open_again("/proc/no/such/folder")


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"Read-only file system.*choose another"):
        open_again(tmp_path)
    monkeypatch.undo()
    fill(tmp_path, range(3))


def test_a_folder_that_is_removed_meanwhile_is_noticed(tmp_path):
    store = open_again(tmp_path)
    store.append(identity(0), 0, row_of(0))
    (tmp_path / "parts/part-00000.jsonl").unlink()
    with pytest.raises(UserError, match="removed meanwhile"):
        store.close()


def test_manifest_that_is_gone_or_garbage_is_refused(tmp_path):
    fill(tmp_path, range(3))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is no manifest"):
        open_again(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 7}')
    with pytest.raises(UserError, match="schema_version 7; this version reads 1"):
        open_again(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="rows but no manifest"):
        open_again(tmp_path)


def test_a_meter_counts_and_estimates(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    meter = Meter(total=1000, done=100)
    assert meter.record()["eta_s"] is None
    for second in range(1, 101):
        clock[0] += 1
        meter.answered(10, 4 if second <= 40 else 8, second / 100)
        meter.record()
    found = meter.record()
    assert (found["done"], found["total"]) == (200, 1000)
    assert found["rows_per_second"] == pytest.approx(1) and found["eta_s"] == pytest.approx(800)
    assert found["prompt_tokens_per_second"] == pytest.approx(10)
    assert found["completion_tokens_per_second"] == pytest.approx(8)  # of the last minute alone
    assert found["latency_p50_s"] == pytest.approx(0.505) and found["latency_p95_s"] == pytest.approx(0.9505)
    assert json.loads(json.dumps(found)) == found
