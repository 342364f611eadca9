"""Torn lines, damaged lines, lost shards, full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from store_worker import SPACE, identity, row_of
from test_store import fill, open_again

from components.errors import UserError
from components.store import Store, shards

ROOT = Path(__file__).resolve().parents[3]


def test_a_line_torn_at_any_byte_is_cut_off(tmp_path):
    part = fill(tmp_path, range(3)) / "parts/part-00000.jsonl"
    whole = part.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for size in range(last, len(whole) + 1):
        part.write_bytes(whole[:size])
        with open_again(tmp_path) as store:
            assert len(store) == (3 if size == len(whole) else 2), size
            assert bool(store.mended) == (last < size < len(whole))
            store.append(identity(2), 2, row_of(2))
        assert part.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"\0\n" * 10, b"garbage\n"])
def test_what_a_power_failure_leaves_at_the_end_is_cut_off(tmp_path, tail):
    part = fill(tmp_path, range(3)) / "parts/part-00000.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole + tail)
    with open_again(tmp_path) as store:
        assert len(store) == 3 and f"the last {len(tail):,} bytes" in store.mended[0]
    assert part.read_bytes() == whole


def damage(part, number):
    lines = part.read_bytes().splitlines(keepends=True)
    lines[number] = lines[number].replace(b"question", b"quEstion")
    part.write_bytes(b"".join(lines))
    return lines


@pytest.mark.parametrize("shard, number", [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)])
def test_damage_inside_is_refused_then_repaired(tmp_path, shard, number):
    fill(tmp_path, range(30), fsync_rows=1, shard_bytes=1200)
    part = shards.shards_in(tmp_path)[shard]
    lines = damage(part, number)
    before = part.read_bytes()
    with pytest.raises(UserError, match=rf"{part.name} is damaged at 1 lines, the first at byte .*repair=true"):
        open_again(tmp_path)
    assert part.read_bytes() == before
    with open_again(tmp_path, repair=True, shard_bytes=1200) as store:
        assert len(store) == 29
        missing = [index for index in range(30) if identity(index) not in store]
        store.append(identity(missing[0]), missing[0], row_of(missing[0]))
    assert (tmp_path / "quarantine" / part.name).read_bytes() == lines[number]
    with open_again(tmp_path) as store:  # the repair lasts
        assert len(store) == 30 and not store.mended
        store.finish(30)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, path.read_bytes().index(b"\n") + 1)])
def test_a_lost_shard_is_missed(tmp_path, harm):
    fill(tmp_path, range(30), fsync_rows=1, shard_bytes=1200)
    harm(shards.shards_in(tmp_path)[1])
    with pytest.raises(UserError, match=r"part-00001.jsonl (is missing|has \d+ bytes instead of).*repair=true"):
        open_again(tmp_path)
    with open_again(tmp_path, repair=True) as store:
        assert 20 < len(store) < 30
        for index in range(30):
            store.append(identity(index), index, row_of(index))
        store.finish(30)
    open_again(tmp_path).close()


def test_of_rows_with_one_id_the_first_counts(tmp_path):
    import pyarrow.parquet as pq

    part = fill(tmp_path, range(3)) / "parts/part-00000.jsonl"
    with part.open("ab") as file:
        file.write(shards.encode(identity(1), 1, b'{"prompt":"second"}'))
    with open_again(tmp_path) as store:
        assert len(store) == 3 and "1 rows are there twice" in store.mended[0]
        final = store.finish(3)
    assert pq.read_table(final / "data-00000.parquet")["prompt"].to_pylist() == [row_of(index)["prompt"] for index in range(3)]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, monkeypatch, call):
    store = open_again(tmp_path, fsync_rows=4)
    for index in range(4):
        store.append(identity(index), index, row_of(index))
    real, part = getattr(os, call), tmp_path / "parts/part-00000.jsonl"

    def full(descriptor, *data):
        if os.readlink(f"/proc/self/fd/{descriptor}") != str(part):
            return real(descriptor, *data)
        if data and len(data[0]) > 50:
            return real(descriptor, data[0][:50])  # some fits
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        for index in range(4, 7):
            store.append(identity(index), index, row_of(index))
        with pytest.raises(UserError) as caught:
            store.append(identity(7), 7, row_of(7))
    message = str(caught.value)
    assert "no space left" in message and "4 finished rows are kept, the 4 since the last save are asked again" in message
    assert "start the same command again" in message and "\n" not in message
    with pytest.raises(UserError, match="closed"):
        store.append(identity(8), 8, row_of(8))
    store.close()
    assert len(part.read_bytes().splitlines()) == 4
    with open_again(tmp_path) as again:
        assert len(again) == 4 and not again.mended


@pytest.mark.parametrize("what", ["rows", "errors", "progress"])
def test_a_device_that_is_really_full(tmp_path, what):
    store, device = open_again(tmp_path), os.open("/dev/full", os.O_WRONLY)
    store.append(identity(0), 0, row_of(0))
    if what == "progress":
        (tmp_path / "progress.json.tmp").symlink_to("/dev/full")
    else:
        os.dup2(device, store._errors if what == "errors" else store._writer._descriptor)
    os.close(device)
    with pytest.raises(UserError, match=r"no space left.*0 finished rows are kept, the 1 since"), store:
        if what == "errors":
            store.error(identity(1), 1, "why", 1)
        elif what == "progress":
            store.progress({})


LIMITED = """
import sys
from components.store import Store
from store_worker import SPACE, identity, row_of
with Store.open(sys.argv[1], space=SPACE, fsync_rows=8) as store:
    for index in range(1000):
        store.append(identity(index), index, row_of(index))
"""


def test_a_real_limit_of_the_system_then_going_on(tmp_path):
    limit = 20_000
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and "no space left" in done.stderr.splitlines()[-1]
    kept = len((tmp_path / "parts/part-00000.jsonl").read_bytes().splitlines())
    assert kept > 50 and kept % 8 == 0 and f"{kept} finished rows are kept" in done.stderr
    with open_again(tmp_path) as store:
        assert len(store) == kept and not store.mended


def test_a_full_disk_at_the_end_leaves_the_rows(tmp_path, monkeypatch):
    fill(tmp_path, range(5))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store.open(tmp_path, space=SPACE) as store:
        monkeypatch.setattr("components.store.finish.write_parquet", full)
        with pytest.raises(UserError, match=r"no space left.*5 finished rows are kept"):
            store.finish(5)
        assert not (tmp_path / "final").exists() and not (tmp_path / "final.partial").exists()
        monkeypatch.undo()
        assert json.loads((store.finish(5) / "_SUCCESS").read_text())["rows"] == 5
