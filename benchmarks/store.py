"""The output store of generation jobs: rows/s appended, rows/s scanned on resume, bytes of memory a row, rows/s into the final files.

`python -m benchmarks.store` (about a minute on one CPU core). Rows are what a small answer is: a prompt, a text of some 300 characters and
three numbers. The policy is the store's default: saved every 256 rows. Wall time includes the disk; processor time is beside it, for a
machine that others use too. Numbers to meet, by wall time: 5,000 rows/s appended, 100,000 rows/s scanned; and at most 16 bytes of memory a
finished row beyond the window.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import append_row, environment, table, verdict
from components.store import Store, request_id
from components.store.ids import FRESH

APPENDED, SCANNED, BYTES = 5_000, 100_000, 16  # the numbers to meet
SPACE = {"model": "none"}
TEXT = "The quick brown fox jumps over the lazy dog, and thinks about why. " * 5


def row_of(index: int) -> dict[str, Any]:
    """A row of about 400 bytes."""
    return {"prompt": f"question {index}", "text": TEXT[index % 40 :], "prompt_tokens": 5, "completion_tokens": 80, "logprob": -index / 3}


def resident_bytes() -> int:
    """Resident size of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(run: Callable[[], object], rows: int) -> dict[str, float]:
    """Rows per second of wall and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": rows / (time.perf_counter() - wall), "cpu": rows / (time.process_time() - cpu)}


def appended(store: Store, begin: int, end: int) -> Callable[[], None]:
    """A call that appends the rows begin .. end - 1 and saves them. Naming a request is part of it."""

    def run() -> None:
        for index in range(begin, end):
            store.append(request_id(prompt=f"question {index}", temperature=0.7), index, row_of(index))
        store.commit()

    return run


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Figures of one store of `rows` rows. Memory is compared between two moments at which the window of new ids has just been emptied."""
    begin, end = 2 * FRESH, rows // FRESH * FRESH
    found: dict[str, Any] = {}
    with Store.open(folder, space=SPACE) as store:
        appended(store, 0, begin)()
        before = resident_bytes()
        found["append"] = timed(appended(store, begin, end), end - begin)
        found["growth_bytes"] = resident_bytes() - before
        found["growth_bytes_a_row"] = found["growth_bytes"] / (end - begin)
        appended(store, end, rows)()
    shards = list((folder / "parts").iterdir())
    found["store_bytes"] = sum(shard.stat().st_size for shard in shards)
    found["shards"] = len(shards)
    found["scan"] = timed(lambda: Store.open(folder, space=SPACE).close(), rows)
    with Store.open(folder, space=SPACE) as store:
        found["finish"] = timed(lambda: store.finish(rows), rows)
    return found


def main() -> None:
    """Measure, print the table, write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the folder for temporary files")
    options = parser.parse_args()
    if options.rows < 4 * FRESH:
        parser.error(f"--rows: {options.rows}; at least {4 * FRESH}")
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = measure(folder / "store", options.rows)
    finally:
        shutil.rmtree(folder)
    names = {"append": "append", "scan": "scan on resume", "finish": "final parquet"}
    lines = [[name, *(f"{found[key][clock]:,.0f}" for clock in ("wall", "cpu"))] for key, name in names.items()]
    print(table(["", "rows/s, wall", "rows/s, processor"], lines))
    print(f"append: {verdict(found['append']['wall'], APPENDED, True)}; scan: {verdict(found['scan']['wall'], SCANNED, True)}")
    grown = found["growth_bytes_a_row"]
    print(f"memory: {grown:.2f} bytes more a row ({found['growth_bytes'] / 2**20:.1f} MiB); {verdict(grown, BYTES, False)}")
    row = {**environment("numpy", "pyarrow"), "rows": options.rows, **found}
    print(f"row appended to {append_row('store', row)}")


if __name__ == "__main__":
    main()
