"""The space of rescaled RoPE vectors: its ends, its members, what counts as the same."""

from __future__ import annotations

import numpy as np
import pytest

from components.errors import UserError
from tests.components.search.settings import make_space

SMALL = {"rotary_dim": 64, "base": 10000.0, "original_len": 1024, "factor": 16.0}


@pytest.mark.parametrize(
    "rotary_dim, base, original_len, d_10, d_tcd",
    [(96, 1e4, 2048, 19, 31), (128, 5e5, 8192, 24, 35), (96, 1e4, 4096, 22, 34), (64, 1e4, 256, 5, 13)],
    ids=["phi3-mini", "llama3-8b", "phi4-mini", "tiny"],
)
def test_critical_dimensions(rotary_dim, base, original_len, d_10, d_tcd):
    space = make_space(rotary_dim, base, original_len, 16.0)
    assert (space.r_min, space.r_max) == (d_10, d_tcd)
    turns = original_len / (2 * np.pi) * base ** (-2 * np.arange(space.size) / rotary_dim)
    assert turns[d_tcd - 1] > 1 >= turns[d_tcd] and turns[d_10 - 1] > 10 >= turns[d_10]


@pytest.mark.parametrize("original_len, ends", [(7, (1, 1)), (40, (1, 7)), (10**9, (31, 31))])
def test_the_range_of_r_stays_within_the_vector(original_len, ends):
    space = make_space(64, 10000.0, original_len, 4.0)
    assert (space.r_min, space.r_max) == ends


def test_the_published_table_of_phi4_mini_is_in_the_space():
    space = make_space(96, 10000.0, 4096, 32.0)
    tail = [32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77]
    vector = space.vector(31, np.array(tail))
    assert space.holds(31, vector)
    published = {0: 1.0, 1: 1.118320672, 2: 1.250641126, 10: 3.059592084, 20: 9.36110372, 30: 28.64115884, 31: 32.03, 47: 47.77}
    for i, value in published.items():
        assert vector[i] == pytest.approx(value, rel=1e-9)  # the table has ten digits


def test_what_is_not_in_the_space():
    space = make_space(**SMALL)
    good = space.vector(17, np.linspace(17, 28, 15))
    assert space.holds(17, good)
    for change in ({20: 30.0}, {31: 33.0}, {5: good[5] * 1.001}, {17: 15.0}):
        bad = good.copy()
        for i, value in change.items():
            bad[i] = value
        assert not space.holds(17, bad), change
    assert not space.holds(9, space.vector(9, np.full(23, 20.0)))


def test_key_rounds_to_the_step():
    space = make_space(**SMALL)
    tail = np.full(15, 20.0)
    near, far = tail.copy(), tail.copy()
    near[-1] += 0.004
    far[-1] += 0.006
    key = space.key(17, space.vector(17, tail))
    assert space.key(17, space.vector(17, near)) == key != space.key(17, space.vector(17, far))
    assert space.key(16, space.vector(16, np.full(16, 20.0))) != key


def test_nearest_keeps_members_and_brings_others_in():
    space = make_space(**SMALL)
    member = space.vector(14, np.linspace(17, 28, 18))
    r, vector = space.nearest(member.tolist())
    assert r == 14 and np.array_equal(vector, member)
    ntk = 16 ** (np.arange(32) / 31)  # its last factor alone reaches s
    r, vector = space.nearest(ntk.tolist())
    assert space.holds(r, vector) and np.all(vector[r:] == 16.0)
    assert r == 18  # the longest rising part
    with pytest.raises(UserError, match="32 finite numbers"):
        space.nearest([1.0] * 31)
    with pytest.raises(UserError, match="32 finite numbers"):
        space.nearest([*[1.0] * 31, float("nan")])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rotary_dim": 63}, "even number"),
        ({"rotary_dim": 2}, "even number"),
        ({"base": 1.0}, "rope_theta"),
        ({"original_len": 6}, "at least 7"),
        ({"factor": 1.0}, "rope.factor"),
        ({"factor": float("nan")}, "rope.factor"),
        ({"low": 2.0}, "task.low"),
        ({"low": 0.01}, "task.low"),
        ({"step": 0.0}, "task.step"),
    ],
)
def test_values_out_of_range_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        make_space(**{**SMALL, **change})
