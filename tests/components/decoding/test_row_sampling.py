"""Rows with parameters of their own, against a float64 reference, exact probabilities and transformers' logits processors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.contracts import SamplingParams
from components.decoding.sampling import RowSampling, alternatives, penalise, sample_token, seen_tokens, uniforms

OFF: dict[str, Any] = {"max_new_tokens": 8}


def reference(logits: np.ndarray, params: SamplingParams, seen: set[int], blocked: set[int]) -> np.ndarray:
    """Exact probabilities (V,) float64 of one row, stage by stage, one token at a time."""
    scores = logits.astype(np.float64).copy()
    for token in seen:
        scores[token] = scores[token] / params.repetition_penalty if scores[token] > 0 else scores[token] * params.repetition_penalty
    scores[list(blocked)] = -np.inf
    if params.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    scores = (scores - scores.max()) / params.temperature
    if params.top_k is not None and params.top_k < len(scores):
        scores[scores < sorted(scores)[-params.top_k]] = -np.inf
    masses = np.exp(scores) / np.exp(scores).sum()
    if params.top_p is not None:
        total = 0.0
        for token in sorted(range(len(masses)), key=lambda i: (-masses[i], i)):
            masses[token], total = (masses[token] if total < params.top_p else 0.0), total + masses[token]
        masses /= masses.sum()
    if params.min_p is not None:
        masses[masses < params.min_p * masses.max()] = 0
    return masses / masses.sum()


def several(generator: np.random.Generator) -> SamplingParams:
    """Random parameters, each of them off in half of the cases."""

    def perhaps(value: Any) -> Any:
        return value if generator.random() < 0.5 else None

    return SamplingParams(
        **OFF,
        temperature=perhaps(float(generator.uniform(0.3, 2))) or 1.0,
        top_k=perhaps(int(generator.integers(1, 60))),
        top_p=perhaps(float(generator.uniform(0.1, 0.99))),
        min_p=perhaps(float(generator.uniform(0.01, 0.4))),
        repetition_penalty=perhaps(float(generator.uniform(0.7, 2))) or 1.0,
    )


def test_every_stage_equals_the_float64_reference():
    generator, points, vocabulary = np.random.default_rng(0), 4000, 40
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    for _ in range(60):
        own, logits = several(generator), torch.from_numpy(generator.normal(0, 2, vocabulary)).float()
        seen, blocked = set(generator.integers(0, vocabulary, 5).tolist()), set(generator.integers(0, vocabulary, 5).tolist())
        mask = torch.tensor([i in blocked for i in range(vocabulary)])
        found = seen_tokens([list(seen)] * points, vocabulary)
        ids, _ = sample_token(logits.expand(points, -1), own, grid, mask, found)
        shares = torch.bincount(ids, minlength=vocabulary).double() / points
        # an even grid of u says each probability to half a step at either of its ends
        np.testing.assert_allclose(shares, reference(logits.numpy(), own, seen, blocked), rtol=0, atol=1 / points + 1e-6)


def test_frequencies_of_the_counter_based_numbers_pass_a_chi_square_test():
    generator, draws = np.random.default_rng(1), 20000
    logits = torch.from_numpy(generator.normal(0, 1.5, 30)).float()
    for own in (SamplingParams(seed=3), SamplingParams(seed=4, temperature=1.3, top_k=12), SamplingParams(seed=5, top_p=0.8, min_p=0.05)):
        ids, _ = sample_token(logits.expand(draws, -1), own, uniforms(own.seed, [0] * draws, list(range(draws))))
        expected = reference(logits.numpy(), own, set(), set()) * draws
        counted = np.bincount(ids.numpy(), minlength=30)
        possible = expected > 0
        assert not counted[~possible].any()
        statistic = ((counted - expected)[possible] ** 2 / expected[possible]).sum()
        freedom = possible.sum() - 1
        # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal; four standard deviations
        assert (statistic / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))


def test_what_is_kept_equals_transformers_processors():
    processors = pytest.importorskip("transformers.generation.logits_process")
    generator, vocabulary, points = np.random.default_rng(2), 60, 4000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    for _ in range(30):
        own, logits = several(generator), torch.from_numpy(generator.normal(0, 2, (1, vocabulary))).float()
        seen = torch.from_numpy(generator.integers(0, vocabulary, (1, 6)))
        scores = processors.RepetitionPenaltyLogitsProcessor(own.repetition_penalty)(seen, logits.clone())
        scores = processors.TemperatureLogitsWarper(own.temperature)(seen, scores)
        for value, warper in (
            (own.top_k, processors.TopKLogitsWarper),
            (own.top_p, processors.TopPLogitsWarper),
            (own.min_p, processors.MinPLogitsWarper),
        ):
            scores = scores if value is None else warper(value)(seen, scores)
        ids, _ = sample_token(logits.expand(points, -1), own, grid, None, seen_tokens(seen.tolist() * points, vocabulary))
        shares = torch.bincount(ids, minlength=vocabulary).double() / points
        torch.testing.assert_close(shares, scores.double().softmax(-1)[0], rtol=0, atol=1 / points + 1e-6)


def mixed(count: int) -> list[SamplingParams]:
    generator = np.random.default_rng(3)
    greedy = SamplingParams(temperature=0.0, min_new_tokens=3)
    return [greedy if i % 7 == 0 else several(generator) for i in range(count)]


@pytest.mark.parametrize("vocabulary", [50, 3001])
def test_a_rows_choice_depends_on_none_of_its_batch_mates(vocabulary):
    params = mixed(28)
    logits = torch.randn(28, vocabulary, generator=torch.Generator().manual_seed(4)) * 3
    seen = seen_tokens([[i, i + 1] for i in range(28)], vocabulary)
    blocked = torch.arange(vocabulary) % 11 == 0
    rows, positions = list(range(100, 128)), list(range(28))

    def ids(at: list[int]) -> list[int]:
        own = RowSampling.of([params[i] for i in at], [rows[i] for i in at], [[4, 5]] * len(at))
        where = [positions[i] for i in at]
        return sample_token(logits[at], own, own.uniforms(where), own.blocked(blocked, where), seen[at])[0].tolist()

    together = ids(list(range(28)))
    assert [ids([i])[0] for i in range(28)] == together
    for seed in range(5):
        some = np.random.default_rng(seed).permutation(28)[:9].tolist()
        assert ids(some) == [together[i] for i in some]


def sorted_whole(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """Top-k and top-p with every row's whole vocabulary sorted; equals are kept or lie in the order of their ids."""
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    if params.top_k is not None:
        scaled = scaled.masked_fill(scaled < scaled.sort(dim=-1, descending=True).values[:, params.top_k - 1 : params.top_k], -torch.inf)
    masses, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = masses.cumsum(dim=-1, dtype=torch.float64) - masses
    masses = masses.masked_fill(before >= (params.top_p or 1), 0)
    if params.top_p is None:
        masses = torch.zeros_like(masses).scatter(1, order, masses)
    cdf = masses.cumsum(dim=-1, dtype=torch.float64)
    picked = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
    return (picked if params.top_p is None else order.gather(1, picked)).squeeze(1)


@pytest.mark.parametrize("step", [0.0, 1.0], ids=["distinct", "many_equals"])
@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.9), (7, None), (300, None), (40, 0.7), (None, 0.2)])
def test_looking_at_the_likely_tokens_gives_what_sorting_all_gives(step, scale, top_k, top_p):
    logits = torch.randn(24, 5000, generator=torch.Generator().manual_seed(6)) * scale
    logits = (logits / step).round() * step if step else logits
    own, uniform = SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p), uniforms(1, list(range(24)), [2] * 24)
    assert sample_token(logits, own, uniform)[0].tolist() == sorted_whole(logits, own, uniform).tolist()


def test_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits = torch.tensor([[3.0, -2.0, 1.0, 0.0]])
    seen = seen_tokens([[0, 1, 3, 3]], 4)
    assert penalise(logits, seen, torch.tensor([[2.0]])).tolist() == [[1.5, -4.0, 1.0, 0.0]]
    ids, logprobs = sample_token(logits, SamplingParams(temperature=0.0, repetition_penalty=4.0), torch.zeros(1), None, seen)
    assert ids.item() == 2  # 3/4 < 1
    assert logprobs.item() == pytest.approx(logits.log_softmax(-1)[0, 2].item(), rel=1e-6)
    with pytest.raises(ValueError, match="penalty"):
        sample_token(logits, SamplingParams(repetition_penalty=1.1), torch.zeros(1, dtype=torch.float64))


def test_stop_ids_wait_for_the_least_number_of_tokens():
    own = RowSampling.of([SamplingParams(min_new_tokens=2), SamplingParams()], stops=[(1, 3), (1,)])
    nothing = torch.tensor([True, False, False, False])
    assert own.blocked(nothing, [1, 0]).tolist() == [[True, True, False, True], [True, False, False, False]]
    assert own.blocked(nothing, [2, 0]) is nothing


def test_seeds_of_64_bits_name_the_numbers_of_their_rows():
    own = RowSampling.of([SamplingParams(seed=seed) for seed in (0, 2**63, 2**64 - 1, -1)], [0, 1, 2, 2])
    found = own.uniforms([5, 6, 7, 7]).tolist()
    assert found == uniforms([0, 2**63, 2**64 - 1, -1], [0, 1, 2, 2], [5, 6, 7, 7]).tolist()
    assert found[:3] == [uniforms(seed, [row], [row + 5]).item() for row, seed in enumerate((0, 2**63, 2**64 - 1))]
    assert found[2] == found[3]  # the same 64 bits


def test_alternatives_are_the_models_own_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 4.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    exact = logits.double().log_softmax(-1)
    first, second, third, fourth = alternatives(logits, [2, 1, None, 9])
    assert third is None and list(first) == [1, 2] and list(second) in ([0], [1]) and list(fourth) == [0, 1, 2]
    assert first == pytest.approx({1: exact[0, 1].item(), 2: exact[0, 2].item()}, rel=1e-6)
    assert alternatives(logits, [None] * 4) == [None] * 4
    assert alternatives(logits, [0, None, None, None])[0] == {}
