"""Greedy tokens of the native engine, whose rows share slots, against transformers' `generate` of each prompt alone."""

import pytest

from benchmarks import engine as bench
from components.contracts import SamplingParams
from framework.engines.native import NativeEngine


@pytest.mark.parametrize("max_batch", [1, 5])
def test_greedy_tokens_equal_transformers(max_batch, tmp_path):
    pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")
    model, jobs = bench.models()["phi4mini"], [(prompt, min(tokens, 24)) for prompt, tokens in bench.requests(9, seed=1)]
    bench.export(model, tmp_path)
    _, alone = bench.transformers_sides(tmp_path, jobs)
    expected = alone()
    params = [SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True) for _, tokens in jobs]
    native = NativeEngine(model, bench.Ids(), max_batch=max_batch, prefill_chunk=64)
    assert [completion.token_ids for completion in native.generate([prompt for prompt, _ in jobs], params)] == expected
    assert [len(ids) for ids in expected] == [tokens for _, tokens in jobs] and len({tuple(ids[:3]) for ids in expected}) > 5
