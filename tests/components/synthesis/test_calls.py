"""Calls of the stages: drawn combinations, sets of level 3 with their documents, room in the context, names."""

from __future__ import annotations

import pytest

from components.errors import UserError
from components.synthesis.calls import Asker, Combining, Document, Mixing
from components.synthesis.corpus import index_documents
from components.synthesis.prompts import Prompts, joined
from components.synthesis.walks import WalkRule
from tests.components.synthesis.made_up import random_documents

WORDS = {
    "compose": "{subject} {style}", "rate": "Rate {document}", "extract": "Find {document}", "level1": "Ask {n} {document}",
    "level2": "Choose {concepts} {document}", "level2_drawn": "Use {concepts} {document}", "level3": "Mix {concepts} {document}",
    "answer": "{question}",
}  # fmt: skip
WALK = WalkRule([1, 2], [3, 4], "uniform", False)


def asker(limit=None, **changed):
    return Asker(Prompts("no", **{**WORDS, **changed}), lambda prompt: limit is None or len(prompt) <= limit)


def documents(count):
    return [Document(f"d{i}", f"text {i} " + "x" * i, f"line {i}") for i in range(count)]


def test_braces_of_a_document_stay_and_names_follow_what_is_asked():
    odd = Document("a", "{concepts} {n} {refusal}", "")
    (call,) = asker().on_each("level1", [odd], n=3)
    assert call.prompt == "Ask 3 {concepts} {n} {refusal}"
    others = [*asker().on_each("level1", [odd], 1, 3), *asker().on_each("level1", [Document("b", odd.text, "")], 0, 3)]
    assert len({call.name, *(one.name for one in others)}) == 3 and next(asker().on_each("level1", [odd], n=3)).name == call.name


@pytest.mark.parametrize("limit", range(9, 60, 5))
def test_the_longest_beginning_that_fits_is_shown(limit):
    pair = documents(40)[10::20]
    call = asker(limit).call("level3", pair, concepts="c")
    full = f"Mix c {joined([one.text for one in pair])}"
    if call is None:
        assert limit < len("Mix c ") + len(joined(["t", "t"]))
        return
    assert len(call.prompt) <= limit or call.prompt == full
    most = max(len(one.text) for one in pair)
    longer = [f"Mix c {joined([one.text[:cut] for one in pair])}" for cut in range(1, most + 1)]
    assert call.prompt == max((one for one in longer if len(one) <= limit), key=len) and call.shortened == (call.prompt != full)


def test_no_room_is_counted():
    tight = asker(5)
    assert list(tight.on_each("extract", documents(3))) == [] and tight.no_room == {"extract": 3}


@pytest.mark.parametrize(("names", "n"), [(2, 3), (3, 2), (5, 4), (20, 6)])
def test_combinations_are_drawn_once_and_attempts_go_on(names, n):
    """Two names have one pair and no triple, three have four sets, five have twenty."""
    offered, rule = [f"c{i}" for i in range(names)], Combining("code", [2, 3])
    drawn = [rule.draw(offered, n, 7, "doc", attempt) for attempt in range(4)]
    sets = [frozenset(one) for some in drawn for one in some]
    assert len(set(sets)) == len(sets) and all(2 <= len(one) <= 3 for one in sets)
    possible = names * (names - 1) // 2 + names * (names - 1) * (names - 2) // 6
    assert len(sets) == min(possible, 4 * n)
    assert drawn[0] == rule.draw(offered, n, 7, "doc", 0) and (names < 5 or drawn[0] != rule.draw(offered, n, 8, "doc", 0))


def test_combinations_are_drawn_evenly():
    """Of 5 names: half of the combinations are one of 10 pairs, half one of 10 triples; chi-square with 19 degrees of freedom."""
    rule, counts = Combining("code", [2, 3]), {}
    for i in range(4000):
        (one,) = rule.draw("abcde", 1, 0, str(i), 0)
        counts[frozenset(one)] = counts.get(frozenset(one), 0) + 1
    assert len(counts) == 20 and sum((count - 200) ** 2 / 200 for count in counts.values()) < 43.8  # p = 0.001


@pytest.mark.parametrize("shards", [1, 3])
def test_sets_of_level_three_say_their_walk_and_have_the_nearest_documents(shards):
    texts, known = documents(30), random_documents(30, 1)
    mixing = Mixing(WALK, 2, 3, None, shards, 1e-5, "all", 2)
    parts = list(mixing.graphs(known, {}))
    calls = list(mixing.calls(asker(), texts, parts, 5))
    assert len(parts) == shards and len(calls) == sum(2 * len(graph.topics) for _, _, graph in parts)
    assert calls == list(mixing.calls(asker(), texts, parts, 5)) and len({call.name for call in calls}) == len(calls)
    for call in calls:
        part, corpus, _ = parts[call.walk["shard"]]
        own = {one.id: set(row) | {name for names in row.values() for name in names} for one, row in zip(texts[part], known[part])}
        members = {*call.topics, *call.offered}
        best = sorted(own, key=lambda name: (-len(members & own[name]) / len(members | own[name]), int(name[1:])))[:2]
        assert list(call.documents) == best and len(corpus) == len(own)
        assert call.prompt.startswith(f"Mix - {call.topics[0]}\n")


def test_the_first_sets_alone():
    known = random_documents(20, 2)
    all_of_them = Mixing(WALK, 1, 3, None, 1, 1e-5, "all", 2)
    some = Mixing(WALK, 1, 3, 4, 1, 1e-5, "all", 2)
    parts = list(some.graphs(known, {}))
    assert list(some.calls(asker(), documents(20), parts, 1)) == list(all_of_them.calls(asker(), documents(20), parts, 1))[:4]
    assert list(some.graphs([], {})) == [] and list(some.graphs([{}], {})) == []


def test_documents_with_too_few_concepts_are_left_out_of_level_two():
    concepts = {"d0": {"t": ["a"]}, "d1": {"t": ["a", "A."]}, "d2": {"t": ["a"], "u": ["b"]}}
    for sampler in ("prompt", "code"):
        (call,) = asker().on_own_concepts(documents(4), concepts, Combining(sampler, [2, 3]), 0, 2, 1)
        assert call.documents == ("d2",) and call.offered == ("a", "b") and bool(call.combinations) == (sampler == "code")


def test_a_prompt_needs_its_fields():
    with pytest.raises(UserError, match=r"task\.prompts\.level3: 'Mix'.*needs \{concepts\} once"):
        asker(level3="Mix")
    assert index_documents([], {}).topics.names == []
