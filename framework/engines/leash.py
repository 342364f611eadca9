"""`python -m framework.engines.leash COMMAND ...`: run a command that ends when whoever started this does, however that ends.

It watches its standard input, which closes with the other end of the pipe, also by SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

STOP_SECONDS = 10.0


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and its session, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main(command: list[str]) -> int:
    """Run it; returns its exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would outlive this thread
            pass
        end(child)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: end(child))
    code = child.wait()
    end(child)  # what it left behind in its session
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
