"""A vLLM server that is killed while it answers: it is started again, and nothing is lost or doubled."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from engines import DRAWN, opened
from test_conformance import prompts

from components.contracts import Request
from framework.engines.requests import each_of

pytestmark = pytest.mark.vllm


def test_killed_in_the_middle(tmp_path):
    with opened("vllm", tmp_path) as engine:
        requests = [Request(str(i), ids, replace(DRAWN, seed=i, max_new_tokens=160)) for i, ids in enumerate(prompts((3, 9, 17, 31) * 10))]

        async def collect(kill_after):
            results = []
            async for result in engine.stream(each_of(requests), concurrency=8):
                results.append(result)
                if len(results) == kill_after:
                    leash = engine._process.pid
                    (server,) = Path(f"/proc/{leash}/task/{leash}/children").read_text().split()
                    os.kill(int(server), signal.SIGKILL)
            return results

        killed = asyncio.run(collect(10))
        assert engine.restarts == 2 and engine.counts["connection"] > 0
        whole = asyncio.run(collect(None))
        assert engine.restarts == 2
    assert sorted(r.request_id for r in killed) == sorted(r.id for r in requests)
    texts = [{r.request_id: [one.text for one in r.completions] for r in results} for results in (killed, whole)]
    assert all(result.error is None for result in killed) and texts[0] == texts[1]
