"""How a job stands: one record for the console, progress.json and the tracking service."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

import numpy as np

LATENCIES = 1000  # of the last answers, for the percentiles
RECENT_SECONDS = 60.0  # span of the rates


class Meter:
    """Counts what comes in and says how fast it does. Rates are of the last minute; nothing grows with the number of rows."""

    def __init__(self, total: int | None, done: int) -> None:
        """total: requests, None where unknown; done: rows of earlier runs."""
        self.total, self.before = total, done
        self.rows = self.prompt_tokens = self.completion_tokens = self.in_flight = self.retries = 0
        self.errors: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._began = time.monotonic()
        self._marks: deque[tuple[float, int, int, int]] = deque([(self._began, 0, 0, 0)])

    def answered(self, prompt_tokens: int, completion_tokens: int, seconds: float | None) -> None:
        """A row came in."""
        self.rows += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        if seconds is not None:
            self._latencies.append(seconds)

    def record(self) -> dict[str, Any]:
        """Call it every few seconds. Rates are per second, latencies and eta_s in seconds, None while unknown."""
        now = time.monotonic()
        self._marks.append((now, self.rows, self.prompt_tokens, self.completion_tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] >= RECENT_SECONDS:
            self._marks.popleft()
        since, *counts = self._marks[0]
        seconds = max(now - since, 1e-9)
        rows, prompt, completion = (
            (new - old) / seconds for new, old in zip((self.rows, self.prompt_tokens, self.completion_tokens), counts, strict=True)
        )
        done = self.before + self.rows
        p50, p95 = (float(value) for value in np.percentile(self._latencies, [50, 95])) if self._latencies else (None, None)
        left = None if self.total is None else self.total - done
        return {
            "time": time.time(),
            "done": done,
            "total": self.total,
            "rows_per_second": rows,
            "prompt_tokens_per_second": prompt,
            "completion_tokens_per_second": completion,
            "latency_p50_s": p50,
            "latency_p95_s": p95,
            "in_flight": self.in_flight,
            "retries": self.retries,
            "errors": dict(self.errors),
            "seconds": now - self._began,
            "eta_s": left / rows if left is not None and rows > 0 else None,
        }
