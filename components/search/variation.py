"""How a search makes candidates: fresh ones, mutations, crossovers. A candidate is a function of (seed, its id, who came before) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from components.errors import UserError
from components.search.space import Key, Space, Vector


@dataclass(frozen=True)
class Candidate:
    """One vector of factors. op: fresh, seed, mutate or cross. parents: ids. r: where interpolation begins. factors: (rotary_dim/2,)."""

    id: int
    generation: int
    op: str
    parents: tuple[int, ...]
    r: int
    factors: Vector


@dataclass(frozen=True)
class Evolution:
    """How many candidates, and how they are varied (LongRoPE2, sec. 4.1, and what LongRoPE left open: parents, mutations, crossovers).

    Args:
        population: candidates before the first generation.
        iterations: generations after it.
        parents: the best so many of all scored so far are varied.
        mutations, crossovers: children of a generation by each. A crossover without two parents of the same r is a mutation instead.
        mutation_probability: of every factor of a mutated vector to be drawn anew.
        seed: >= 0.
        r_moves: probability that a mutation also moves r by one; 0 as in the paper, where r is settled by the first population.
        tries: how often a child that was seen before is drawn again before its place stays empty.
        budget: most evaluations in all; None: population + iterations * (mutations + crossovers).

    Raises UserError for a value out of its range.
    """

    population: int
    iterations: int
    parents: int
    mutations: int
    crossovers: int
    mutation_probability: float
    seed: int
    r_moves: float
    tries: int
    budget: int | None

    def __post_init__(self) -> None:
        least = {"population": 1, "iterations": 0, "parents": 1, "mutations": 0, "crossovers": 0, "seed": 0, "tries": 1, "budget": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name == "budget":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise UserError(f"task.{name}: {value!r}; allowed is a whole number >= {bound}")
        if self.iterations and not self.children:
            raise UserError("task.mutations: 0, task.crossovers: 0; a generation needs children; set one of them above 0")
        if not 0 < self.mutation_probability <= 1:
            raise UserError(f"task.mutation_probability: {self.mutation_probability}; allowed is 0 < p <= 1; use 0.3")
        if not 0 <= self.r_moves <= 1:
            raise UserError(f"task.r_moves: {self.r_moves}; allowed is a probability, 0 .. 1; 0 keeps r as the first population has it")

    @property
    def children(self) -> int:
        """Of one generation."""
        return self.mutations + self.crossovers

    @property
    def total(self) -> int:
        """Most evaluations in all."""
        planned = self.population + self.iterations * self.children
        return planned if self.budget is None else min(planned, self.budget)

    def rng(self, number: int) -> np.random.Generator:
        """The generator of the candidate with this id: nothing else draws from it, so candidates can be made in any order, or again."""
        return np.random.Generator(np.random.PCG64([self.seed, number]))


Draw = tuple[str, tuple[int, ...], int, Vector]  # op, parents, r, factors


def first_generation(space: Space, evolution: Evolution, seeds: Sequence[Sequence[float]], seen: set[Key]) -> list[Candidate]:
    """The first population: the given vectors, brought into the space, then constant tails S ~ U[s, 2s] with r going round.

    `seen` grows by the keys of what is returned. Seeds that fall together count once.
    """
    made: list[Candidate] = []
    for factors in seeds:
        r, vector = space.nearest(factors)
        key = space.key(r, vector)
        if key not in seen:
            seen.add(key)
            made.append(Candidate(len(made), 0, "seed", (), r, vector))
    if len(made) > evolution.population:
        raise UserError(f"task.population: {evolution.population}; the {len(made)} different task.seeds need at least as many places")
    ranks = space.r_max - space.r_min + 1
    for number in range(len(made), evolution.population):
        r = space.r_min + number % ranks
        child = _unseen(space, evolution, seen, partial(_fresh, space, r, evolution.rng(number)))
        if child:
            made.append(Candidate(number, 0, *child))
    return made


def next_generation(space: Space, evolution: Evolution, parents: Sequence[Candidate], generation: int, seen: set[Key]) -> list[Candidate]:
    """Children of `parents` (at least one); fewer than planned where all tries gave vectors in `seen`, which grows by theirs."""
    made = []
    start = evolution.population + (generation - 1) * evolution.children
    for place in range(evolution.children):
        rng = evolution.rng(start + place)
        cross = place >= evolution.mutations
        child = _unseen(space, evolution, seen, partial(_child, space, evolution, parents, rng, cross))
        if child:
            made.append(Candidate(start + place, generation, *child))
    return made


def _unseen(space: Space, evolution: Evolution, seen: set[Key], draw: Callable[[], Draw]) -> Draw | None:
    for _ in range(evolution.tries):
        drawn = draw()
        key = space.key(drawn[2], drawn[3])
        if key not in seen:
            seen.add(key)
            return drawn
    return None


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return min(low + (high - low) * rng.random(), high)  # rounding can end above `high`


def _fresh(space: Space, r: int, rng: np.random.Generator) -> Draw:
    tail = np.full(space.size - r, _between(rng, space.lower, space.upper))
    return "fresh", (), r, space.vector(r, tail)


def _child(space: Space, evolution: Evolution, parents: Sequence[Candidate], rng: np.random.Generator, cross: bool) -> Draw:
    parent = parents[int(rng.integers(len(parents)))]
    if cross and space.size - parent.r > 1:
        mates = [other for other in parents if other.r == parent.r and other.id != parent.id]
        if mates:
            mate = mates[int(rng.integers(len(mates)))]
            return "cross", (parent.id, mate.id), parent.r, crossed(space, parent, mate, int(rng.integers(parent.r + 1, space.size)))
    r, tail = parent.r, parent.factors[parent.r :].copy()
    if evolution.r_moves and rng.random() < evolution.r_moves:
        r, tail = _moved(space, r, tail, rng)
    return "mutate", (parent.id,), r, mutated(space, r, tail, evolution.mutation_probability, rng)


def crossed(space: Space, parent: Candidate, mate: Candidate, cut: int) -> Vector:
    """Factors of `parent` below `cut` and of `mate` from there on, made to rise by a running maximum; both have the same r < cut."""
    tail = np.concatenate([parent.factors[parent.r : cut], mate.factors[cut:]])
    return space.vector(parent.r, np.maximum.accumulate(tail))


def mutated(space: Space, r: int, tail: Vector, probability: float, rng: np.random.Generator) -> Vector:
    """Each factor of the tail, in turn, is drawn anew with this probability between its neighbours (the ends: s and 2s).

    Note: this is the paper's move. It cannot lift a run of equal factors together, so where the objective wants neighbours in the wrong
    order (a plateau at their mean), the search may stop beside the optimum.
    """
    values = [space.lower, *tail.tolist(), space.upper]
    for j in range(1, len(values) - 1):
        if rng.random() < probability:
            values[j] = _between(rng, values[j - 1], values[j + 1])
    return space.vector(r, np.asarray(values[1:-1]))


def _moved(space: Space, r: int, tail: Vector, rng: np.random.Generator) -> tuple[int, Vector]:
    """The tail begun one pair earlier, at a factor between s and its first, or later; as it was where the range of r ends."""
    if rng.random() < 0.5:
        return (r - 1, np.concatenate([[_between(rng, space.lower, tail[0])], tail])) if r > space.r_min else (r, tail)
    return (r + 1, tail[1:]) if r < space.r_max else (r, tail)
