"""The inside of the sandbox: `python -I sandbox_child.py PROGRAM LIMITS`. Run as a file, in a process of its own; imports the library only.

It writes two JSON lines to the descriptor of LIMITS: {"isolation": ...} before the program begins and {"status", "detail"} after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
import types
from typing import Any

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
REFUSED = (
    "socket.",
    "os.fork",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.kill",
    "pty.",
    "subprocess.",
    "signal.pthread_kill",
)
CHANGES = {  # audit events that change files: where in their arguments paths stand, and the descriptors of folders that paths start from
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),),
}  # fmt: skip


def isolate(namespaces: int) -> str:
    """Leave the user's network, processes and rights, if the kernel permits. namespaces: flags CLONE_NEW*. Returns in words what holds."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare") or library.unshare(namespaces):
        reason = errno.errorcode.get(ctypes.get_errno(), "not Linux")
        return f"no namespaces here ({reason}), so sockets and processes are refused in Python only"
    child = os.fork()  # the first process of the new namespace; when it ends, all others in it do
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(0 if status == 0 else 1)
    library.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    return "own network, process and user namespaces"


def limit(cpu_seconds: int, memory_bytes: int, file_bytes: int, processes: int, files: int) -> None:
    """Hard limits, which the program cannot raise."""
    wanted = {
        resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: processes, resource.RLIMIT_NOFILE: files, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for kind, value in wanted.items():
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an OSError


def guard(folder: str, most_files: int) -> None:
    """Refuse sockets, processes, signals, and changes outside `folder`; at most `most_files` are opened for writing."""
    folder, written = os.path.realpath(folder), 0

    def inside(path: Any, start: int = -1) -> bool:
        with contextlib.suppress(TypeError, ValueError, OSError):
            place = f"/proc/self/fd/{path}" if isinstance(path, int) else os.fsdecode(path)
            before = "" if start < 0 else f"/proc/self/fd/{start}"
            return f"{os.path.realpath(os.path.join(before, place))}/".startswith(f"{folder}/")
        return False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal written
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        for path, start in CHANGES.get(event, ()):
            if not inside(args[path], -1 if start is None else args[start]):
                raise PermissionError(f"{event} is allowed in the working folder only")
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written += 1
            if args[0] != os.devnull and not isinstance(args[0], int) and not inside(args[0]):
                raise PermissionError(f"{args[0]!s:.80} cannot be written; the working folder alone can")
            if written > most_files:
                raise PermissionError(f"more than {most_files} files were opened for writing")

    sys.addaudithook(hook)


def run(program: str) -> dict[str, str]:
    """Execute a program; passed: to its end, failed: an assertion did not hold, error: anything else."""
    module = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except AssertionError as error:
        return {"status": "failed", "detail": f"AssertionError {error}".strip()}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a program that ends itself has not passed
        return {"status": "error", "detail": f"{type(error).__name__}: {error}"}
    return {"status": "passed", "detail": ""}


def main(path: str, limits: dict[str, int]) -> None:
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        program = file.read()
    out, most_files = limits.pop("out"), limits.pop("most_files")
    isolation = isolate(limits.pop("namespaces"))
    limit(**limits)
    guard(os.getcwd(), most_files)
    write, line = os.write, json.dumps  # kept, since the program may replace what the modules hold
    write(out, line({"isolation": isolation}).encode() + b"\n")
    found = run(program)
    found["detail"] = found["detail"][:300]
    write(out, line(found).encode() + b"\n")
    os._exit(0)  # whatever threads and exit handlers the program left


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
