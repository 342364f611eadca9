"""Small real runs for the tests of training: composed from conf/, in this process, on a few kB of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from framework.build import compose
from framework.checkpoint import FOLDER
from framework.logging import read_rows
from framework.train import train

EXACT = ("step", "tokens", "train/loss", "opt/grad_norm", "val/loss", "val/bits_per_byte")  # all but the clock's figures
BATCH_TOKENS = 4 * 32


class Killed(BaseException):
    """Stands for sudden death: no handler of ours catches it."""


def config(folder: Path, *overrides: str, train_bytes: int = 4000) -> Any:
    """A run of 12 steps of 4 rows of 32 bytes at size test; checkpoints every 4 steps, validation at the end."""
    text, held_out = folder / "train.txt", folder / "val.txt"
    for path, size, start in ((text, train_bytes, 0), (held_out, 300, 5000)):
        line = "".join(f"{i} times {i} is {i * i}. " for i in range(start, start + size))
        path.write_text(line[:size])
    return compose(
        "train",
        [
            "model/size=test", "data=text", f"data.path={text}", f"data.val_path={held_out}", "data.tokenizer.kind=bytes",
            "data.tokenizer.vocab_size=300", "data.seq_len=32", "data.batch_size=4", "trainer.max_steps=12", "checkpoint.every_steps=4",
            "validate.every_steps=100", "samples.every_steps=0", "logger=none", f"paths.cache_dir={folder / 'cache'}", *overrides,
        ],
    )  # fmt: skip


def final_state(run: Path, step: int = 12) -> dict[str, Any]:
    """The checkpoint of a step."""
    return torch.load(run / FOLDER / f"step{step:06d}.ckpt", weights_only=True)


def loader_state(checkpoint: dict[str, Any]) -> Any:
    """Place in the data that a checkpoint goes on from."""
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return state


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def history(run: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv without the clock's figures."""
    return [{key: row[key] for key in row if key in EXACT or key.startswith("opt/")} for row in read_rows(run)]


def assert_same_run(first: Path, second: Path) -> None:
    """Both runs wrote the same history and ended in the same state, bit for bit."""
    assert history(first) == history(second)
    a, b = final_state(first), final_state(second)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step"):
        assert same(a[key], b[key]), key
    assert same(a["callbacks"].get("Ema"), b["callbacks"].get("Ema"))
    assert same(loader_state(a), loader_state(b))


__all__ = ["BATCH_TOKENS", "Killed", "assert_same_run", "config", "final_state", "history", "same", "train"]
