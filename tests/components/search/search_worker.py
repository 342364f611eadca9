"""A search in a process of its own, to be killed: python search_worker.py FOLDER. It notes every call of its objective in FOLDER/calls."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np

from components.search.evolution import search
from tests.components.search.settings import make_evolution, make_space

SPACE = make_space(rotary_dim=32, base=10000.0, original_len=1024, factor=8.0)
EVOLUTION = make_evolution(population=24, iterations=6, parents=10, mutations=6, crossovers=6, seed=3, r_moves=0.2)
SECONDS = 0.004  # of one evaluation


def name(factors) -> str:
    return hashlib.sha256(np.asarray(factors, dtype=np.float64).tobytes()).hexdigest()[:16]


def run(folder: Path, seconds: float = SECONDS) -> None:
    """Search, and save FOLDER/result.json."""
    calls = os.open(folder / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def objective(factors, r):
        os.write(calls, f"{name(factors)}\n".encode())
        time.sleep(seconds)
        if name(factors).startswith("0"):  # about one in sixteen fails
            raise RuntimeError("out of memory")
        return float(np.square(np.log(factors / 11.0)).mean() + 0.01 * (r - 7) ** 2)

    search(objective, SPACE, EVOLUTION, folder / "log.jsonl", provenance={"documents": "abc"}).save(folder / "result.json")
    os.close(calls)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
