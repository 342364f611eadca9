"""Lessons: every reply is read by the parsers as what it says, and every prompt is one that a synthesis asks."""

from __future__ import annotations

import numpy as np
import pytest

from components.contracts import UserError
from components.synthesis.calls import Asker, Combining, Document
from components.synthesis.concepts import parse_concepts
from components.synthesis.lessons import Lessons, Tagger, renumbered
from components.synthesis.prompts import Prompts
from components.synthesis.questions import parse_questions
from framework.build import build_data, compose
from tests.components.synthesis.test_calls import WORDS

TABLE = {"Money": {"price": ["price", "cost"], "pay": ["pays"]}, "Time": {"hours": ["hour", "hours"]}}
ONE = ("Tom pays 12 dollars an hour for 3 hours. What is the cost of 12 hours?", "12*12=144\n#### 144")
TWO = ("Ann walks. She pays the price of 250. How many hours?", "She has 7.\n#### 7")


def document(name, problem):
    return Document(name, "\n".join(problem), "")


def lessons(sampler):
    made = Lessons(Asker(Prompts("nothing", **WORDS), lambda prompt: True), Tagger(TABLE), Combining(sampler, [2, 3]), 3)
    return dict(made.of(document("a", ONE), ONE, document("b", TWO), TWO))


@pytest.mark.parametrize("sampler", ["prompt", "code"])
def test_replies_are_read_back(sampler):
    said = {prompt.split()[0]: reply for prompt, reply in lessons(sampler).items()}
    assert parse_concepts(said["Find"], "nothing").concepts == {"Money": ["price", "pay"], "Time": ["hours"]}
    first, second = parse_questions(said["Ask"], "nothing").questions
    assert (first.text, first.origin, second.origin) == (ONE[0], "original", "new")
    assert second.text != ONE[0] and len(second.text) == len(ONE[0])
    for question in parse_questions(said["Use" if sampler == "code" else "Choose"], "nothing").questions:
        assert 2 <= len(question.concepts) <= 3 and set(question.concepts) <= {"price", "pay", "hours"}
    (mixed,) = parse_questions(said["Mix"], "nothing").questions
    assert mixed.text.startswith("Ann walks. Tom pays ") and len(mixed.concepts) in (1, 2)
    assert said["Tom"] == ONE[1] and said["Rate"] == "9"


def test_a_document_without_concepts_is_refused():
    made = Lessons(Asker(Prompts("nothing", **WORDS), lambda prompt: True), Tagger(TABLE), Combining("code", [2]), 3)
    plain = ("Who?", "Me.")
    said = {prompt.split()[0]: reply for prompt, reply in made.of(document("a", plain), plain, document("b", TWO), TWO)}
    assert said["Find"] == "nothing" and set(said) == {"Find", "Rate", "Who?", "Ask"}


def test_numbers_change_alike_and_keep_their_length():
    new = renumbered("12 and 12, 7, 1,000, 2.5, 3rd and 40.", np.random.default_rng(0))
    words = new.split()
    assert words[0] == words[2][:2] != "12" and words[4:7] == ["1,000,", "2.5,", "3rd"] and len(new) == 37


@pytest.mark.parametrize("table", [{}, {"Money": {"price": []}}, {"Money": {"sale": [False]}}])
def test_a_table_needs_words(table):
    with pytest.raises(UserError, match=r"data\.concepts"):
        Tagger(table)


def test_the_option_holds_whole_problems_out(tmp_path):
    rows = [f'{{"question": "Tom has {i} hours. How many are left?", "answer": "All {i}.\\n#### {i}"}}' for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    words = ["task=sft", "data=synthllm_lessons", f"data.path={tmp_path / 'train.jsonl'}", "data.val_fraction=0.3"]
    data = build_data(compose("train", [*words, "data.tokenizer.kind=bytes"]))
    data.prepare(tmp_path / "cache")
    (corpus,) = data._corpora()
    parts = [{one.key.split("#")[0] for one in part} for part in (corpus.train(), corpus.held_out())]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 60 and 5 < len(parts[1]) < 35
    assert data.render([{"role": "user", "content": "x"}])[-1] == data.tokenizer.special_id("<|assistant|>")
    (tmp_path / "train.jsonl").write_text('{"question": "Only", "answer": ""}')
    with pytest.raises(UserError, match="is no problem with a solution"):
        build_data(compose("train", [*words])).prepare(tmp_path / "other")
