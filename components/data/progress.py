"""Progress on stderr: a rich bar on a terminal, one plain line elsewhere, nothing for work that is over at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_SECONDS = 1.0  # work shorter than this shows nothing outside a terminal


def note(message: str) -> None:
    """Print one line on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of bytes done since its last call."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total_bytes)
            yield lambda n: bar.advance(task, n)
        return
    start, told = time.monotonic(), False

    def advance(n: int) -> None:
        nonlocal told
        if not told and time.monotonic() - start > QUIET_SECONDS:
            note(f"{label} {total_bytes / 1e6:.1f} MB ...")
            told = True

    yield advance
    if told:
        note(f"{label} took {time.monotonic() - start:.1f} s")
