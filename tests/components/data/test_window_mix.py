"""Rows of two windows in one stream: shares exact, short rows equal their windows alone in every model, long rows are one text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from components.contracts import Batch, RopeRegime, RopeSpec, UserError
from components.data.window_mix import WindowMix
from tests.components.data.test_data_options import text_data
from tests.components.models.conftest import MODELS, build, lively, random_ids

SHORT, LONG = 16, 48
PROSE = "".join(f"Line {i} says that {i * i} is the square of {i}.\n" for i in range(400))


@pytest.fixture
def stream(tmp_path):
    """stream(share, seed=1, **changes): of the text in rows of 48 tokens, short windows of 16."""
    (tmp_path / "text.txt").write_text(PROSE)

    def make(share: float, seed: int = 1, **changes):
        mix = {"short_len": SHORT, "long_share": share}
        data = text_data(str(tmp_path / "text.txt"), seq_len=LONG, batch_size=4, window_mix=mix, **changes)
        data.prepare(tmp_path / "cache")
        return data.train_stream(seed)

    return make


def epoch_of(stream) -> list[Batch]:
    return [stream.batch(0, i) for i in range(len(stream))]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_is_exact_and_the_text_is_the_same(stream, share):
    mixed, plain = epoch_of(stream(share)), epoch_of(stream(0.0))
    regimes = torch.cat([batch.rope_regime for batch in mixed])
    assert regimes.sum() == round(share * len(regimes)) and regimes.dtype == torch.int8
    for batch, other in zip(mixed, plain, strict=True):
        assert torch.equal(batch.input_ids, other.input_ids) and torch.equal(batch.labels, other.labels)
        assert batch.loss_tokens == other.loss_tokens


def test_the_rows_follow_the_seed_and_the_epoch_alone(stream):
    one, same, other = (stream(0.5, seed) for seed in (1, 1, 2))
    kinds = [[s.batch(epoch, i).rope_regime.tolist() for i in range(len(s))] for s, epoch in ((one, 0), (same, 0), (other, 0), (one, 1))]
    assert kinds[0] == kinds[1] and kinds[0] != kinds[2] and kinds[0] != kinds[3]
    skipped = next(iter(same))  # a stream that stands elsewhere gives the same batch for a place
    assert torch.equal(skipped.segment_ids, one.batch(0, 0).segment_ids)


def test_windows_by_hand():
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]] * 2, dtype=torch.int32)
    batch = Batch(torch.arange(16).view(2, 8), segment_ids=segments, position_ids=torch.zeros(2, 8, dtype=torch.int64))
    mixed = WindowMix(4, 0.5).apply(batch, np.array([False, True]))
    assert mixed.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0] * 8]
    assert mixed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1], list(range(8))]
    assert mixed.rope_regime.tolist() == [0, 1]
    assert WindowMix(4, 0.5).apply(Batch(batch.input_ids), np.array([False, True])).segment_ids.tolist() == [[0] * 4 + [1] * 4, [0] * 8]


@pytest.mark.parametrize("name", MODELS)
def test_a_short_row_equals_its_windows_alone_and_a_long_row_one_text(name):
    """By attention and by the memory of recurrent layers, each row in its own RoPE regime."""
    model = lively(build(name, window=40)).eval().double()
    rotary = model.rope_spec.rotary_dim
    regimes = (RopeRegime(upto=SHORT), RopeRegime(tuple(2.0 + i for i in range(rotary // 2)), 1.2))
    two = RopeSpec(rotary, regimes=regimes, original_len=SHORT)
    model.set_rope(two)
    ids = random_ids(2, LONG)
    documents = torch.tensor([[0] * 10 + [1] * 38] * 2, dtype=torch.int32)  # windows of 10, 16, 16 and 6
    mixed = WindowMix(SHORT, 0.5).apply(Batch(ids, segment_ids=documents), np.array([False, True]))
    with torch.no_grad():
        both = model(mixed).hidden
        alone = torch.cat([model(Batch(piece)).hidden for piece in ids[:1].split([10, 16, 16, 6], dim=1)], dim=1)
        model.set_rope(replace(two, regimes=two.regimes[1:]))
        long = model(Batch(ids[1:])).hidden
    assert (both[:1] - alone).abs().max() <= 1e-12 * alone.abs().max()
    assert (both[1:] - long).abs().max() <= 1e-12 * long.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_len": 16}, "data.window_mix: has short_len; it needs short_len and long_share"),
        ({"short_len": 16, "long_share": 0.5, "x": 1}, "data.window_mix: has short_len, long_share, x"),
        ({"short_len": 1, "long_share": 0.5}, "data.window_mix.short_len: 1"),
        ({"short_len": 16, "long_share": 1.5}, "data.window_mix.long_share: 1.5; allowed is a share"),
        ({"short_len": 16, "long_share": True}, "data.window_mix.long_share: True"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        WindowMix.of(options)
