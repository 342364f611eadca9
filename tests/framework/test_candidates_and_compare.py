"""task=candidates writes what a last call is asked; task=compare counts ways of answering by hand-written scripts, and on a real run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from components.contracts import Completion, UserError
from components.decoding.answers import Reader
from components.decoding.rounds import Query, seed_of
from framework import answering, decoding
from framework.answering import Remembering, Speaker, is_right, problems_of
from framework.build import compose
from framework.tasks.candidates import Candidates, StoppedShort, balanced
from framework.tasks.compare import Compare, Way, by_candidates, figures_of
from framework.train import train
from tests.framework.scripted import Scripted, option, render, setting

BARE = {"template__text": "{candidates}{query}", "template__before": "", "template__after": "\n"}
MODEL = ["model=phi4mini", "model/size=test", "data=reasoning", "data.operations=1", "data.seq_len=64", "logger=none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps on a few problems: it solves none."""
    folder = tmp_path_factory.mktemp("base")
    words = [
        *MODEL, "task=sft", "data.train_problems=40", "data.val_problems=5", "data.batch_size=4", "trainer.max_steps=2",
        "samples.every_steps=0", f"paths.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.train.loss_curve", lambda *args: None)
        train(compose("train", words), folder / "run")
    return folder / "run"


def said(text):
    """Completions of a fixed script by prompt: three samples of a problem in turn."""
    return Completion([1], text, [-1.0], "stop")


def test_the_row_is_what_decoding_asks_word_for_word():
    """One source of truth: the prompt that is learnt is the second prompt of the method itself, with the same seeds."""
    method = option("gsa", **BARE)
    engine = Scripted(lambda prompt, params: f"{params.seed % 7} #{params.seed % 3}")
    query = Query("q", "1+2=")
    (trace,) = decoding.run_queries(StoppedShort(method), [query], engine, render, setting())
    shown = trace.answer.notes["said"]
    (whole,) = decoding.run_queries(method, [query], Scripted(engine.reply), render, setting())
    assert shown == whole.calls[-1].ask.said
    assert [one.text for one in trace.answer.candidates] == [call.completion.text for call in whole.calls[:3]]
    assert shown.endswith("1+2=") and shown.count("\n") == 3 and len(engine.rounds) == 1


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: option("self_consistency"), "makes no call after its samples"),
        (lambda: option("gsa", redraw=["empty"]), "draws samples again"),
    ],
)
def test_a_method_without_one_last_call_is_refused(method, words):
    with pytest.raises(UserError, match=words):
        list(decoding.run_queries(StoppedShort(method()), [Query("q", "x")], Scripted(lambda *_: ""), render, setting()))


def test_no_number_of_right_candidates_outweighs_the_others():
    lessons = [(3, {"i": i}) for i in range(10)] + [(0, {"i": 10}), (1, {"i": 11}), (1, {"i": 12})]
    assert balanced(lessons, 1.0) == lessons
    kept = balanced(lessons, 0.5)
    assert [k for k, _ in kept] == [3, 3, 3, 0, 1, 1] and [row["i"] for _, row in kept] == [0, 1, 2, 10, 11, 12]
    assert sorted(k for k, _ in balanced(lessons, 1 / 4)) == [0, 1, 3]  # equally many of each that there is
    assert len(balanced(lessons[:10], 1 / 4)) == 10  # no other k to keep a balance with


def test_equal_calls_are_made_once():
    inner = Scripted(lambda prompt, params: f"{prompt}{params.seed}")
    engine, greedy = Remembering(inner), option("greedy").params(8, 1)
    prompts = [list(b"a"), list(b"b"), list(b"a")]
    first = dict(engine.completions(prompts, [greedy] * 3))
    again = dict(engine.completions(prompts[:2], [greedy] * 2))
    assert [first[i].text for i in range(3)] == ["a1", "b1", "a1"] and again[1] is first[1]
    assert [len(calls) for calls in inner.rounds] == [2, 0]


def test_an_answer_counts_that_ended_and_says_the_same():
    reader = Reader("number", "#")
    assert is_right(reader, said("7*3=21 #21"), "#21.0") and not is_right(reader, said("21"), "#21")
    assert not is_right(reader, Completion([1], "#21", [], "length"), "#21")


def test_groups_and_fresh_samples_by_hand():
    """Four problems; the way `a` shows two candidates, `b` three, whose last one the groups do not depend on."""
    a = Way([True, False, True, False], [[True, True], [False, False], [True, False], [False, False]], 0, 0, {"calls": 3.0}, [])
    b = Way([True, True, False, False], [[True, True, False], [False, False, True], [True, False, True], [False] * 3], 1, 2, {}, [])
    found = by_candidates({"a": a, "b": b}, "a")
    assert (found["problems@k=0"], found["problems@k=1"], found["problems@k=2"]) == (2, 1, 1)
    assert (found["a/accuracy@k=0"], found["b/accuracy@k=0"], found["a/accuracy@k=1"], found["b/accuracy@k=1"]) == (0, 0.5, 1, 0)
    assert (found["b/fresh@k=0"], found["b/fresh@k=1"], found["b/fresh@k=2"]) == (0.5, 1, 0) and "a/fresh@k=0" not in found
    assert figures_of("b", b) == {"b/accuracy": 0.5, "b/unparsed": 1, "b/cut_off": 2, "b/pass": 0.75}


def test_one_call_is_the_first_sample():
    method, sampler = option("gsa"), option("gsa").sampler
    first = next(method.answer(Query("q", "x"), setting()))[0]
    assert next(decoding.OneCall(sampler.params).answer(Query("q", "x"), setting())) == [first]


def test_problems_come_from_a_file_or_the_data(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text('{"question": "Two?", "answer": "#### 2"}\n{"question": "Three?", "answer": "#### 3"}\n')
    assert problems_of(None, str(file), "val", None) == [("Two?", "#### 2"), ("Three?", "#### 3")]
    data = SimpleNamespace(problems=lambda split: [(split, "1"), (split, "2")])
    assert problems_of(data, None, "val", 1) == [("val", "1")]
    with pytest.raises(UserError, match="has no problems with solutions; take data=reasoning"):
        problems_of(object(), None, "val", None)


def read_traces(folder):
    return [json.loads(line)["trace"] for line in (folder / "results.jsonl").open()]


def who_says(length, prompt="p" * 10):
    """A speaker whose sample i of any problem has length(i) tokens, and problems with prompts of 10 tokens."""
    seeds = {seed_of(1, name, "sample", i): i for name in decoding.query_ids([prompt, prompt]) for i in range(200)}
    inner = Scripted(lambda _, params: "x" * length(seeds[params.seed]))
    return Speaker(Remembering(inner), render, setting(), lambda tokens: 1.0), [(prompt, "1")] * 2, inner


@pytest.mark.parametrize(
    ("length", "tokens", "n"),
    [
        (lambda i: 30, 100, 3),  # 10 + 30 n
        (lambda i: 30, 100.5, 4),  # a mean over problems
        (lambda i: 30, 5, 1),
        (lambda i: 50 if i else 1, 60, 2),  # 61 at two; the guess from the first sample goes far beyond
        (lambda i: 1 if i else 90, 110, 11),  # and here it stays far below
    ],
)
def test_as_many_tokens_as_another_way(length, tokens, n):
    who, asked, inner = who_says(length)
    compare = object.__new__(Compare)
    compare.reader = Reader("number", None)
    vote = option("self_consistency", n=7)
    way = compare.as_many_tokens(vote, tokens, asked, who, SimpleNamespace(progress=lambda *_: None))
    assert way.n == n and vote.n == 7 and all(len(some) == n for some in way.candidates)
    assert way.costs["processed_tokens"] == 10 + sum(length(i) for i in range(n)) and way.costs["calls"] == n
    calls = [call for calls in inner.rounds for call in calls]
    assert len({params.seed for _, params in calls}) == len(calls)  # none was made twice


def words(run, folder, *more):
    own = [*MODEL, f"ckpt={run}", "task.read.mark='#'", "task.max_new_tokens=4", f"paths.cache_dir={folder / 'cache'}", *more]
    return compose("train", own)


def test_both_tasks_on_a_real_run(run, tmp_path):
    """The rows hold problems that the run was not trained on; the ways answer the same held-out ones, and the files fit the report."""
    bare = ["data.seed=0", "data.train_problems=60", "data.val_problems=5"]
    made = train(words(run, tmp_path, "task=candidates", "task.groups=2", *bare), tmp_path / "made")
    solve, rows = ([json.loads(line) for line in (tmp_path / "made" / f"{name}.jsonl").open()] for name in ("solve", "aggregate"))
    learned = answering.learned(str(run))
    assert len(learned) == 40 and not {row["prompt"] for row in solve} & learned  # of 60 problems, 40 are those of the run
    assert (made["rows/solve"], made["rows/aggregate"], made["candidates/known"]) == (len(solve), len(rows), 40)
    assert len(rows) == 2 * len(solve) == 40 and made["candidates/samples"] == 120 and made["candidates/k=0"] == 40  # it solves none
    assert {row["completion"] for row in rows} == {row["completion"] for row in solve}
    assert len({row["prompt"] for row in rows}) == 40  # both groups of a problem are draws of their own
    folder = tmp_path / "compared"
    small = ["task.pairs=[[gsa,greedy]]", "decode/template@task.ways.gsa.template=bare"]
    figures = train(words(run, tmp_path, "task=compare", *small, *bare), folder)
    assert figures["problems"] == 5 and figures["gsa/accuracy"] == 0 and figures["problems@k=0"] == 5
    assert (figures["gsa/calls"], figures["gsa-greedy/p"]) == (4, 1.0)
    from framework.decoding_report import read

    _, way = read(folder / "gsa", None)
    assert len(way.values) == 5 and way.costs["calls"] == 20 and way.by_candidates == {0: (5, 0)}
    # The vote that is as many tokens: one sample fewer would be too few; its samples are those of the vote over four, and more.
    votes, more = (read_traces(folder / name) for name in ("self_consistency", "self_consistency_tokens"))
    n, spent = figures["self_consistency_tokens/n"], [trace["usage"]["processed_tokens"] for trace in more]
    assert sum(spent) >= 5 * figures["gsa/processed_tokens"] > sum(spent) - sum(trace["calls"][-1]["tokens"] for trace in more)
    assert figures["self_consistency_tokens/processed_tokens"] == pytest.approx(sum(spent) / 5)
    assert n > 4 and all(len(trace["candidates"]) == trace["usage"]["calls"] == n for trace in more)
    assert [trace["candidates"][:4] for trace in more] == [trace["candidates"] for trace in votes]
    for trace in more:  # by hand: the prompt once, and all that was written
        prompt, written = trace["calls"][0]["prompt_tokens"], sum(call["tokens"] for call in trace["calls"])
        assert trace["usage"]["processed_tokens"] == prompt + written


@pytest.mark.parametrize(
    ("task", "change", "line"),
    [
        ("compare", "task.by=gas", r"task\.by: 'gas' is not one of greedy, self_consistency, .*gsa; did you mean 'gsa'"),
        ("compare", "task.pairs=[[gsa,gready]]", r"task\.pairs: 'gready' is not one of .*did you mean 'greedy'"),
        ("compare", "+task.equal_tokens={self_consistency: gas}", r"task\.equal_tokens\.self_consistency: 'gas' is not one .* mean 'gsa'"),
        ("compare", "+task.equal_tokens={greedy: gsa}", r"task\.equal_tokens: greedy has no number of samples"),
        ("compare", "+task.equal_tokens={gsa: self_consistency_tokens}", r"equal_tokens.*samples of .* are chosen too; name a way"),
        ("compare", "+task.of={greedy: other}", r"task\.of\.greedy: 'other' is not one of"),
        ("candidates", "task.k_most=0.1", r"task\.k_most: 0\.1; from 1/4"),
        ("candidates", "task.groups=0", r"task\.groups: 0; at least 1"),
    ],
)
def test_bad_values_are_one_line(run, tmp_path, task, change, line):
    config = words(run, tmp_path, f"task={task}", change, "data.train_problems=20", "data.val_problems=5")
    with pytest.raises(UserError, match=line):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_needed(tmp_path):
    config = compose("train", [*MODEL, "task=compare", "data.train_problems=20", "data.val_problems=5", f"paths.cache_dir={tmp_path}"])
    with pytest.raises(UserError, match="ckpt: null; random weights answer nothing"):
        train(config, tmp_path / "run")
    assert Candidates and Compare
