"""Questions of ruler_lite: answers found again by reading the prompts, lengths in tokens, depths, scores of scripted answers."""

from __future__ import annotations

import collections
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from exams import TOKENIZER, Scripted, exam

from components.contracts import UserError
from components.evals.base import Item, any_found, share_found
from components.evals.ruler import RulerLite
from components.evals.ruler_tasks import HAYSTACKS, TASKS

CONF = Path(__file__).parents[3] / "conf" / "eval" / "ruler_lite.yaml"
LENGTHS = [512, 1024]


def ruler(**changes: Any) -> RulerLite:
    node = yaml.safe_load(CONF.read_text())
    del node["_target_"]
    return RulerLite(**{**node, "lengths": LENGTHS, **changes})


def read(prompt: str) -> list[str]:
    """The answers to a prompt, by a reader that knows its wording alone."""
    context, _, question = prompt.rpartition("\nW")
    if "special magic" in question:
        key = re.search(r"special magic numbers? for (\S+?)\?", question)[1]
        return re.findall(rf"magic numbers for {key} is: (\d{{7}})\.", context)
    if "variables" in question:
        links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context)
        found = [re.search(r"value (\d+)", question)[1]]
        for name, value in links:  # in the order of the text
            if value in found:
                found.append(name)
        return found[1:]
    if "come most often" in question:
        words = re.findall(r"[a-z]+", context.partition("Remember them.\n")[2])
        return [word for word, _ in collections.Counter(words).most_common(4)]
    name, kind = re.search(r"(\w+) (live|work|play)\b", question).groups()
    return re.findall(rf"{name} {kind}s (?:in|as a|the) (\w+)\.", context)


def text_of(item: Item) -> str:
    return TOKENIZER.decode(item.prompt)


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_every_answer_stands_in_its_prompt(haystack):
    items = ruler(haystack=haystack).items(exam())
    assert len(items) == len(TASKS) * len(LENGTHS) * 5 * 2
    for item in items:
        assert sorted(read(text_of(item))) == sorted(item.expected), item


def test_a_chain_and_several_values_are_asked_in_the_order_of_the_text():
    for item in ruler(tasks=["niah_multivalue", "variable_tracking"]).items(exam()):
        assert read(text_of(item)) == list(item.expected) and TOKENIZER.decode(item.answer) == " " + ", ".join(item.expected)


def test_common_words_are_much_more_common_than_others():
    for item in ruler(tasks=["common_words"]).items(exam()):
        words = re.findall(r"[a-z]+", text_of(item).partition("Remember them.\n")[2].partition("\nWhich")[0])
        (*common, most_of_others) = [count for _, count in collections.Counter(words).most_common(5)]
        assert common == [6] * 4 and most_of_others <= 3 and not item.answer


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_prompt_and_answer_never_exceed_the_length_and_fill_it(haystack):
    for item in ruler(haystack=haystack).items(exam()):
        room = item.length - len(item.prompt) - item.max_new_tokens
        running = haystack == "text" and item.task not in ("common_words", "qa")
        assert room == 0 if running else 0 <= room < 64, item.task  # no sentence of a filler has 64 bytes
        assert len(item.answer) <= item.max_new_tokens
        assert item.prompt[0] == TOKENIZER.eot_id and TOKENIZER.eot_id not in item.prompt[1:]


@pytest.mark.parametrize("task", [task for task, (_, in_one_place) in TASKS.items() if in_one_place])
def test_depth_is_where_the_answer_lies(task):
    found = set()
    for item in ruler(tasks=[task], haystack="repeat", lengths=[4096]).items(exam()):
        context = text_of(item).partition("\n")[2].rpartition("\nW")[0]
        asked = re.search(r"for (\S+)\?|(\w+) (?:live|work|play)\b", item.asked)
        fact = re.search(rf"[^.]*\b{asked[1] or asked[2]} [^.]*\b{item.expected[0]}\. ?", context)
        assert fact.start() / (len(context) - len(fact[0])) == pytest.approx(
            item.depth, abs=0.04
        )  # sentences are whole, and other facts lie between
        found.add(item.depth)
    assert found == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_a_task_whose_answer_lies_in_many_places_has_as_many_questions_of_no_depth():
    items = ruler().items(exam())
    counts = collections.Counter((item.task, item.length) for item in items)
    assert set(counts.values()) == {10}
    assert {item.task for item in items if item.depth is None} == {"niah_multivalue", "variable_tracking", "common_words"}


def test_running_text_is_that_of_the_run_without_marks_of_documents():
    marked = [TOKENIZER.eot_id if i % 10 == 0 else 120 for i in range(2000)]
    (item, *_) = ruler(tasks=["niah_single"]).items(exam(text=marked))
    assert TOKENIZER.eot_id not in item.prompt[1:] and "xxxxxxxxxx" in text_of(item)


def test_a_short_text_begins_anew():
    (item, *_) = ruler(tasks=["niah_single"], lengths=[2048]).items(exam(text=list(b"abcdefg ")))
    assert "abcdefg " * 100 in text_of(item) and len(item.prompt) == 2048 - item.max_new_tokens


def test_a_seed_makes_the_same_questions_whatever_else_is_asked():
    whole = ruler().items(exam())
    assert whole == ruler().items(exam())
    assert whole != ruler(seed=2).items(exam())
    some = ruler(tasks=["qa", "niah_multikey"], lengths=[1024]).items(exam())
    assert some and all(item in whole for item in some)
    short, long = ([item.expected for item in whole if item.length == length] for length in LENGTHS)
    assert short == long and len(set(short)) > 50  # the same questions at every length, different ones within


def test_lengths_follow_the_trained_length_where_none_are_given():
    assert {item.length for item in ruler(lengths=None, tasks=["qa"]).items(exam(trained_length=300))} == {300, 600, 1200}


def test_in_a_conversation_the_question_is_the_users_and_the_lead_the_assistants():
    before, after = (
        [TOKENIZER.eot_id, TOKENIZER.special_id("<|user|>")],
        [TOKENIZER.special_id("<|end|>"), TOKENIZER.special_id("<|assistant|>")],
    )
    for item in ruler().items(exam(frame=(before, after))):
        prompt = list(item.prompt)
        assert prompt[:2] == before and len(prompt) + item.max_new_tokens <= item.length
        assert TOKENIZER.decode(prompt[: prompt.index(after[0])]).endswith("?")
        assert (
            prompt[prompt.index(after[0]) :][:2] == after
            and TOKENIZER.decode(prompt[prompt.index(after[1]) :])[0] in "TABCDEFGHIJKLMNOPQRSTUVWXYZ"
        )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (lambda prompt: " " + ", ".join(read(prompt)).lower(), {task: 1.0 for task in TASKS}),
        (lambda prompt: " I do not know", {task: 0.0 for task in TASKS}),
        (
            lambda prompt: " " + read(prompt)[-1],
            {"niah_single": 1.0, "niah_multikey": 1.0, "niah_multivalue": 0.25, "variable_tracking": 0.2, "common_words": 0.25, "qa": 1.0},
        ),
    ],
    ids=["perfect", "wrong", "one of them"],
)
def test_scores_of_scripted_answers(reply, expected):
    rows = list(ruler().rows(exam(Scripted(reply))))
    assert len(rows) == 120
    for row in rows:
        assert row.values["score"] == expected[row.task], row


def test_the_answer_loss_is_that_of_the_answers_tokens():
    """A model that finds every token equally likely among 320."""
    rows = list(ruler().rows(exam(Scripted(lambda prompt: ""))))
    for row in rows:
        if row.task == "common_words":
            assert "answer_loss" not in row.values and row.record["answer_losses"] == []
        else:
            assert row.values["answer_loss"] == pytest.approx(math.log(320), abs=1e-5)
            assert len(row.record["answer_losses"]) == len(" " + ", ".join(row.record["expected"]))  # of bytes
    assert all("answer_loss" not in row.values for row in ruler(answer_loss=False, tasks=["qa"]).rows(exam(Scripted(str))))


def test_progress_counts_every_token_that_is_read_once():
    seen = []
    items = ruler(tasks=["qa", "common_words"]).items(exam())
    rows = ruler(tasks=["qa", "common_words"]).rows(exam(Scripted(str), progress=lambda done, total, what: seen.append((done, total))))
    assert len(list(rows)) == len(items) == 40
    total = sum((len(item.prompt) + item.max_new_tokens) * (2 if item.task == "qa" else 1) for item in items)
    assert {whole for _, whole in seen} == {total} and seen[-1][0] == total
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_scores_are_rulers():
    assert share_found(["abc", "xyz"], "It is ABC") == 0.5 and any_found(["abc", "xyz"], "It is ABC") == 1.0
    assert share_found(["abc"], "ab c") == any_found(["abc"], "ab c") == 0.0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tasks": ["niah"]}, r"eval.tasks: 'niah' is not one of niah_single, .*; did you mean 'niah_single'\?"),
        ({"tasks": []}, r"eval.tasks: \[\]; must be a list of different ones of niah_single"),
        ({"lengths": [1]}, r"eval.lengths: \[1\]; must be a list of different whole numbers"),
        ({"depths": [0.0, 1.5]}, r"eval.depths: \[0.0, 1.5\]; must be a list of different numbers from 0 to 1"),
        ({"samples": 0}, r"eval.samples: 0; must be a whole number of at least 1"),
        ({"haystack": "tekst"}, r"eval.haystack: 'tekst' is not one of text, repeat, sentences, needles; did you mean 'text'\?"),
        ({"max_new_tokens": {"qa": 3}}, r"eval.max_new_tokens: nothing for niah_single; write eval.max_new_tokens.niah_single=NUMBER"),
        ({"max_new_tokens": {"qi": 3}}, r"eval.max_new_tokens: 'qi' is not one of .*did you mean 'qa'\?"),
    ],
)
def test_bad_values_are_refused(changes, line):
    with pytest.raises(UserError, match=line):
        ruler(**changes)


def test_what_does_not_fit_is_refused_with_the_least_that_does():
    with pytest.raises(
        UserError, match=r"eval.lengths: 300 tokens; with this tokenizer all chosen tasks fit into no less than (\d+) "
    ) as found:
        ruler(lengths=[300, 512], tasks=["niah_single", "niah_multikey"]).items(exam())
    least = int(re.search(r"no less than (\d+)", str(found.value))[1])
    assert "niah_multikey" in str(found.value) and "niah_single" not in str(found.value)
    ruler(lengths=[least], tasks=["niah_single", "niah_multikey"]).items(exam())
    with pytest.raises(UserError, match=f"{least}"):
        ruler(lengths=[least - 1], tasks=["niah_multikey"]).items(exam())
    with pytest.raises(UserError, match=r"eval.max_new_tokens.qa: 3; with this tokenizer its answers take \d or more; raise it"):
        ruler(tasks=["qa"], max_new_tokens={"qa": 3}).items(exam())
    with pytest.raises(
        UserError, match=r"eval.lengths: 1024 tokens; this engine takes at most 1000; choose shorter ones, or another engine"
    ):
        ruler().items(exam(limit=1000))


def test_without_the_runs_text_another_haystack_is_named():
    def gone(least, most, key):
        raise UserError("data.path: no such file")

    with pytest.raises(UserError, match=r"data.path: no such file; the haystack needs the run's data; eval.haystack=repeat does without"):
        ruler().items(exam(source=gone))
