"""Processes of test_kills_over_http.py: `http_worker.py serve PORT`, and `http_worker.py nest PORT ROWS`.

The server says what a request's seed decides, after a moment. It is no model. The nest has imported everything and forks a process for
each folder that it reads, so that a start costs no import: it prints the process's id, and its exit code once it has ended.
"""

from __future__ import annotations

import os
import sys
import time

from hostile import Server, honest

DELAY = 0.004  # seconds of an answer


def serve(port: int) -> None:
    def answer(path, body, number):
        time.sleep(DELAY)
        return honest(path, body, number)

    Server(answer, port).serve_forever(0.01)


def requests(rows: int):
    """(index, request) of a job."""
    from components.contracts import Request, SamplingParams
    from components.store import request_id

    for index in range(rows):
        prompt = f"prompt {index}"
        yield index, Request(request_id(prompt=prompt), prompt, SamplingParams(max_new_tokens=4, seed=index), 1 + index % 3)


def nest(port: int, rows: int) -> None:
    import framework.engines.openai
    import framework.jobs  # noqa: F401

    for line in sys.stdin:
        if (child := os.fork()) == 0:
            code = 1
            try:
                ask(port, line.strip(), rows)
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def ask(port: int, folder: str, rows: int) -> None:
    from components.data.tokenizers import bytes_tokenizer
    from components.store import Store
    from framework.engines.openai import OpenAIEngine
    from framework.engines.requests import Breaker, Retry
    from framework.jobs import run_job

    url = f"http://127.0.0.1:{port}/v1"
    engine = OpenAIEngine(bytes_tokenizer(), url, None, "NO_SUCH_KEY", None, 16, 30.0, Retry(100, 0.05, 0.5), Breaker(1000, 1.0, 1.0, 100))
    with Store.open(folder, space={}, fsync_rows=8, shard_bytes=50_000) as store:
        run_job(requests(rows), engine, store, concurrency=16, max_attempts=3, grace_s=5.0, progress_s=1.0, total=rows)
        store.finish(rows)


if __name__ == "__main__":
    {"serve": serve, "nest": nest}[sys.argv[1]](*map(int, sys.argv[2:]))
