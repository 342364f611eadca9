"""Concept sets by random walks on the concept graph (SynthLLM, sec. 2.2; level 3).

Every number is a function of (seed, epoch, start topic, which draw), so that any number of workers, in any order, finds the same sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from components.decoding.sampling import GOLDEN, MASK, mix64
from components.errors import UserError
from components.synthesis.corpus import members_of, ones_at
from components.synthesis.graph import ConceptGraph, Edges

Ids = NDArray[np.int64]
CROSSINGS = ("uniform", "last", "each")
# places in the sequence of draws of a walk
_TOPIC_STEPS, _CONCEPT_STEPS, _CROSSING, _TOPICS, _CONCEPTS = 0, 1, 2, 16, 64
_LONGEST = 15  # steps: then the draws of one part never reach those of the next


@dataclass(frozen=True)
class WalkRule:
    """How one set is drawn.

    Args:
        topic_steps: numbers of steps s on the topic graph, one of which is drawn evenly (paper: 1, 2).
        concept_steps: numbers of steps r on the concept graph (paper: 3, 4).
        crossing: which topic the step to a concept starts from: "uniform" over the distinct topics of the walk, "last", or "each"
            (one chain of concepts from every distinct topic, all of r steps).
        self_avoiding: never step on a node of the set again; then a walk ends where all neighbours are visited.

    Raises UserError for a value that is not allowed.
    """

    topic_steps: Sequence[int]
    concept_steps: Sequence[int]
    crossing: str
    self_avoiding: bool

    def __post_init__(self) -> None:
        for key, values in (("topic_steps", self.topic_steps), ("concept_steps", self.concept_steps)):
            whole = all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LONGEST for value in values)
            if not values or not whole:
                raise UserError(f"walk.{key}: {list(values)}; allowed is a list of whole numbers from 0 to {_LONGEST}, such as [1, 2]")
        if self.crossing not in CROSSINGS:
            raise UserError(f"walk.crossing: {self.crossing!r} is not one of {', '.join(CROSSINGS)}")


@dataclass(frozen=True)
class Walks:
    """What was drawn: W rows. topics (W, .) and concepts (W, .) are the visited ids in their order, -1 where there is none."""

    seed: int
    epochs: Ids
    starts: Ids
    topics: Ids
    concepts: Ids

    def __len__(self) -> int:
        return len(self.starts)

    def sets(self, graph: ConceptGraph, members: str) -> sparse.csr_matrix:
        """K^g of every walk as ones over T topics, then C key concepts: (W, T + C) int32 with sorted columns; see `Corpus.sets`."""
        shift = len(graph.topics)
        concepts = np.where(self.concepts >= 0, self.concepts + shift, -1)
        ids = np.hstack([self.topics, concepts]) if members_of(members) == "all" else concepts
        return ones_at(ids, shift + len(graph.concepts))

    def provenance(self, row: int) -> dict[str, Any]:
        """Where a set comes from: seed, epoch, start topic, and the path of ids."""
        topics, concepts = (path[path >= 0].tolist() for path in (self.topics[row], self.concepts[row]))
        return {"seed": self.seed, "epoch": int(self.epochs[row]), "topic": int(self.starts[row]), "topics": topics, "concepts": concepts}


def epoch_starts(graph: ConceptGraph, seed: int, epoch: int) -> Ids:
    """Every topic once, in the order of this epoch: (T,) ids."""
    topics = np.arange(len(graph.topics), dtype=np.int64)
    return np.argsort(_keys(seed, np.full(len(topics), epoch, dtype=np.int64), topics), kind="stable")


def sample_epochs(graph: ConceptGraph, rule: WalkRule, seed: int, epochs: Sequence[int]) -> Walks:
    """One walk from every topic in each of `epochs` (paper: five), in the shuffled order of each epoch."""
    starts = [epoch_starts(graph, seed, epoch) for epoch in epochs]
    numbers = np.repeat(np.asarray(epochs, dtype=np.int64), len(graph.topics))
    return sample_walks(graph, rule, seed, numbers, np.concatenate(starts) if starts else np.empty(0, dtype=np.int64))


def sample_walks(graph: ConceptGraph, rule: WalkRule, seed: int, epochs: Ids, starts: Ids) -> Walks:
    """Draw the walks of any (epoch, start topic) pairs, (W,) each, all at once."""
    keys = _keys(seed, epochs, starts)
    topic_steps = _pick(np.asarray(rule.topic_steps), keys, _TOPIC_STEPS)
    concept_steps = _pick(np.asarray(rule.concept_steps), keys, _CONCEPT_STEPS)
    topics = np.full((len(starts), 1 + max(rule.topic_steps)), -1, dtype=np.int64)
    topics[:, 0] = starts
    for step in range(1, topics.shape[1]):
        current = np.where(step <= topic_steps, topics[:, step - 1], -1)
        topics[:, step] = _step(graph.topic_topic, current, _uniforms(keys, _TOPICS + step), _avoided(rule, topics[:, :step]))
    sources = _crossings(rule, topics, keys)
    length = 1 + max(rule.concept_steps)
    concepts = np.full((len(starts), sources.shape[1] * length), -1, dtype=np.int64)
    for chain, source in enumerate(sources.T):
        first, draw = chain * length, _CONCEPTS + 16 * chain
        concepts[:, first] = _step(graph.topic_concept, source, _uniforms(keys, draw), _avoided(rule, concepts[:, :first]))
        for step in range(1, length):
            place = first + step
            current = np.where(step <= concept_steps, concepts[:, place - 1], -1)
            concepts[:, place] = _step(graph.concept_concept, current, _uniforms(keys, draw + step), _avoided(rule, concepts[:, :place]))
    return Walks(seed, epochs, starts, topics, concepts)


def _keys(seed: int, epochs: Ids, topics: Ids) -> NDArray[np.uint64]:
    """A counter for each walk, (W,): splitmix64 over seed, epoch and topic, as the decoder does over seed, row and position."""
    golden, one = np.uint64(GOLDEN), np.uint64(1)
    state = mix64(np.array([(seed + GOLDEN) & MASK], dtype=np.uint64))
    state = mix64(state + (epochs.astype(np.uint64) + one) * golden)
    return mix64(state + (topics.astype(np.uint64) + one) * golden)


def _uniforms(keys: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    """The draw of that number of each walk, (W,) multiples of 2^-52 in [0, 1)."""
    state = mix64(keys + np.uint64((draw + 1) * GOLDEN & MASK))
    return (state >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _pick(options: Ids, keys: NDArray[np.uint64], draw: int) -> Ids:
    """One of `options` for each walk, (W,), all equally likely."""
    return options[(_uniforms(keys, draw) * len(options)).astype(np.int64)]


def _avoided(rule: WalkRule, visited: Ids) -> Ids | None:
    return visited if rule.self_avoiding else None


def _crossings(rule: WalkRule, topics: Ids, keys: NDArray[np.uint64]) -> Ids:
    """Topics that chains of concepts start from, (W, chains), -1 for none."""
    first = topics >= 0  # becomes: the first place of each distinct topic
    for place in range(1, topics.shape[1]):
        first[:, place] &= (topics[:, :place] != topics[:, place : place + 1]).all(axis=1)
    if rule.crossing == "each":
        return np.where(first, topics, -1)
    if rule.crossing == "last":
        place = (topics >= 0).sum(axis=1) - 1
    else:
        wanted = (_uniforms(keys, _CROSSING) * first.sum(axis=1)).astype(np.int64)
        place = (first & (np.cumsum(first, axis=1) == wanted[:, None] + 1)).argmax(axis=1)
    return np.take_along_axis(topics, place[:, None], axis=1)


def _step(edges: Edges, current: Ids, uniforms: NDArray[np.float64], visited: Ids | None) -> Ids:
    """One step from `current` (W,) by inverse CDF, -1 where there is no current node or nowhere to go. visited: (W, places) or None."""
    found = np.full(len(current), -1, dtype=np.int64)
    walking = np.flatnonzero(current >= 0)
    pointers, indices, sums = edges.freq.indptr, edges.freq.indices, edges.cumulative
    begin, end = pointers[current[walking]].astype(np.int64), pointers[current[walking] + 1].astype(np.int64)
    blocked = None
    if visited is not None:
        blocked = _edges_to(edges, begin, end, visited[walking])
        walking, begin, end, blocked = _drop(end - begin > (blocked >= 0).sum(axis=1), walking, begin, end, blocked)
    else:
        walking, begin, end = _drop(end > begin, walking, begin, end)
    if not len(walking):
        return found
    before = np.where(begin > 0, sums[begin - 1], 0.0)
    if blocked is None:
        target = before + uniforms[walking] * (sums[end - 1] - before)
        # the rounding of a sum near 2^30 may put a target on the edge of its row
        edge = np.clip(np.searchsorted(sums, target, side="right"), begin, end - 1)
    else:
        edge = _search_around(edges, begin, end, before, uniforms[walking], blocked)
    found[walking] = indices[edge]
    return found


def _drop(keep: NDArray[np.bool_], *arrays: Ids) -> list[Ids]:
    return [array[keep] for array in arrays]


def _edges_to(edges: Edges, begin: Ids, end: Ids, nodes: Ids) -> Ids:
    """Places of the edges from each row (begin, end: (W,)) to `nodes` (W, places), ascending with -1 first; a node counts once."""
    indices, stop = edges.freq.indices, end[:, None]
    low, high = np.broadcast_to(begin[:, None], nodes.shape).copy(), np.broadcast_to(stop, nodes.shape).copy()
    while (low < high).any():  # the first edge of the row whose column is at least the node
        middle = (low + high) // 2
        less = (low < high) & (indices[np.minimum(middle, len(indices) - 1)] < nodes)
        low, high = np.where(less, middle + 1, low), np.where(less, high, np.minimum(middle, high))
    there = (nodes >= 0) & (low < stop)
    there[there] = indices[low[there]] == nodes[there]
    places = np.sort(np.where(there, low, -1), axis=1)
    places[:, 1:][places[:, 1:] == places[:, :-1]] = -1
    return np.sort(places, axis=1)


def _search_around(
    edges: Edges, begin: Ids, end: Ids, before: NDArray[np.float64], uniforms: NDArray[np.float64], blocked: Ids
) -> Ids:  # fmt: skip
    """Inverse CDF over the edges begin..end without `blocked` (W, places): the target jumps over each blocked edge at or below it."""
    sums, weights = edges.cumulative, edges.freq.data
    mass = np.where(blocked >= 0, weights[np.maximum(blocked, 0)] + edges.epsilon, 0.0)
    target = before + uniforms * (sums[end - 1] - before - mass.sum(axis=1))
    for place in range(blocked.shape[1]):
        edge = blocked[:, place]
        below = np.where(edge > 0, sums[np.maximum(edge, 1) - 1], 0.0)
        target = np.where((edge >= 0) & (target >= below), target + mass[:, place], target)
    found = np.clip(np.searchsorted(sums, target, side="right"), begin, end - 1)
    for _ in range(blocked.shape[1] + 1):  # a target that rounding left on a blocked edge goes on to the next free one
        hit = (found[:, None] == blocked).any(axis=1)
        found = np.where(hit, np.where(found + 1 < end, found + 1, begin), found)
    return found
