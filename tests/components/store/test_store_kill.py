"""Kill -9 a real process at random moments: the same final files, nothing lost or doubled; and what a million rows cost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from store_worker import identity
from test_store_finish import final_bytes

from components.store import shards

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"}


def worker(folder, rows, seed):
    return subprocess.Popen([sys.executable, HERE / "store_worker.py", folder, str(rows), str(seed)], env=ENVIRONMENT)


def written(folder):
    return sum(path.stat().st_size for path in shards.shards_in(folder))


def saved(folder):
    """Ids of all whole lines."""
    return [shards.identity_of(line) for path in shards.shards_in(folder) for _, line in shards.scan(path, [])]


def kill_at(process, moment):
    """Kill once `moment()` is true. False: it had ended before."""
    while process.poll() is None:
        if moment():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    return process.wait(timeout=120) == -signal.SIGKILL


def check_kills(tmp_path, rows, kills, seed):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert worker(whole, rows, seed).wait(timeout=300) == 0
    size, draw, hits = written(whole), random.Random(seed), 0
    (killed / "parts").mkdir(parents=True)
    for turn in range(kills):
        before = saved(killed)
        process = worker(killed, rows, seed + turn)
        if turn == kills - 1:
            hits += kill_at(process, (killed / "final.partial").exists)
        elif turn % 5 == 4:  # while it starts or recovers
            end = time.monotonic() + draw.uniform(0, 0.4)
            hits += kill_at(process, lambda end=end: time.monotonic() >= end)
        else:
            goal = written(killed) + draw.uniform(0, 1.2) * size / kills
            hits += kill_at(process, lambda goal=goal: written(killed) > goal)
        after = saved(killed)
        assert after[: len(before)] == before and len(set(after)) == len(after)
    assert hits == kills
    assert worker(killed, rows, seed + kills).wait(timeout=300) == 0
    assert final_bytes(killed) == final_bytes(whole)
    assert sorted(saved(killed)) == sorted(identity(index).encode() for index in range(rows))
    assert pq.read_table(killed / "final")["index"].to_pylist() == list(range(rows))


def test_three_kills(tmp_path):
    check_kills(tmp_path, 5_000, 3, 1)


@pytest.mark.slow
def test_twenty_five_kills(tmp_path):
    check_kills(tmp_path, 100_000, 25, 2)


GROWTH = """
import sys
from components.store import Store, request_id
from store_worker import POLICY, SPACE, resident, row_of
with Store.open(sys.argv[1], space=SPACE) as store:
    for index in range(1_000_000):
        store.append(request_id(prompt=index), index, row_of(index))
        if index == 99_999:
            before = resident()
    after = resident()
    store.finish(1_000_000)
    print(before, after, resident())
"""


@pytest.mark.slow
def test_a_million_rows_in_memory(tmp_path):
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(HERE)])}
    done = subprocess.run([sys.executable, "-c", GROWTH, tmp_path / "store"], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    before, after, finished = map(int, done.stdout.split())
    print(f"grew by {after - before:,} bytes over 0.9M rows, {(after - before) / 9e5:.1f} a row; after finish {finished - before:,}")
    assert after - before < 9e5 * 16 + 20e6  # 16 bytes a row, and the window: 65,536 digests of about 100 bytes, 4 MB of rows, slack
    assert finished - before < 300e6
