"""A producer without latency that writes a store: `store_worker.py FOLDER ROWS SEED`. The order of answers depends on SEED, rows do not."""

from __future__ import annotations

import random
import resource
import sys

from components.store import Store, request_id

SPACE = {"model": "none", "sampling": {"temperature": 0.5}}
POLICY = {"fsync_rows": 64, "shard_bytes": 100_000}


def row_of(index: int) -> dict:
    row = {"prompt": f"question {index}", "text": "answer " * (index % 7), "tokens": index % 11, "parts": [index, None]}
    return {**row, "score": index / 7} if index % 3 else row


def identity(index: int) -> str:
    return request_id(prompt=f"question {index}")


def shuffled(rows: int, seed: int, window: int = 100):
    """Indices 0 .. rows - 1 as a window of requests would be answered."""
    draw, waiting = random.Random(seed), []
    for index in range(rows):
        waiting.append(index)
        if len(waiting) == window:
            yield waiting.pop(draw.randrange(window))
    draw.shuffle(waiting)
    yield from waiting


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    folder, rows, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with Store.open(folder, space=SPACE, **POLICY) as store:
        for index in shuffled(rows, seed):
            if (name := identity(index)) not in store:
                store.append(name, index, row_of(index))
        store.finish(rows)


if __name__ == "__main__":
    main()
