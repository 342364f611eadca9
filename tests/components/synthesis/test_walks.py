"""Walks against exact distributions: k-step marginals, self-avoiding paths, the epoch property, independence of order."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy import stats

from components.errors import UserError
from components.synthesis.corpus import index_documents
from components.synthesis.graph import build_graph
from components.synthesis.walks import WalkRule, epoch_starts, sample_epochs, sample_walks
from tests.components.synthesis.made_up import random_corpus

PAPER = WalkRule(topic_steps=(1, 2), concept_steps=(3, 4), crossing="uniform", self_avoiding=False)
WALKS = 200_000


def rule(topic_steps=(2,), concept_steps=(3,), crossing="last", self_avoiding=False):
    return WalkRule(topic_steps, concept_steps, crossing, self_avoiding)


@pytest.fixture(scope="module")
def graph():
    graph = build_graph(random_corpus(16, seed=4, topics=6, concepts=8), 1.0)  # so large an epsilon that walks without it would show
    assert (graph.topic_topic.degree > 0).all() and (graph.concept_concept.degree > 0).all()
    return graph


def draw(graph, rule, seed, walks=WALKS, topic=None):
    """That many walks, evenly from all topics, or all from one."""
    size = len(graph.topics)
    epochs, starts = np.divmod(np.arange(walks), size) if topic is None else (np.arange(walks), np.full(walks, topic))
    return sample_walks(graph, rule, seed, epochs, starts)


def chi_square(counts, expected):
    """p-value of counts against probabilities; cells that cannot happen must be empty."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert not counts[expected == 0].any()
    possible = expected > 0
    return stats.chisquare(counts[possible], expected[possible] / expected.sum() * counts.sum()).pvalue


def test_marginals_of_every_step(graph):
    walks = draw(graph, rule(topic_steps=(2,), concept_steps=(4,)), seed=11)
    p_tt, p_tc, p_cc = (edges.transition().toarray() for edges in (graph.topic_topic, graph.topic_concept, graph.concept_concept))
    marginal = np.bincount(walks.starts, minlength=len(p_tt)) / len(walks)  # u, but for the last incomplete epoch
    for step in range(3):
        assert step == 0 or chi_square(np.bincount(walks.topics[:, step], minlength=len(marginal)), marginal) > 1e-3
        marginal = marginal @ p_tt if step < 2 else marginal
    marginal = marginal @ p_tc
    for step in range(5):
        assert chi_square(np.bincount(walks.concepts[:, step], minlength=len(marginal)), marginal) > 1e-3
        marginal = marginal @ p_cc


def test_a_wrong_weight_would_be_seen(graph):
    """The test above can fail: uniform steps instead of frequencies are told apart at once."""
    walks = draw(graph, rule(topic_steps=(1,)), seed=12)
    even = (graph.topic_topic.freq.toarray() > 0).astype(float)
    even /= even.sum(axis=1, keepdims=True)
    assert chi_square(np.bincount(walks.topics[:, 1], minlength=len(even)), even.mean(axis=0)) < 1e-6


def exact_paths(transition, path, steps):
    """Probability of each self-avoiding path of up to `steps` steps that begins as `path`, by enumeration."""
    free = {v: p for v, p in enumerate(transition[path[-1]]) if p > 0 and v not in path}
    if not steps or not free:
        return {path: 1.0}
    found = defaultdict(float)
    for v, p in free.items():
        for whole, q in exact_paths(transition, (*path, v), steps - 1).items():
            found[whole] += q * p / sum(free.values())
    return found


@pytest.mark.parametrize("topic", [0, 3])
def test_self_avoiding_paths_are_those_of_exact_enumeration(graph, topic):
    walks = draw(graph, rule(topic_steps=(5,), concept_steps=(3,), self_avoiding=True), seed=13, topic=topic)
    assert len(graph.topics) <= 8
    paths = exact_paths(graph.topic_topic.transition().toarray(), (topic,), 5)
    counts = Counter(tuple(path[path >= 0].tolist()) for path in walks.topics)
    assert set(counts) <= set(paths) and len(paths) > 20
    often = [path for path, p in paths.items() if p * WALKS > 5]  # the chi-square approximation needs some in each cell
    rest = [path for path in paths if path not in set(often)]
    cells = [*often, None] if rest else often
    expected = [sum(paths[path] for path in rest) if cell is None else paths[cell] for cell in cells]
    assert chi_square([sum(counts[path] for path in rest) if cell is None else counts[cell] for cell in cells], expected) > 1e-3
    concepts = np.sort(walks.concepts, axis=1)
    assert not ((concepts[:, 1:] == concepts[:, :-1]) & (concepts[:, 1:] >= 0)).any()


def test_self_avoiding_steps_pass_a_neighbour_that_holds_all_but_nothing():
    """b is 1e6 times as common beside a as c: without b, c must still be found at once."""
    documents = [{"a": [], "b": []}] * 2000 + [{"a": [], "c": []}, {"b": [], "c": []}]
    graph = build_graph(index_documents(documents, {}), 1e-5)
    walks = draw(graph, rule(topic_steps=(2,), self_avoiding=True), seed=3, walks=300)
    assert all(sorted(path) == [0, 1, 2] for path in walks.topics.tolist())


def test_walks_stop_at_isolated_nodes():
    graph = build_graph(index_documents([{"lonely": []}, {"alone": ["only one"]}, {"a": ["x", "y"], "b": []}], {}), 1e-5)
    walks = sample_epochs(graph, PAPER, seed=0, epochs=range(20))
    ids = graph.topics.names.index
    for start, topics, concepts in zip(walks.starts, walks.topics, walks.concepts):
        if start == ids("lonely"):
            assert topics.tolist() == [start, -1, -1] and (concepts == -1).all()
        elif start == ids("alone"):
            assert topics.tolist() == [start, -1, -1] and (concepts >= 0).sum() == 1
        else:
            assert topics[1] >= 0 and concepts[3] >= 0
    sets = walks.sets(graph, "all")
    assert sets[int(np.flatnonzero(walks.starts == ids("lonely"))[0])].indices.tolist() == [ids("lonely")]


def test_every_topic_starts_once_an_epoch(graph):
    walks = sample_epochs(graph, PAPER, seed=7, epochs=range(5))
    assert Counter(walks.starts.tolist()) == dict.fromkeys(range(len(graph.topics)), 5)
    orders = [tuple(walks.starts[walks.epochs == epoch].tolist()) for epoch in range(5)]
    assert all(sorted(order) == list(range(len(graph.topics))) for order in orders) and len(set(orders)) > 1
    assert orders[3] == tuple(epoch_starts(graph, 7, 3))


def test_numbers_of_steps_and_crossings_are_uniform(graph):
    walks = draw(graph, PAPER, seed=5, walks=40_000)
    for path, possible in ((walks.topics, (2, 3)), (walks.concepts, (4, 5))):
        lengths = Counter((path >= 0).sum(axis=1).tolist())
        assert set(lengths) == set(possible) and chi_square([lengths[n] for n in possible], [1, 1]) > 1e-3
    # the first concept: uniform over the distinct topics of a walk, however often one was visited
    p_tc = graph.topic_concept.transition().toarray()
    expected = sum(p_tc[sorted({t for t in path if t >= 0})].mean(axis=0) for path in walks.topics.tolist())
    assert chi_square(np.bincount(walks.concepts[:, 0], minlength=len(expected)), expected) > 1e-3


def test_a_topic_that_was_visited_twice_counts_once():
    """The walk a, b, a goes on from a or b with even chances when it is uniform, from a when it is the last topic that counts."""
    graph = build_graph(index_documents([{"a": ["x"]}, {"b": ["y"]}, {"a": [], "b": []}], {}), 1.0)
    even, last = (draw(graph, rule(topic_steps=(2,), crossing=crossing), seed=8, walks=4000, topic=0) for crossing in ("uniform", "last"))
    assert even.topics.tolist() == last.topics.tolist() == [[0, 1, 0]] * 4000
    assert chi_square(np.bincount(even.concepts[:, 0]), [1, 1]) > 1e-3 and (last.concepts[:, 0] == 0).all()


def test_one_chain_of_concepts_for_each_distinct_topic(graph):
    walks = draw(graph, rule(topic_steps=(2,), concept_steps=(3,), crossing="each"), seed=6, walks=5000)
    chains = walks.concepts.reshape(len(walks), 3, 4)
    linked = graph.topic_concept.freq.toarray() > 0
    for topics, chain in zip(walks.topics.tolist(), chains.tolist()):
        firsts = [place for place, topic in enumerate(topics) if topic not in topics[:place]]
        assert [place for place in range(3) if chain[place][0] >= 0] == firsts
        assert all(linked[topics[place], chain[place][0]] and min(chain[place]) >= 0 for place in firsts)


def test_order_and_number_of_workers_change_nothing(graph):
    whole = sample_epochs(graph, PAPER, seed=9, epochs=range(4))
    order = np.random.default_rng(0).permutation(len(whole))
    for worker in range(3):
        rows = order[worker::3]
        part = sample_walks(graph, PAPER, 9, whole.epochs[rows], whole.starts[rows])
        assert np.array_equal(part.topics, whole.topics[rows]) and np.array_equal(part.concepts, whole.concepts[rows])
    other = sample_epochs(graph, PAPER, seed=10, epochs=range(4))
    assert not np.array_equal(other.concepts, whole.concepts)


def test_the_draws_are_fixed_for_good(graph):
    """A change of the counters would give other sets to a run that is resumed: these were drawn when the format was made."""
    walks = sample_walks(graph, PAPER, 1, np.array([0, 3]), np.array([2, 5]))
    assert [walks.provenance(row) for row in range(2)] == GOLDEN_WALKS


def test_sets_are_sorted_and_distinct(graph):
    walks = sample_epochs(graph, PAPER, seed=2, epochs=range(30))
    both, concepts = walks.sets(graph, "all"), walks.sets(graph, "concepts")
    shift = len(graph.topics)
    for row in range(len(walks)):
        path = walks.provenance(row)
        assert both[row].indices.tolist() == sorted({*path["topics"], *(shift + c for c in path["concepts"])})
        assert concepts[row].indices.tolist() == sorted({shift + c for c in path["concepts"]})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"topic_steps": ()}, "walk.topic_steps"),
        ({"topic_steps": (1.5,)}, "walk.topic_steps"),
        ({"concept_steps": (-1,)}, "walk.concept_steps"),
        ({"concept_steps": (16,)}, "from 0 to 15"),
        ({"crossing": "first"}, "'first' is not one of uniform, last, each"),
    ],
)
def test_rules_that_are_not_allowed(change, words):
    with pytest.raises(UserError, match=words):
        rule(**change)


GOLDEN_WALKS = [
    {"seed": 1, "epoch": 0, "topic": 2, "topics": [2, 5], "concepts": [1, 2, 4, 7]},
    {"seed": 1, "epoch": 3, "topic": 5, "topics": [5, 2], "concepts": [4, 1, 4, 3]},
]
