"""Probes of several facts: every question can be answered from the text, by whoever reads it, and by the text alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from components.contracts import IGNORE, UserError
from components.data.pairs import SHORTEST, chain, pairs
from components.data.synthetic import SyntheticData, draw

BYTES = {"kind": "bytes", "vocab_size": 300, "path": None}


def data_of(tmp_path: Path, **changes) -> SyntheticData:
    options = {
        "kind": "pairs", "length": 191, "shortest": None, "train_documents": 24, "val_documents": 4, "seed": 0, "loss_on": "all",
        "prompt_share": 1.0,
        "tokenizer": BYTES, "seq_len": 192, "batch_size": 2, "eval_lengths": [64, 191], "eval_documents": 3, "num_workers": 0,
        "window_mix": None,
    }  # fmt: skip
    data = SyntheticData(**{**options, **changes})
    data.prepare(tmp_path / "cache")
    return data


@pytest.mark.parametrize("length", [SHORTEST, 127, 1000])
def test_every_question_is_about_a_fact_of_the_text(length):
    depths = []
    for prompt, answer in draw(pairs, length, 50, seed=2):
        whole = prompt + answer
        assert len(whole) == length
        facts = dict(re.findall(r"#([A-Z])(\d)", whole))
        asked = re.findall(r"\?([A-Z])(\d)", whole)
        assert len(facts) == 6 and sorted(facts.items()) == sorted(asked) and asked[-1][1] == answer
        assert all(whole.index(f"#{key}{digit}") < whole.index(f"?{key}{digit}") for key, digit in facts.items())
        assert whole.index("?") > length / 4
        depths.append(prompt.index(f"#{asked[-1][0]}") / length)
    assert min(depths) < 0.2 and max(depths) > 0.4


def test_the_text_between_has_the_entropy_of_its_chain():
    text = chain(np.random.Generator(np.random.PCG64(5)), 60_000)
    both, first = Counter(pairwise(text)), Counter(text[:-1])
    conditional = -sum(n / (len(text) - 1) * math.log(n / first[a]) for (a, _), n in both.items())
    assert conditional <= -sum(p * math.log(p) for p in (0.55, 0.25, 0.15, 0.05)) + 0.01  # successors that coincide lower it
    assert conditional > 1.0 and len(first) == 16


def test_prompts_and_answers_are_measured_apart(tmp_path):
    data = data_of(tmp_path)
    sets = data.evaluations()
    assert list(sets) == ["length_64", "prompt_64", "length_191", "prompt_191"]
    for answers, prompts in zip(sets["length_191"], sets["prompt_191"], strict=True):
        assert torch.equal(answers.input_ids, prompts.input_ids)
        for ids, last, rest in zip(answers.input_ids, answers.labels, prompts.labels, strict=True):
            digits = chr(int(last[-1]))
            assert (last != IGNORE).sum() == 1 and digits.isdigit()
            text = data.tokenizer.decode(ids[1:].tolist()) + digits
            left_out = [i for i in range(191) if rest[i] == IGNORE]
            assert left_out == [m.end() - 1 for m in re.finditer(r"\?[A-Z]\d", text)]
            assert all(chr(int(rest[i])) == text[i] for i in range(191) if i not in left_out)
    assert list(data_of(tmp_path, loss_on="completion").evaluations()) == ["length_64", "length_191"]


@pytest.mark.parametrize(("options", "share"), [({"loss_on": "completion"}, 0), ({"prompt_share": 0.25}, 0.25), ({}, 1)])
def test_answers_always_count_and_of_the_prompt_the_share(tmp_path, options, share):
    data = data_of(tmp_path, train_documents=200, **options)
    answers = others = 0
    stream = data.train_stream(1)
    for batch in (stream.batch(0, i) for i in range(len(stream))):
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            text = data.tokenizer.decode([*ids[1:].tolist()])
            places = {m.end() - 1 for m in re.finditer(r"\?[A-Z](?=\d|$)", text)}
            places = {i + 1 for i in places}
            counted = {i for i in range(191) if labels[i] != IGNORE}
            assert places <= counted and len(places) == 6
            answers, others = answers + 6, others + len(counted - places)
    assert others / (len(stream) * 2 * 191 - answers) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_mixed_rows_are_one_long_probe_or_whole_short_ones(tmp_path, share):
    data = data_of(tmp_path, window_mix={"short_len": 64 + 32, "long_share": share}, batch_size=4)
    stream = data.train_stream(1)
    batches = [stream.batch(0, i) for i in range(len(stream))]
    regimes = torch.cat([batch.rope_regime for batch in batches])
    assert regimes.sum() == round(share * len(regimes)) and len(regimes) > 40
    for batch in batches:
        for ids, positions, segments, regime in zip(batch.input_ids, batch.position_ids, batch.segment_ids, batch.rope_regime, strict=True):
            marks = (ids == data.tokenizer.eot_id).nonzero().flatten().tolist()
            assert marks == ([0] if regime else [0, 96])
            assert positions.max() == (191 if regime else 95) and segments.max() == (0 if regime else 1)
    assert all(batch.rope_regime is None for batch in data.val_batches())
    assert sum(len(batch.input_ids) for batch in data.val_batches()) == 4  # the long ones


def test_short_windows_hold_other_probes_than_a_run_of_short_ones(tmp_path):
    """Such a run is what mixed training starts from: its held-out probes must not be trained on later."""
    short = data_of(tmp_path, length=95, seq_len=96, train_documents=60)
    mixed = data_of(tmp_path, window_mix={"short_len": 96, "long_share": 0.0})
    before = {*short._corpus.probes[0], *short._corpus.probes[1]}
    assert not before & set(mixed._short.probes[1]) and not mixed._short.probes[0]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.length: 95; a long row holds one probe of more than data\.window_mix\.short_len=96"):
        data_of(tmp_path, length=95, window_mix={"short_len": 96, "long_share": 0.5})
    with pytest.raises(UserError, match=r"data\.prompt_share: 0\.5; with data\.loss_on=completion no prompt counts"):
        data_of(tmp_path, prompt_share=0.5, loss_on="completion")


def test_a_short_window_must_hold_a_probe(tmp_path):
    with pytest.raises(UserError, match=r"data\.window_mix\.short_len: 64; pairs needs from 65 tokens to data\.seq_len=192"):
        data_of(tmp_path, window_mix={"short_len": 64, "long_share": 0.5})
