"""Items of a benchmark are found however they are dressed up, and clean texts are left alone."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest

from components.errors import UserError
from components.synthesis.decontamination import Benchmarks, Hit, read_benchmark
from components.synthesis.text import words

NAMES, THINGS = ["Ann", "Bo", "Cleo", "Dan"], ["apples", "pens", "stamps", "coins"]
DATA = os.environ.get("PATCHBAY_DATA", "")  # a folder with gsm8k/ as its authors publish it


def made_items(count, seed):
    """Thirty words in a row; two of these texts share no thirteen of them, since a number stands in every eight."""
    source = random.Random(seed)
    return [
        f"{source.choice(NAMES)} has {source.randint(100, 9999)} {source.choice(THINGS)} and buys {source.randint(100, 9999)} more at "
        f"${source.randint(100, 9999)} each. After giving {source.randint(100, 9999)} of them to {source.choice(NAMES)}, how many "
        f"are left, is it more than {source.randint(100, 9999)}?"
        for _ in range(count)
    ]


def one_word_changed(text, source):
    begin, end = source.choice([word.span() for word in re.finditer(r"\w+", text)])
    return text[:begin] + "zebra" + text[end:]


def dressings(source):
    """Ways of changing an item that must not hide it."""
    return {
        "verbatim": lambda text: text,
        "re-cased": lambda text: "".join(source.choice([c.upper(), c.lower()]) for c in text),
        "re-spaced": lambda text: re.sub(" ", lambda _: source.choice([" ", "  ", "\n", "\t"]), text),
        "without spaces beside signs": lambda text: re.sub(r"\s*([^\w\s])\s*", r"\1", text),
        "within another text": lambda text: f"Read this first. {text} Explain your answer.",
        "one word changed": lambda text: one_word_changed(text, source),
    }


@pytest.mark.parametrize("name", list(dressings(random.Random())))
def test_injected_items_are_caught(name):
    items, clean = made_items(60, seed=1), made_items(200, seed=2)
    injected = [dressings(random.Random(3))[name](item) for item in items]
    found = Benchmarks({"made": items}, 13).check([*clean, *injected])
    assert found.hits[: len(clean)] == [None] * len(clean)
    exact = name in ("verbatim", "re-cased", "re-spaced", "without spaces beside signs")
    assert found.hits[len(clean) :] == [Hit("made", "exact" if exact else "overlap")] * len(items)
    assert found.counts == {"made/exact": len(items) * exact, "made/overlap": len(items) * (not exact)}


def test_thirteen_words_in_a_row_and_no_fewer():
    item = " ".join(f"w{number}" for number in range(30))
    benchmarks = Benchmarks({"made": [item]}, 13)
    run = [f"W{number}," for number in range(5, 18)]
    assert benchmarks.check([" ".join(["x", *run, "y"])]).hits == [Hit("made", "overlap")]
    assert benchmarks.check([" ".join(["x", *run[1:], "y"])]).hits == [None]
    assert benchmarks.check([" ".join(["x", *run[1:]]), " ".join([run[0], "y"])]).hits == [None, None]  # a run does not cross texts


def test_short_items_are_counted_and_found_whole():
    benchmarks = Benchmarks({"long": ["word " * 20], "short": ["What is 3+4?", "word " * 13]}, 13)
    assert benchmarks.short == {"long": 0, "short": 1}
    found = benchmarks.check(["what is 3 + 4 ?", "What is 3-4?", "Tell me: What is 3+4?", "", "word " * 15])
    assert found.hits == [Hit("short", "exact"), None, None, None, Hit("long", "overlap")]  # the first benchmark that is hit
    assert found.counts == {"long/exact": 0, "long/overlap": 1, "short/exact": 1, "short/overlap": 0}
    assert benchmarks.check([]).hits == []


def test_files(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n{"question": "c?"}\n')
    assert read_benchmark("made", path, "question") == ["a?", "c?"]
    with pytest.raises(
        UserError, match=r"decontamination\.benchmarks\.made: .*line 2: no text in column 'answer'; its columns are question"
    ):
        read_benchmark("made", path, "answer")
    with pytest.raises(UserError, match="no such file"):
        read_benchmark("made", tmp_path / "none.jsonl", "question")
    (tmp_path / "text.txt").write_text("a?")
    with pytest.raises(UserError, match="rows with a column 'question'"):
        read_benchmark("made", tmp_path / "text.txt", "question")


def test_bad_settings():
    with pytest.raises(UserError, match=r"decontamination\.benchmarks\.made: no items"):
        Benchmarks({"made": []}, 13)
    with pytest.raises(UserError, match=r"decontamination\.words: 0"):
        Benchmarks({"made": ["a"]}, 0)


@pytest.mark.skipif(not DATA, reason="PATCHBAY_DATA names no folder with gsm8k/train.jsonl and test.jsonl")
def test_gsm8k():
    """No training question is a test question; of test questions with one word changed, at least 98 in 100 are caught."""
    train, test = ([json.loads(line)["question"] for line in (Path(DATA) / "gsm8k" / f"{part}.jsonl").open()] for part in ("train", "test"))
    benchmarks = Benchmarks({"gsm8k": test}, 13)
    assert min(len(words(text)) for text in test) >= 13
    assert benchmarks.check(train).counts == {"gsm8k/exact": 0, "gsm8k/overlap": 4}
    for name, dress in dressings(random.Random(0)).items():
        caught = sum(hit is not None for hit in benchmarks.check([dress(text) for text in test]).hits)
        assert caught >= (0.98 if name == "one word changed" else 1.0) * len(test), name
