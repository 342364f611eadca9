"""Sampling against hand-computed distributions, published generator outputs and frequency counts."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from components.contracts import Constraint, SamplingParams, UserError
from components.decoding.greedy import Greedy
from components.decoding.sample import Sample
from components.decoding.sampling import GOLDEN, MASK, check_params, mix64, sample_token, uniforms

PLAIN = {
    **{"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0},
    **{"stop": [], "regex": None, "choice": None},
}


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 8, **changes})


def frequencies(logits: torch.Tensor, chosen: SamplingParams, blocked: torch.Tensor | None = None) -> torch.Tensor:
    """Share of each token when the uniform runs over an even grid: exact to 1/points, no statistics needed."""
    points = 20000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    ids, _ = sample_token(logits.expand(points, -1), chosen, grid, blocked)
    return torch.bincount(ids, minlength=logits.shape[-1]) / points


def test_mix64_gives_the_published_splitmix64_sequence():
    counters = np.array([(1234567 + k * GOLDEN) & MASK for k in range(1, 6)], dtype=np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [int(value) for value in mix64(counters)] == expected


def test_uniforms_depend_on_their_own_counters_only():
    together = uniforms(7, [0, 1, 2, 5], [3, 3, 9, 0])
    alone = torch.cat([uniforms(7, [row], [position]) for row, position in [(0, 3), (1, 3), (2, 9), (5, 0)]])
    assert torch.equal(together, alone)
    assert len({*together.tolist(), *uniforms(8, [0, 1, 2, 5], [3, 3, 9, 0]).tolist()}) == 8
    assert uniforms(7, [0], [1]) != uniforms(7, [1], [0])


def test_uniforms_are_uniform_and_uncorrelated():
    count = 20000
    by_row = uniforms(0, list(range(count)), [0] * count)
    by_position = uniforms(0, [0] * count, list(range(count)))
    by_seed = torch.cat([uniforms(seed, [0], [0]) for seed in range(2000)])
    for values in (by_row, by_position, by_seed):
        error = 5 / math.sqrt(12 * len(values))  # five standard errors of the mean of U(0, 1)
        assert abs(values.mean().item() - 0.5) < error
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(len(values))
        assert values.min() >= 0 and values.max() < 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_equal_the_tempered_softmax(temperature):
    logits = torch.tensor([[2.0, -1.0, 0.3, 0.3, 5.0]])
    expected = (logits.double() / temperature).softmax(-1)[0]
    assert torch.allclose(frequencies(logits, params(temperature=temperature)).double(), expected, atol=2e-4, rtol=0)


def test_top_k_keeps_the_k_largest_and_ties_with_the_last():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]))
    assert torch.allclose(frequencies(logits, params(top_k=2)), torch.tensor([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]), atol=2e-4)
    tied = torch.log(torch.tensor([[0.1, 0.4, 0.25, 0.25]]))
    assert torch.allclose(frequencies(tied, params(top_k=2)), torch.tensor([0, 0.4 / 0.9, 0.25 / 0.9, 0.25 / 0.9]), atol=2e-4)
    assert torch.equal(frequencies(logits, params(top_k=99)), frequencies(logits, params()))
    assert frequencies(logits, params(top_k=1))[1] == 1


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]))
    assert torch.allclose(frequencies(logits, params(top_p=0.6)), torch.tensor([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]), atol=2e-4)
    assert torch.allclose(frequencies(logits, params(top_p=0.7)), torch.tensor([0, 0.4, 0.2, 0.25, 0]) / 0.85, atol=2e-4)
    assert frequencies(logits, params(top_p=1e-9))[1] == 1
    assert torch.allclose(frequencies(logits, params(top_p=1.0)), logits.exp()[0], atol=2e-4)


def test_top_k_comes_before_top_p_and_temperature_before_both():
    logits = torch.log(torch.tensor([[0.3, 0.4, 0.2, 0.1]]))
    # after top_k=3 the masses are 3/9, 4/9, 2/9; top_p=0.75 keeps two of them (7/9 >= 0.75), without top_k it would keep three (0.7 < 0.75)
    assert torch.allclose(frequencies(logits, params(top_k=3, top_p=0.75)), torch.tensor([3 / 7, 4 / 7, 0, 0]), atol=2e-4)
    squared = logits.exp()[0].square() / logits.exp().square().sum()  # temperature 0.5; 0.16 + 0.09 of 0.30 reaches 0.8
    expected = torch.tensor([squared[0], squared[1], 0, 0]) / (squared[0] + squared[1])
    assert torch.allclose(frequencies(logits, params(temperature=0.5, top_p=0.8)), expected, atol=2e-4)


@pytest.mark.parametrize("chosen", [params(temperature=0.0), params(), params(top_p=0.9), params(top_k=3), params(top_k=2, top_p=0.5)])
def test_blocked_tokens_are_never_chosen_even_when_most_likely(chosen):
    logits = torch.tensor([[9.0, 1.0, 2.0, 8.0, 0.0]])
    blocked = torch.tensor([True, False, False, True, False])
    shares = frequencies(logits, chosen, blocked)
    assert shares[0] == shares[3] == 0
    assert shares.argmax() == 2


def test_greedy_ignores_the_uniform_and_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 1.0]])
    for value in (0.0, 0.999):
        ids, _ = sample_token(logits, params(temperature=0.0), torch.full((2,), value, dtype=torch.float64))
        assert ids.tolist() == [1, 0]


def test_logprobs_are_the_models_own_whatever_was_cut_off():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)) * 3
    blocked = torch.zeros(11, dtype=torch.bool)
    blocked[logits[0].argmax()] = True
    for chosen in (params(temperature=0.0), params(temperature=0.3, top_k=4, top_p=0.7)):
        ids, logprobs = sample_token(logits, chosen, uniforms(0, list(range(6)), [0] * 6), blocked)
        expected = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(logprobs.double(), expected, rtol=1e-6, atol=1e-6)  # fp32 logsumexp over values of size 10


def test_extreme_values_stay_finite_and_in_range():
    logits = torch.tensor([[1e4, -1e4, 0.0, 1e4 - 1]])
    highest = torch.tensor([1 - 2.0**-52], dtype=torch.float64)
    for temperature in (1e-38, 1.0, 1e30):
        for uniform in (torch.zeros(1, dtype=torch.float64), highest):
            ids, logprobs = sample_token(logits, params(temperature=temperature), uniform)
            assert 0 <= ids.item() < 4 and math.isfinite(logprobs.item())
    ids, _ = sample_token(logits, params(temperature=1e-38), highest)
    assert ids.item() == 0


def test_the_largest_uniform_never_picks_a_token_without_mass():
    generator = torch.Generator().manual_seed(1)
    blocked = torch.arange(1000) >= 900
    highest = torch.full((200,), 1 - 2.0**-52, dtype=torch.float64)
    ids, _ = sample_token(torch.randn(200, 1000, generator=generator), params(), highest, blocked)
    assert ids.max() < 900


def test_a_rows_choice_does_not_depend_on_the_batch():
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(2))
    chosen, draws = params(temperature=0.9, top_k=20, top_p=0.9), uniforms(3, list(range(32)), [4] * 32)
    together, _ = sample_token(logits, chosen, draws)
    alone = [sample_token(logits[row : row + 1], chosen, draws[row : row + 1])[0].item() for row in range(32)]
    assert together.tolist() == alone


def test_options_make_the_params():
    assert Greedy([], None, None).params(5, 9) == SamplingParams(max_new_tokens=5, temperature=0.0, seed=9)
    held = Greedy([], None, ["yes", "no"]).params(5, 9).constraint
    assert held == Constraint(choice=("yes", "no"))
    plain = SamplingParams(max_new_tokens=6, temperature=0.7, top_k=5, top_p=0.9, seed=1)
    assert Sample(0.7, 5, 0.9, None, 1.0, [], None, None).params(6, 1) == plain
    further = replace(plain, min_p=0.1, repetition_penalty=1.2, stop=("\n", "END"))
    assert Sample(0.7, 5, 0.9, 0.1, 1.2, ["\n", "END"], None, None).params(6, 1) == further
    assert Sample(0.7, 5, 0.9, None, 1.0, [], r"\d+", None).params(6, 1) == replace(plain, constraint=Constraint(regex=r"\d+"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("temperature", -1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot")],
        *[("top_k", 0), ("top_k", 2.5), ("top_k", True), ("top_p", 0), ("top_p", 1.5), ("top_p", "x")],
        *[("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", math.inf), ("choice", [])],
    ],
)
def test_bad_values_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=rf"^decode\.{key}: {re.escape(str(value))}; .*allowed"):
        Sample(**{**PLAIN, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": ("",)}, r"decode.stop: \('',\); .*allowed"),
        ({"stop": "END"}, r"decode.stop: 'END'; a list"),
        ({"min_new_tokens": 9}, r"decode.min_new_tokens: 9; .*0 to 8"),
        ({"logprobs": -1}, r"decode.logprobs: -1; "),
        ({"stop_ids": (-1,)}, r"decode.stop_ids: \(-1,\); "),
        ({"seed": 1.5}, r"seed: 1.5; "),
        ({"constraint": Constraint(regex="a"), "stop": ("b",)}, r"decode.stop: \['b'\] is not allowed with decode.regex"),
        ({"constraint": Constraint(choice=("a",)), "min_new_tokens": 2}, r"decode.min_new_tokens: 2 is not allowed with decode.choice"),
        ({"constraint": Constraint(choice=("a",)), "ignore_eos": True}, r"decode.ignore_eos: True is not allowed with decode.choice"),
        ({"constraint": Constraint(choice=("a",), regex="a")}, "held to one of them"),
        ({"constraint": Constraint()}, "held to one of them"),
    ],
)
def test_what_cannot_be_decoded_with_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_params(params(**changes))


@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_bad_length_is_refused(value):
    with pytest.raises(UserError, match=r"^max_new_tokens: "):
        check_params(params(max_new_tokens=value))
