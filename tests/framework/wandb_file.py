"""Reads `.wandb` files of offline runs: W&B's own record messages in LevelDB's framing (W&B 0.31 has no Python reader any more)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Every record of one file, in order."""
    data, at, parts = path.read_bytes(), FILE_HEADER, b""
    assert data[:4] == b":W&B"
    while at + RECORD_HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < RECORD_HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + RECORD_HEADER])
        at += RECORD_HEADER
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def key_of(item: Any) -> str:
    """Name of a history, config or summary item."""
    return item.key or "/".join(item.nested_key)


def history(path: Path) -> list[dict[str, float]]:
    """Rows as logged, with 'step'; W&B's own keys left out."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            values = {key_of(item): json.loads(item.value_json) for item in record.history.item}
            step = values.get("_step", record.history.step.num)
            rows.append({"step": float(step), **{k: v for k, v in values.items() if not k.startswith("_")}})
    return rows


def files(run_dir: Path) -> list[Path]:
    """The `.wandb` files of a run and its continuations, oldest first."""
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
