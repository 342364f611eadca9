"""Crash-safe output of large generation jobs: at-least-once execution, exactly-once rows.

A folder holds `parts/part-00000.jsonl` (append-only, one checked line a row), `manifest.json` (what is asked, full shards), `errors.jsonl`
(failed attempts), `progress.json`, and once all is done `final/data-00000.parquet` with `final/_SUCCESS`.
"""

from components.store.ids import count_distinct as count_distinct
from components.store.ids import request_id as request_id
from components.store.progress import Meter as Meter
from components.store.store import Store as Store
from components.store.store import stored as stored
