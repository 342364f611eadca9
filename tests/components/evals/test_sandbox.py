"""Programs in the sandbox: how each end is told apart, and that bombs, sockets and stray processes are contained."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from components.evals import sandbox
from components.evals.sandbox import Outcome, run_python


def run(program: str, seconds: float = 3.0) -> Outcome:
    return run_python(program, timeout_seconds=seconds, memory_mb=256)


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("x = 1 + 1", "passed", ""),
        ("assert 1 == 2, 'not equal'", "failed", "not equal"),
        ("1 / 0", "error", "ZeroDivisionError"),
        ("def f(:", "error", "SyntaxError"),
        ("import sys; sys.exit(0)", "error", "SystemExit"),  # a program that leaves before its tests has not passed
        ("import os; os._exit(0)", "error", "ended before"),
        ("import ctypes; ctypes.string_at(0)", "error", "ended before"),
        ("input()", "error", "EOFError"),
        ("print('x' * 10_000_000)", "passed", ""),
        ("x = '\\ud800'; x.encode()", "error", "UnicodeEncodeError"),
        ("import json, os; json.dumps = os.write = None", "passed", ""),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1", "passed", ""),
    ],
)
def test_ends_are_told_apart(program, status, detail):
    outcome = run(program)
    assert outcome.status == status and detail in outcome.detail, outcome


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(600)", "try:\n while True: pass\nfinally:\n while True: pass"]
)
def test_endless_programs_time_out(program):
    outcome = run(program, seconds=0.3)
    assert outcome.status == "timeout" and outcome.detail == "more than 0.3 s" and outcome.seconds >= 0.3


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("x = [0] * (1 << 30)", "MemoryError"),
        ("parts = []\nwhile True: parts.append(bytearray(1 << 20))", "MemoryError"),
        ("import os\nwhile True: os.fork()", "os.fork is not allowed"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen is not allowed"),
        ("import os; os.system('true')", "os.system is not allowed"),
        ("import os; os.kill(os.getppid(), 9)", "os.kill is not allowed"),
        ("open('big', 'wb').write(bytes(64 << 20))", "File too large"),
        ("for i in range(10**6): open(str(i), 'w').write('x')", "more than 64 files"),
        (
            "import threading, time\nfor i in range(10**4): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
            "new thread",
        ),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "is not allowed"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "is not allowed"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", "not allowed to raise"),
    ],
)
def test_bombs_are_contained(program, detail):
    outcome = run(program)
    assert outcome.status == "error" and detail in outcome.detail, outcome


def test_files_outside_the_working_folder_stay_as_they_are(tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    for words in ("open({0!r}, 'w')", "os.remove({0!r})", "shutil.rmtree({1!r})", "os.rename({0!r}, 'here')", "os.chmod({0!r}, 0)",
                  "open('a', 'w').close(); os.rename('a', {0!r})", "os.symlink({0!r}, 'a'); open('a', 'w')", "os.mkdir({1!r} + '/new')",
                  "os.remove('kept.txt', dir_fd=os.open({1!r}, os.O_RDONLY))", "os.truncate({0!r}, 0)", "os.link({0!r}, 'a')"):  # fmt: skip
        outcome = run("import os, shutil\n" + words.format(str(kept), str(tmp_path)))
        assert outcome.status == "error" and "PermissionError" in outcome.detail, (words, outcome)
    assert kept.read_text() == "kept" and os.access(kept, os.R_OK) and list(tmp_path.iterdir()) == [kept]


def test_the_working_folder_can_be_used():
    program = """
import os, tempfile
with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, 'a'), 'w') as file:
    file.write('x')
    file.flush()
    assert open(file.name).read() == 'x'
with tempfile.TemporaryFile('w') as file:
    file.write('x')
open('a', 'w').write('x')
os.rename('a', 'b')
assert os.listdir('.') == ['b']
"""
    outcome = run(program)
    assert outcome.status == "passed", outcome


def test_nothing_is_inherited_and_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_KEY", "xyz")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os, sys
assert 'SECRET_KEY' not in os.environ and os.listdir('.') == [] and sys.flags.isolated
open('left', 'w').write('x')
"""
    outcome = run(program)
    assert outcome.status == "passed", outcome
    assert list(tmp_path.iterdir()) == []


CONNECT = """
import ctypes, struct
library = ctypes.CDLL(None, use_errno=True)
end = library.socket(2, 1, 0)
address = struct.pack('<H', 2) + struct.pack('>H', {port}) + bytes([127, 0, 0, 1]) + bytes(8)
assert end >= 0 and library.connect(end, address, 16) == 0, ctypes.get_errno()
"""


def has_namespaces() -> bool:
    return run("pass").isolation.startswith("own network")


def test_below_python_there_is_no_network_either():
    """A connection that no audit hook sees, to a server of this test: it comes through outside the sandbox alone."""
    if not has_namespaces():
        pytest.skip("the kernel permits no user namespaces here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = CONNECT.format(port=server.getsockname()[1])
        outcome = run(program)
        assert outcome.status == "failed", outcome
        exec(program, {})  # the same words work here
        server.settimeout(5)
        server.accept()


def names_of_processes():
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(path.read_text().strip())
    return found


def test_processes_below_python_end_with_the_program(tmp_path):
    """A grandchild that left its session would go on writing; `marker` is inherited by nothing else."""
    if not has_namespaces():
        pytest.skip("the kernel permits no user namespaces here")
    marker = f"stray-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
import ctypes, time
library = ctypes.CDLL(None)
if library.fork() == 0:
    library.setsid()
    library.prctl(15, b{marker[-15:]!r}, 0, 0, 0)
    time.sleep(600)
time.sleep(0.1)
"""
    assert run(program).status == "passed"
    until = time.monotonic() + 30  # the kernel ends the rest of a namespace soon, not at once
    while marker[-15:] in names_of_processes():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_without_namespaces_python_refuses_and_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "NAMESPACES", 1)  # a flag that unshare does not know
    outcome = run("import socket; socket.create_connection(('127.0.0.1', 9))")
    assert outcome.isolation == "no namespaces here (EINVAL), so sockets and processes are refused in Python only"
    assert outcome.status == "error" and "is not allowed" in outcome.detail
    assert run("assert True").status == "passed" and run("while True: pass", 0.3).status == "timeout"
