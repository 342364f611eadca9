"""Runs a program that nobody has read, in a process of its own with limits, and says how it ended.

Guards against accidents of generated code, not against an attacker: who distrusts a model runs all of Patchbay in a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 60.0  # for the interpreter to start, which a loaded machine may need; the program's own time counts from there
NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000  # CLONE_NEWUSER, NEWNET, NEWPID, NEWIPC (linux/sched.h)
FILE_BYTES = 4 << 20  # of one file
MOST_FILES = 64  # opened for writing
PROCESSES = 32  # and threads; the kernel exempts root
DESCRIPTORS = 64

Status = Literal["passed", "failed", "timeout", "error"]
STATUSES: tuple[Status, ...] = ("passed", "failed", "timeout", "error")


@dataclass(frozen=True)
class Outcome:
    """How a program ended. passed: it came to its end; failed: an assertion did not hold; timeout; error: anything else, see detail.

    isolation: what keeps it from the network, in words. seconds: of the program, its start not counted.
    """

    status: Status
    detail: str
    isolation: str
    seconds: float


def run_python(program: str, timeout_seconds: float, memory_mb: int) -> Outcome:
    """Run a program in Python's isolated mode, in an empty folder that is removed afterwards, without input, and drop what it prints.

    Limits: timeout_seconds of time and a little more of CPU; memory_mb MiB of address space; 64 files of 4 MiB; 32 processes, though the
    kernel exempts root. In Python the program is refused further processes, sockets, and changes outside its folder. It has network,
    process and user namespaces of its own where the kernel permits, so that code below Python is cut off as well.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as home, contextlib.ExitStack() as stack:
        folder = Path(home) / "work"
        folder.mkdir()
        (Path(home) / "program.py").write_text(program, encoding="utf-8", errors="surrogatepass")
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        limits = {
            "out": writing, "namespaces": NAMESPACES, "most_files": MOST_FILES, "cpu_seconds": int(timeout_seconds) + 2,
            "memory_bytes": memory_mb << 20, "file_bytes": FILE_BYTES, "processes": PROCESSES, "files": DESCRIPTORS,
        }  # fmt: skip
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
                       "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD), str(Path(home) / "program.py"), json.dumps(limits)],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        try:
            return _watch(reading, timeout_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _watch(reading: int, timeout_seconds: float) -> Outcome:
    """What the child says on its descriptor, or that it said nothing."""
    first = _line(reading, START_SECONDS)
    if not isinstance(first, dict):
        return Outcome("error", "the interpreter did not start", "none", 0.0)
    isolation, began = str(first.get("isolation")), time.monotonic()
    found = _line(reading, timeout_seconds)
    seconds = time.monotonic() - began
    if found == "late":
        return Outcome("timeout", f"more than {timeout_seconds:g} s", isolation, seconds)
    if not isinstance(found, dict) or found.get("status") not in STATUSES:
        return Outcome("error", "the process ended before the program did", isolation, seconds)
    return Outcome(found["status"], str(found.get("detail")), isolation, seconds)


def _line(reading: int, seconds: float) -> Any:
    """The next JSON line of a pipe; "late" where none came in time, None at its end or for anything else than JSON."""
    end, said = time.monotonic() + seconds, b""
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return "late"
        piece = os.read(reading, 1)  # a line is short; the next one must stay in the pipe
        if not piece:
            return None
        said += piece
    try:
        return json.loads(said)
    except ValueError:
        return None
