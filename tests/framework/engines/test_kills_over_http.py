"""Kill -9 a job that asks a server over HTTP at random moments, and once the server itself: the same final files to the last byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from http_worker import requests

from components.store import shards
from framework.engines.vllm import free_port

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)]), "OMP_NUM_THREADS": "1"}
PATIENCE = 600  # seconds


def start(*words, **options):
    command = [sys.executable, HERE / "http_worker.py", *map(str, words)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, **options)


class Nest:
    """Starts processes of the job one after the other."""

    def __init__(self, port, rows):
        self.process = start("nest", port, rows, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, folder):
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        self.job = int(self.process.stdout.readline())

    def lives(self):
        try:
            os.kill(self.job, 0)
        except ProcessLookupError:
            return False
        return True

    def reaches(self, condition):
        """Whether it came true while the job lived."""
        until = time.monotonic() + PATIENCE
        while self.lives() and time.monotonic() < until:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def kill(self):
        """Its exit code."""
        os.kill(self.job, signal.SIGKILL)
        return self.ended()

    def ended(self):
        """Its exit code, when it has one."""
        return int(self.process.stdout.readline())


def serve(port):
    process, until = start("serve", port), time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
            return process
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the server does not start")


@contextmanager
def serving(port, rows):
    """A list with the server's process, which may be replaced, and the nest."""
    servers, nest = [serve(port)], Nest(port, rows)
    try:
        yield servers, nest
    finally:
        for process in (*servers, nest.process):
            process.kill()
            process.wait()


def saved(folder):
    """Ids of all whole lines."""
    return [shards.identity_of(line) for path in shards.shards_in(folder) for _, line in shards.scan(path, [])]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "final").iterdir())}


def check_kills(tmp_path, rows, kills, seed):
    """kills: of the job and, one in the middle of them, of the server, which the job that asks it outlives."""
    draw, port, hits = random.Random(seed), free_port(), []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with serving(port, rows) as (servers, nest):
        nest.begin(whole)
        assert nest.ended() == 0
        (killed / "parts").mkdir(parents=True)
        while len(hits) < kills:
            before = saved(killed)
            goal = len(before) + draw.uniform(0, 1.5) * (rows - len(before)) / (kills - len(hits) + 1)
            nest.begin(killed)
            assert nest.reaches(lambda goal=goal: len(saved(killed)) > goal), "it ended before it was killed"
            if len(hits) == kills // 2:
                servers[-1].kill()
                servers[-1].wait()
                hits.append("server")
                held = len(saved(killed))
                servers.append(serve(port))
                assert nest.reaches(lambda held=held: len(saved(killed)) > held + 32), "the job did not outlive its server"
            assert nest.kill() == -signal.SIGKILL
            hits.append("job")
            after = saved(killed)
            assert after[: len(before)] == before and len(set(after)) == len(after)
        nest.begin(killed)
        assert nest.ended() == 0
    assert hits.count("server") == 1 and bytes_of(killed) == bytes_of(whole)
    assert sorted(saved(killed)) == sorted(request.id.encode() for _, request in requests(rows))
    assert pq.read_table(killed / "final")["index"].to_pylist() == list(range(rows))


@pytest.mark.slow
def test_twenty_five_kills_one_of_them_of_the_server(tmp_path):
    check_kills(tmp_path, 6_000, 25, 3)
