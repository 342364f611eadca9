"""task=synthesize: the plumbing over replies made by rule, and all of it over a real engine whose replies are held to the forms."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

import generate as entry_point
from components.contracts import Completion, Result, SamplingParams, Usage, UserError
from components.synthesis.concepts import Extraction, render_concepts
from components.synthesis.questions import Question, render_questions
from framework.build import build, compose
from framework.generate import Context
from tests.framework.test_generate import make_run

ROOT = Path(__file__).resolve().parents[3]
CONCEPTS = ("sums", "products", "halves", "ratios")
COMPLETE_IN = 900  # seconds that a killed command gets at most


def document(i):
    return f"Worked example {i}: {CONCEPTS[i % 4]} and {CONCEPTS[(i + 1) % 4]}. Tom has {i + 3} apples and {i * i} pears in {i} bags."


def concepts_in(text):
    return list(dict.fromkeys(re.findall("|".join(CONCEPTS), text)))


def reply(prompt):
    """What a model that keeps to the forms says to the brief prompts: it knows which concepts stand in a text."""
    head, _, rest = prompt.partition("\n")
    number = (re.findall(r"Worked example (\d+)", rest) or ["0"])[0]
    if head == "Concepts:":
        found = concepts_in(rest)
        return render_concepts(Extraction("parsed", "College", "Maths", {f"About {found[0]}": found, "Fruit": ["apples"]}))
    if head == "Question:":
        asked = (f"What is {number} plus {number} times {k} in example {number}, said in many words of number {k}?" for k in range(2))
        return render_questions(Question(text, "College", "original", ()) for text in asked)
    if head == "Combine some:":
        names = tuple(concepts_in(rest)[:2])
        return render_questions([Question(f"Combine {names} for {number} people of the second kind.", None, None, names)])
    if head == "Combine:":
        return render_questions(
            Question(f"Use {line} with {number} in place {place} of drawn ones.", None, None, ())
            for place, line in enumerate(re.findall(r"^Q\d+: (.*)$", rest, re.M))
        )
    if head == "Mix:":
        names = tuple(re.findall("^- (.*)$", rest.partition("[Document 1]")[0], re.M)[-2:])
        return render_questions([Question(f"Mix {' and '.join(names)} after {' '.join(rest.split()[:9])}.", None, "new", names)])
    if head == "Rate:":
        return "8" if "apples" in rest else "2"
    return f"So it is {len(rest)}.\n#### {len(rest)}"


class Scripted:
    """Says what `reply` makes of a prompt; None is no answer."""

    engine_id, model_id, tokenizer_id, capabilities = "scripted:test", "rules", "bytes", frozenset()

    def __init__(self, reply=reply, context_length=None):
        self.reply, self.context_length, self.asked = reply, context_length, []

    async def stream(self, requests, *, concurrency):
        async for request in requests:
            self.asked.append(request.prompt)
            yield self.result(request)

    def result(self, request):
        said = self.reply(request.prompt)
        if said is None:
            return Result(request.id, [], Usage(), {}, self.engine_id, error="timeout: slow")
        finish = "length" if said.endswith("...") else "stop"
        done = [Completion([1] * len(said.split()), said, [-1.0], finish) for _ in range(request.n)]
        return Result(request.id, done, Usage(len(request.prompt.split()), len(said.split())), {}, self.engine_id)

    def close(self):
        pass


def run(home, engine, *more, output="out", max_new_tokens=64):
    words = ["task=synthesize", "task/prompts=brief", f"task.documents={home / 'documents.jsonl'}", f"output={home / output}",
             "task.questions=2", "task.mixing.epochs=2", "task.combining.sampler=code", "task.max_attempts=1", *more]  # fmt: skip
    config = compose("generate", words)
    context = Context(None, engine, SamplingParams(max_new_tokens, seed=1), home / "hydra", home / "cache", lambda path: context)
    return build(config.task).run(context)


def rows_in(folder):
    return pq.read_table(folder / "final" / "data-00000.parquet").to_pylist()


def report(folder):
    return json.loads((folder / "final" / "report.json").read_text())


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted((folder / "final").iterdir())}


def dropped(folder):
    return [json.loads(line) for line in (folder / "final" / "dropped.jsonl").read_text().splitlines()]


@pytest.fixture
def home(tmp_path):
    write(tmp_path, [document(i) for i in range(12)])
    return tmp_path


def write(home, texts):
    (home / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_every_row_says_where_it_comes_from(home):
    run(home, engine := Scripted())
    out, rows = home / "out", rows_in(home / "out")
    assert {row["level"] for row in rows} == {1, 2, 3} and len({row["id"] for row in rows}) == len(rows)
    documents = {one["id"]: one for one in map(json.loads, (out / "final" / "documents.jsonl").read_text().splitlines())}
    calls = {row["request_id"] for path in out.glob("stages/*/final/*.parquet") for row in pq.read_table(path).to_pylist()}
    for row in rows:
        assert set(row["doc_ids"]) <= set(documents) and len(row["doc_ids"]) == (2 if row["level"] == 3 else 1)
        assert set(row["parents"]) <= calls and len(row["parents"]) == 2
        assert row["messages"][0]["content"] == row["question"] and row["messages"][1]["content"] == row["answer"]
        assert row["answer"].endswith(f"#### {len(row['question'])}") and row["finish_reason"] == "stop"
        assert row["models"] == {"question": "rules", "answer": "rules"} and row["prompt_id"].startswith(("level1-", "level2", "level3-"))
        assert (row["walk"] is not None) == (row["level"] == 3)
    for row in (row for row in rows if row["level"] == 2):  # the model named none: they are those that were drawn
        own = documents[row["doc_ids"][0]]["concepts"]
        assert 2 <= len(row["concepts"]) <= 3 and set(row["concepts"]) <= {name for names in own.values() for name in names}
    found = report(out)
    assert found["rows"] == len(rows) and found["documents"] == {"given": 12, "kept": 12, "with_concepts": 12}
    assert found["questions"]["written"] == found["questions"]["kept"] + sum(found["dropped"].values())
    assert found["levels"]["level3"]["adherence"] == 1.0 and found["levels"]["level2"]["pairs_of_concepts"] > 0
    assert len(found["graph"]) == 1 and (out / "graph" / found["graph"][0]["address"] / "graph.graphml").is_file()
    assert (out / "final" / "graph.png").read_bytes()[:4] == b"\x89PNG" and (out / "final" / "diversity.png").is_file()
    assert found["tokens"]["extract"]["prompt"] == sum(len(prompt.split()) for prompt in engine.asked if prompt.startswith("Concepts:"))


def test_the_folder_is_a_data_set(home):
    run(home, Scripted())
    read = datasets.load_dataset(str(home / "out" / "final"), split="train", cache_dir=str(home / "hub"))
    assert read.num_rows == len(rows_in(home / "out")) and read[0]["messages"][1]["role"] == "assistant"


def test_nothing_is_asked_twice_and_the_files_are_the_same(home):
    run(home, Scripted())
    before = bytes_of(home / "out")
    run(home, engine := Scripted())
    assert engine.asked == [] and bytes_of(home / "out") == before


def test_a_changed_stage_or_document_asks_for_what_changed_alone(home):
    run(home, Scripted())
    run(home, engine := Scripted(), "task.answer.methods.none.temperature=0.5")
    assert engine.asked and all(prompt.startswith("Answer:") for prompt in engine.asked)
    run(home, engine := Scripted(), "task.answer.methods.none.temperature=0.8")
    assert engine.asked == []  # what was answered before is still there
    write(home, [document(i) for i in range(13)])
    run(home, engine := Scripted(), "task.levels=[1]")
    assert sorted(prompt.split(":")[0] for prompt in engine.asked) == ["Answer", "Answer", "Question"]
    write(home, [document(i) for i in range(5)])
    run(home, engine := Scripted(), "task.levels=[1]")
    assert engine.asked == [] and {row["level"] for row in rows_in(home / "out")} == {1} and report(home / "out")["rows"] == 10


def test_replies_that_cannot_be_read_are_kept_and_counted(home):
    bad = {"example 0:": "", "example 1:": "none", "example 2:": "<Q1>\nQuestion: Whole?\n</Q1>\n<Q2>\nQuestion: Half", "example 3:": None}

    def odd(prompt):
        if prompt.startswith("Question:"):
            return next((said for key, said in bad.items() if key in prompt), reply(prompt))
        return reply(prompt)

    run(home, Scripted(odd), "task.levels=[1]")
    found = report(home / "out")
    assert found["replies"]["level1"] == {"malformed": 1, "parsed": 8, "refused": 1, "truncated": 1} and found["failed"]["level1"] == 1
    assert found["rows"] == 17 and [row["question"] for row in rows_in(home / "out") if len(row["question"]) < 9] == ["Whole?"]
    kept = {one["reason"]: one["text"] for one in dropped(home / "out")}
    assert kept == {"reply malformed": "", "reply refused": "none", "reply truncated": bad["example 2:"]}


def test_repeats_and_benchmarks_are_left_out(home):
    test = home / "test.jsonl"
    test.write_text(json.dumps({"q": "what IS 2 plus 2  times 0 in example 2, said in many words of number 0 ?"}) + "\n")
    write(home, [*(document(i) for i in range(6)), document(3) + " "])

    def same(prompt):
        return reply(prompt.replace("example 5", "example 4")) if prompt.startswith("Question:") else reply(prompt)

    run(home, Scripted(same), "task.levels=[1]", f"+task.decontamination.benchmarks.own={{path:{test},column:q}}")
    found = report(home / "out")
    assert (
        found["documents"]["given"] == 6 and found["dropped"] == {"question in benchmark": 1, "repeats exactly": 2} and found["rows"] == 9
    )
    assert {one.get("of") for one in dropped(home / "out")} >= {"own/exact"}


def test_an_answer_in_a_benchmark_is_found_too(home):
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    (home / "test.jsonl").write_text(json.dumps({"q": words}) + "\n")

    def leaking(prompt):
        return f"{words} #### 1" if prompt.startswith("Answer:") and "number 1" in prompt else reply(prompt)

    run(home, Scripted(leaking), "task.levels=[1]", f"+task.decontamination.benchmarks.own={{path:{home / 'test.jsonl'},column:q}}")
    assert report(home / "out")["dropped"] == {"answer in benchmark": 12} and report(home / "out")["rows"] == 12


def test_a_vote_leaves_out_what_samples_do_not_agree_on(home):
    turns = iter(range(10**6))

    def unsure(prompt):
        if prompt.startswith("Answer:") and "number 1" in prompt:
            return f"#### {next(turns)}"
        return reply(prompt)

    words = ["task.levels=[1]", "task.answer.verify=vote", "task.answer.methods.vote.n=3", "task.answer.least_votes=0.5"]
    run(home, Scripted(unsure), *words)
    rows = rows_in(home / "out")
    assert len(rows) == 12 and report(home / "out")["dropped"] == {"answers do not agree": 12}
    assert all(json.loads(row["checked"]) == {"verify": "vote", "n": 3, "votes": 3} for row in rows)
    run(home, engine := Scripted(unsure), *words)
    assert engine.asked == []
    run(home, engine := Scripted(), "task.levels=[1]", "task.answer.verify=gsa")
    assert len(engine.asked) == 24 * 4 and json.loads(rows_in(home / "out")[0]["checked"])["verify"] == "gsa"


def test_answers_that_are_cut_off_are_left_out_unless_wanted(home):
    def long(prompt):
        return "it goes on ..." if prompt.startswith("Answer:") and "number 1" in prompt else reply(prompt)

    run(home, Scripted(long), "task.levels=[1]")
    assert report(home / "out")["dropped"] == {"answer cut off": 12}
    run(home, Scripted(long), "task.levels=[1]", "task.answer.keep_cut_off=true")
    assert report(home / "out")["rows"] == 24


def test_documents_are_asked_again_until_they_have_enough(home):
    def second(prompt):
        return "" if prompt.startswith("Question:") and not again.count(prompt) and not again.append(prompt) else reply(prompt)

    again = []
    run(home, engine := Scripted(second), "task.levels=[1]", "task.attempts=2")
    assert sum(prompt.startswith("Question:") for prompt in engine.asked) == 24 and report(home / "out")["rows"] == 24
    run(home, engine := Scripted(), "task.levels=[1]", "task.attempts=2", "task.questions=1", output="one")
    assert report(home / "one")["dropped"] == {"more than wanted": 12} and report(home / "one")["rows"] == 12


def test_drawn_combinations_differ_between_attempts(home):
    run(home, Scripted(), "task.levels=[2]", "task.questions=3", "task.attempts=2")
    by_document = {}
    for row in rows_in(home / "out"):
        by_document.setdefault(row["doc_ids"][0], []).append(frozenset(row["concepts"]))
    assert by_document and all(len(set(sets)) == len(sets) for sets in by_document.values())


def test_documents_are_cut_to_the_context(home):
    engine = Scripted(context_length=100)
    run(home, engine, "task.levels=[1]", max_new_tokens=40)
    assert all(len(prompt.encode()) + 40 <= 100 for prompt in engine.asked if prompt.startswith("Question:"))
    assert report(home / "out")["levels"]["level1"]["calls_shortened"] == 12
    with pytest.raises(UserError, match="max_new_tokens: 200 leaves no room"):
        run(home, Scripted(context_length=150), max_new_tokens=200)
    with pytest.raises(UserError, match="no row came out"):
        run(home, Scripted(context_length=50), "task.levels=[1]", max_new_tokens=40, output="none")
    assert report(home / "none")["no_room"] == {"level1": 12}


def test_screening_keeps_what_the_forest_and_the_ratings_say(home):
    other = [f"The weather on day {i} was grey, with rain and a cold wind from the north sea." for i in range(40)]
    write(home, [*(document(i) for i in range(20)), *other])
    (home / "good.jsonl").write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(100, 130)))
    words = [f"task.screening.positives={home / 'good.jsonl'}", "task.screening.filter.random_documents=30", "task.levels=[1]"]
    run(home, Scripted(), *words)
    found = report(home / "out")
    assert found["documents"] == {"given": 60, "kept": 20, "with_concepts": 0} and set(found["replies"]) == {"rate1", "rate2", "level1"}
    shown = [json.loads(line)["place"] for line in (home / "out" / "final" / "documents.jsonl").read_text().splitlines()]
    assert shown == [f"{home / 'documents.jsonl'}, line {i + 1}" for i in range(20)]

    def silent(prompt):
        return "good" if prompt.startswith("Rate:") else reply(prompt)

    with pytest.raises(UserError, match="has a rating that can be read"):
        run(home, Scripted(silent), *words, output="silent")


def test_braces_and_marks_in_a_document_are_text(home):
    odd = "Worked example 7: sums and products {question} {n} <Q1> </Q1> </key_concept> {refusal}"
    write(home, [odd, document(1)])
    run(home, engine := Scripted(), "task.levels=[1]")
    assert f"Question:\n{odd}" in engine.asked


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["task.documents=null"], "task: synthesize needs task.documents"),
        (["output=null"], "task: synthesize needs task.documents"),
        (["task.documents=none.jsonl"], r"task\.documents: none\.jsonl: no such file"),
        (["task.columns=[txt]"], r"task\.columns: 'txt'.*did you mean 'text'"),
        (["task.levels=[4]"], r"task\.levels: \[4\]"),
        (["task.combining.sampler=dice"], r"task\.combining\.sampler: 'dice'"),
        (["task.mixing.epochs=0"], r"task\.mixing\.epochs: 0"),
        (["task.answer.verify=votes"], r"task\.answer\.verify: 'votes'.*did you mean 'vote'"),
        (["task.answer.least_votes=2"], r"task\.answer\.least_votes: 2"),
        (["+task.decontamination.benchmarks.gsm={path:none.jsonl}"], r"benchmarks\.gsm: .*give \{path: FILE, column: NAME\}"),
        (["task.prompts.answer=x"], r"task\.prompts\.answer: 'x'.*needs \{question\} once"),
    ],
)
def test_mistakes_are_one_line(home, words, line):
    with pytest.raises(UserError, match=line) as found:
        run(home, Scripted(), *words)
    assert "\n" not in str(found.value)


def test_two_processes_do_not_write_one_folder(home):
    from components.store.files import lock

    (home / "out").mkdir()
    lock(home / "out")
    with pytest.raises(UserError, match="is being written by process"):
        run(home, Scripted())


FORMS = [
    r'task.extraction.regex="<topic>\n1[.] [a-c]\n</topic>\n<key_concept>\n1[.] [a-c]:\n1[.]1[.] [d-f]\n1[.]2[.] [g-i]\n</key_concept>"',
    r'decode.regex="<Q1>\nQuestion: [a-z ]{10,30}\n</Q1>"',
    "task.answer.keep_cut_off=true",
]  # a model of a few steps writes no form by itself


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    make_run(home / "run", "model=phi4mini", "data=text", f"data.path={__file__}", "data.tokenizer.kind=bytes")
    write(home, [document(i) for i in range(24)])
    return home


def command(home, output, *more):
    return [f"ckpt={home / 'run'}", "task=synthesize", "task/prompts=brief", f"task.documents={home / 'documents.jsonl'}",
            f"output={output}", f"hydra.run.dir={output}.hydra", f"paths.cache_dir={home / 'cache'}", "engine.max_batch=8",
            "max_new_tokens=80", "task.mixing.most_sets=20", *FORMS, *more]  # fmt: skip


def test_a_real_engine_writes_all_levels(trained, tmp_path, capfd):
    assert entry_point.main(command(trained, tmp_path / "out")) == 0
    err = capfd.readouterr().err
    assert "rows, card and report in" in err and "\nNext: python train.py task=sft data=synthllm" in err
    rows = rows_in(tmp_path / "out")
    assert {row["level"] for row in rows} == {1, 2, 3} and all(row["models"]["question"] == row["models"]["answer"] for row in rows)
    metrics = json.loads(Path(f"{tmp_path / 'out'}.hydra/metrics.json").read_text())
    assert metrics["rows"] == len(rows) and metrics["documents/with_concepts"] == 24 and metrics["levels/level3/questions"] > 0
    seeds = [row["seed"] for row in rows]
    assert len(set(seeds)) == len({row["parents"][0] for row in rows})  # every call has its own


@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_same_files(trained, tmp_path):
    def start(output):
        return subprocess.Popen(
            [sys.executable, "generate.py", *command(trained, output, "task.fsync_rows=1")], cwd=ROOT, stderr=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait(COMPLETE_IN) == 0
    source, kills = random.Random(0), 0
    for _ in range(12):
        process = start(tmp_path / "killed")
        while process.poll() is None and not (tmp_path / "killed" / "lock").exists():
            time.sleep(0.05)
        time.sleep(source.uniform(0.0, 2.0))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(tmp_path / "killed")
    assert process.wait(COMPLETE_IN) == 0 and kills >= 5
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_an_answer_of_another_run(trained, tmp_path, capfd):
    make_run(trained / "other", "model=phi4mini", "data=text", f"data.path={__file__}", "data.tokenizer.kind=bytes", seed=5)
    words = command(trained, tmp_path / "out", "task.levels=[1]", f"task.answer.ckpt={trained / 'other'}", "task.most_documents=4")
    assert entry_point.main(words) == 0, capfd.readouterr().err
    models = rows_in(tmp_path / "out")[0]["models"]
    assert models["question"] != models["answer"]


@pytest.mark.slow
def test_a_cluster_writes_the_same_files(trained, tmp_path):
    """All stages over Ray Data, answers of several calls too."""
    pytest.importorskip("ray")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    ray = ["executor=ray", "executor.workers=2", "executor.object_store_bytes=200000000"]
    for name, more in (("local", []), ("ray", ray)):
        words = command(trained, tmp_path / name, "task.most_documents=6", "task.answer.verify=vote", *more)
        done = subprocess.run([sys.executable, "generate.py", *words], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "local") and {row["level"] for row in rows_in(tmp_path / "ray")} == {1, 2, 3}
