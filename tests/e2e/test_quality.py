"""The default run learns: real text, against the bar and against simple models of the same bytes.

One seed, since each takes minutes; three gave 1.519 bits per byte, with a standard deviation of 0.005 (docs/results.md).
"""

import json

import pytest
from commands import only_run, run, state

BAR = 1.75  # held-out bits per byte
KEYS = (
    "val/loss", "val/bits_per_byte", "baseline/order0_bits_per_byte", "baseline/order2_bits_per_byte", "baseline/xz_bits_per_byte",
    "perf/tokens_per_second", "tokens", "seconds", "seed",
)  # fmt: skip


@pytest.mark.slow
def test_default_run_reaches_the_bar(tmp_path):
    done = run(tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = only_run(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    print(f"{metrics['val/bits_per_byte']:.4f} bits per byte, {metrics['seconds']:.0f} s")
    assert metrics["val/bits_per_byte"] <= BAR < metrics["baseline/order2_bits_per_byte"]
    assert set(KEYS) <= set(metrics) and metrics["seed"] == 1
    assert state(folder)["status"] == "done"
    assert (folder / "loss.png").stat().st_size > 10_000
    assert "python generate.py" in done.stdout
