"""The world of concepts: answers by another way, what each level may combine, nested subsets, what is held out, what is refused."""

from itertools import permutations

import pytest

from components.contracts import IGNORE, UserError
from components.data.concepts_world import CONCEPTS, EXERCISES, LENGTH, ConceptsWorld, World
from components.data.tokenizers import bytes_tokenizer

DECODE = bytes_tokenizer().decode
OPTIONS = {
    "level": 2, "samples": 64, "documents": 60, "chapters": 20, "held_out": 0.1, "val_samples": 50, "seed": 0,
    "tokenizer": {"kind": "bytes", "vocab_size": 300, "path": None}, "seq_len": 8 * LENGTH, "batch_size": 2, "num_workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return World(chapters=20, documents=60, share=0.1, seed=0)


def solved(text):
    """The answer to `4+7*3=`, read from its characters from left to right."""
    x = int(text[0])
    for sign, n in ((text[1], int(text[2])), (text[3], int(text[4]))):
        x = {"+": (x + n) % 10, "-": (x - n) % 10, "*": x * n % 10, "%": x % n, "<": min(x, n), ">": max(x, n)}[sign]
    return str(x)


def unordered(pairs):
    return {frozenset(pair) for pair in pairs}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_answer_is_that_of_another_reader(world, level):
    questions = world.questions(level)
    assert len(questions) == 60 * EXERCISES
    assert all(q.answer == solved(q.text) and len(q.text) == LENGTH - 3 for q in questions)


def test_answers_by_hand():
    assert [solved(text) for text in ("4+7*3=", "2-5%4=", "9<3>6=")] == ["3", "3", "6"]


def test_each_level_combines_what_it_may(world):
    chapters = [set(chapter) for chapter in world.chapters]
    told = [chapters[i] for i in world.chapter_of]
    pairs = {level: {q.pair for q in world.questions(level)} for level in (1, 2, 3)}
    assert sorted(world.questions(1)) == sorted(world.exercises)  # copies
    assert all(set(q.pair) <= told[q.source] for level in (1, 2) for q in world.questions(level))
    assert all(a.topic != b.topic for a, b in pairs[3])
    assert any(not any({a, b} <= chapter for chapter in chapters) for a, b in pairs[3])  # across documents
    assert pairs[1] < pairs[1] | pairs[2] and len(pairs[1]) < len(pairs[2]) < len(pairs[3])
    text = "\n".join(world.documents())
    assert all(q.text + "?" in text for q in world.exercises) and not any(q.text + q.answer in text for q in world.exercises)


def test_held_out_pairs_are_nowhere_else(world):
    held = {q.pair for q in world.held_out(50)}
    used = {q.pair for level in (1, 2, 3) for q in world.questions(level)}
    assert not unordered(held) & unordered(used)
    assert all(world.is_held_out(pair) and world.is_held_out(pair[::-1]) for pair in held)
    share = sum(map(world.is_held_out, permutations(CONCEPTS, 2))) / len(CONCEPTS) / (len(CONCEPTS) - 1)
    assert 0.07 < share < 0.13


def test_smaller_sets_are_prefixes_and_the_seed_alone_decides():
    texts = {n: [d.text() for d in ConceptsWorld(**OPTIONS | {"samples": n, "level": 3})._corpus.train()] for n in (32, 64)}
    assert texts[64][:32] == texts[32] and len(set(texts[64])) > 40
    other = [d.text() for d in ConceptsWorld(**OPTIONS | {"level": 3, "seed": 1})._corpus.train()]
    assert other != texts[64]


def test_only_the_answer_is_a_label_and_rows_are_full(tmp_path):
    data = ConceptsWorld(**OPTIONS)
    data.prepare(tmp_path)
    batch = next(iter(data.train_stream(seed=1)))
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        places = [i for i, label in enumerate(labels) if label != IGNORE]
        assert len(places) == 8 and all(chr(ids[i]) == "=" for i in places)
        assert all(chr(labels[i]) == solved(DECODE(ids[i - 5 : i + 1])) for i in places)
    assert sum((b.labels != IGNORE).sum().item() for b in data.evaluations()["cross"]) == 50
    found = data.diversity()
    assert 0 < found["within_source_cosine"] < 1 and found["distinct_pairs"] <= found["distinct_questions"] <= 64


def test_documents_are_whole_texts(tmp_path):
    data = ConceptsWorld(**OPTIONS | {"level": 0, "samples": 10, "seq_len": 160})
    data.prepare(tmp_path)
    assert data.summary()["truncated"] == 0 and data.summary()["train_tokens"] > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": 4}, "data.level"),
        ({"samples": 301}, "data.samples: 301; 60 documents give 300 at level 2; raise data.documents"),
        ({"samples": 61, "level": 0}, "60 documents give 60 at level 0"),
        ({"held_out": 1.5}, "data.held_out"),
        ({"chapters": 0}, "data.chapters"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(UserError) as refused:
        ConceptsWorld(**OPTIONS | changes)
    assert message in str(refused.value)


def test_too_many_held_out(tmp_path):
    with pytest.raises(UserError, match=r"data.val_samples: 5000; there are \d+ questions that combine concepts anew; lower it"):
        ConceptsWorld(**OPTIONS | {"val_samples": 5000}).prepare(tmp_path)
    with pytest.raises(UserError, match=r"data.samples: 300; this world has \d+ questions of level 2; raise data.documents or lower"):
        ConceptsWorld(**OPTIONS | {"samples": 300, "held_out": 0.7}).prepare(tmp_path)
    with pytest.raises(UserError, match=r"data.held_out: 0.9999; so large a share"):
        World(chapters=5, documents=10, share=0.9999, seed=0)
