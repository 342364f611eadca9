"""Data with tasks: which task each token has, how tasks are mixed and resumed, what is held out and asked, and what is refused."""

import json
import pickle
from collections import Counter

import pytest
import torch

from components.contracts import IGNORE, UserError
from components.data.chat import ChatData
from components.data.multitask import MultitaskData
from components.data.readers import read_records
from components.data.templates import PromptTemplate
from components.data.text import TextData
from components.data.tokenizers import bytes_tokenizer

BYTES = {"kind": "bytes", "vocab_size": 300, "path": None}
EOT = bytes_tokenizer().eot_id
PLAIN = PromptTemplate("{instruction} ({input}): ", "{instruction}: ")
OPTIONS = {
    "mixing": "proportional", "temperature": 2.0, "template": PLAIN, "tokenizer": BYTES, "seq_len": 32, "batch_size": 4,
    "val_fraction": 0.2, "loss_on": "completion", "pack": True, "encoding_errors": "strict", "num_workers": 0,
}  # fmt: skip


def rows(task, count, first=0):
    return [
        {"instruction": f"{task} {i}", "input": "", "output": f"it is {i % 7}", "answer": str(i % 7)} for i in range(first, first + count)
    ]


def write(path, records):
    text = json.dumps(records, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in records)
    path.write_text(text)
    return str(path)


def three_tasks(folder):
    """A .json list with a held-out file, a .jsonl and a .json that hold out a part."""
    return {
        "red": {"path": write(folder / "red.json", rows("red", 40)), "val_path": write(folder / "red_val.json", rows("red", 6, 900))},
        "green": {"path": write(folder / "green.jsonl", rows("green", 160))},
        "blue": {"path": write(folder / "blue.json", rows("blue", 10))},
    }


def prepared(folder, tasks=None, **changes):
    data = MultitaskData(tasks or three_tasks(folder), **(OPTIONS | changes))
    data.prepare(folder / "cache")
    return data


def said(batch, names):
    """(task by the ids of its tokens, text) of every document of every row; checks that padding has id 0."""
    found = []
    for ids, tasks, labels in zip(batch.input_ids.tolist(), batch.task_ids.tolist(), batch.labels.tolist(), strict=True):
        starts = [i for i, token in enumerate(ids) if token == EOT]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if end - start == 1 or all(token == EOT for token in ids[start:end]):
                assert tasks[start] == 0 or labels[start] != IGNORE  # padding
                continue
            (task,) = set(tasks[start:end])
            found.append((names[task], bytes_tokenizer().decode(ids[start + 1 : end])))
    return found


def test_every_token_knows_the_task_of_its_document(tmp_path):
    data = prepared(tmp_path)
    assert data.task_names == ("red", "green", "blue")
    for batches in (data.train_stream(3), data.val_batches()):
        found = [one for batch in batches for one in said(batch, data.task_names)]
        assert {task for task, _ in found} == set(data.task_names)
        for task, text in found:
            assert text.startswith(task), (task, text)
    batch = next(iter(data.train_stream(3)))
    assert batch.task_ids.shape == batch.input_ids.shape and batch.task_ids.dtype == torch.int64


def test_padding_has_the_first_id(tmp_path):
    """Where a row of the last task ends early: what fills it up is of no task, and 0 stands there."""
    data = prepared(tmp_path, {"red": str(write(tmp_path / "a.json", rows("red", 9))), "blue": write(tmp_path / "b.json", rows("blue", 9))},
                    seq_len=40, pack=False)  # fmt: skip
    seen = 0
    for batch in data.train_stream(0):
        for ids, tasks, labels in zip(batch.input_ids, batch.task_ids, batch.labels, strict=True):
            last = int((labels != IGNORE).nonzero()[-1])
            own = "blue" in bytes_tokenizer().decode(ids.tolist())
            assert tasks[: last + 1].tolist() == [int(own)] * (last + 1) and not tasks[last + 1 :].any()
            seen += own
    assert seen


def test_only_answers_and_their_ends_are_labels(tmp_path):
    data = prepared(tmp_path)
    for batch in data.val_batches():
        for labels in batch.labels:
            text = bytes_tokenizer().decode(t for t in labels.tolist() if t not in (IGNORE, EOT))
            assert text == "".join(f"it is {c}" for c in text[6::7])
            assert int((labels == EOT).sum()) * 7 == len(text)
    whole = prepared(tmp_path, loss_on="all")
    assert whole.summary()["train_tokens"] > data.summary()["train_tokens"]


def test_the_question_is_the_prompt_of_the_training_row(tmp_path):
    """Training, generation and evaluation go through one template: their ids are the same."""
    template = PromptTemplate("Do: {instruction}\nWith: {input}\n", "Do: {instruction}\n")
    example = {"instruction": "add {input}", "input": "1 2", "output": "3"}
    data = prepared(tmp_path, {"one": write(tmp_path / "one.json", [example, {**example, "input": ""}] * 5)}, template=template)
    trained = set()
    for batch in [*data.train_stream(0), *data.val_batches()]:
        trained |= {text for _, text in said(batch, ("one",))}
    asked = {question.prompt for question in data.held_out_questions()["one"]}
    assert asked <= {"Do: add {input}\nWith: 1 2\n", "Do: add {input}\n"}
    assert {f"{prompt}3" for prompt in asked} <= trained
    data.tokenizer = bytes_tokenizer()
    assert data.render([{"role": "user", "content": "add {input}"}]) == [EOT, *b"Do: add {input}\n"]
    with pytest.raises(UserError, match="not conversations"):
        data.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_questions_are_what_is_held_out(tmp_path):
    data = prepared(tmp_path)
    trained = {text for batch in data.train_stream(0) for _, text in said(batch, data.task_names)}
    held_out = {text for batch in data.val_batches() for _, text in said(batch, data.task_names)}
    for name, questions in data.held_out_questions().items():
        asked = list(questions)
        assert len(asked) == data.summary()[f"val_rows/{name}"] > 0
        for question in asked:
            text = f"{question.prompt}it is {question.answer}"
            assert text in held_out and text not in trained
    assert {q.prompt for q in data.held_out_questions()["red"]} == {f"red {i}: " for i in range(900, 906)}


def test_prompt_and_completion_and_answers_without_a_label(tmp_path):
    data = prepared(tmp_path, {"one": write(tmp_path / "one.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)])})
    assert all(q.answer == "c" + q.prompt[1:].rstrip(": ") for q in data.held_out_questions()["one"])


def test_problems_are_questions_without_the_template_and_every_one_is_in_one_split(tmp_path):
    """GSM8K's own fields; a row with an input is no single question."""
    records = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(20)]
    extra = {"instruction": "add", "input": "1 2", "output": "3"}
    tasks = {"one": write(tmp_path / "one.jsonl", records), "two": write(tmp_path / "two.json", [extra] * 20)}
    data = prepared(tmp_path, tasks)
    train, val = data.problems("train"), data.problems("val")
    assert sorted(train + val) == sorted((r["question"], r["answer"]) for r in records) and val
    assert {prompt for prompt, _ in val} == {q.prompt.rstrip(": ") for q in data.held_out_questions()["one"]}


def shares(data, epochs=1):
    """Rows of each task in some epochs of the stream."""
    stream, found = data.train_stream(5), Counter()
    for _ in range(epochs):
        for batch in stream:
            found.update(data.task_names[i] for i in batch.task_ids[:, 0].tolist())
    return found


@pytest.mark.parametrize(("mixing", "power"), [("proportional", 1.0), ("uniform", 0.0), ("temperature", 1 / 3)])
def test_mixing_shares_rows_out(tmp_path, mixing, power):
    data = prepared(tmp_path, mixing=mixing, temperature=3.0, batch_size=1)
    sizes = dict(zip(data.task_names, (rows.count for rows in data._train_rows()), strict=True))
    assert len(set(sizes.values())) == 3
    found, total = shares(data), sum(sizes.values())
    wanted = {name: size**power for name, size in sizes.items()}
    for name in sizes:
        assert abs(found[name] - total * wanted[name] / sum(wanted.values())) < 1  # exact to rounding
    if mixing == "proportional":
        assert found == sizes


def test_a_weight_multiplies_the_share(tmp_path):
    tasks = three_tasks(tmp_path)
    tasks["blue"]["weight"] = 2.0
    found = shares(prepared(tmp_path, tasks, mixing="uniform", batch_size=1))
    assert abs(found["blue"] - 2 * found["red"]) <= 2 and abs(found["red"] - found["green"]) <= 1


def ids_of(stream, count):
    return [batch.input_ids for _, batch in zip(range(count), stream, strict=False)]


@pytest.mark.parametrize("mixing", ["uniform", "temperature"])
def test_the_mixture_is_a_function_of_seed_and_epoch_and_goes_on_exactly(tmp_path, mixing):
    data = prepared(tmp_path, mixing=mixing)
    stream = data.train_stream(7)
    epochs = [[(b.input_ids, b.task_ids) for b in stream] for _ in range(2)]
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(*epochs, strict=True))
    for at in (0, 3, len(epochs[1]) - 1):
        again = prepared(tmp_path, mixing=mixing).train_stream(7)  # from the cache
        again.load_state_dict({"epoch": 1, "position": at})
        for batch, (ids, tasks) in zip(again, epochs[1][at:], strict=True):
            assert torch.equal(batch.input_ids, ids) and torch.equal(batch.task_ids, tasks)
    other = next(iter(data.train_stream(8)))
    assert not torch.equal(other.input_ids, epochs[0][0][0])


def test_ranks_share_the_batches_and_workers_know_the_tasks(tmp_path):
    data = prepared(tmp_path, mixing="uniform", batch_size=2)
    whole = prepared(tmp_path, mixing="uniform", batch_size=4)
    ranks = [data.train_stream(1, rank=rank, world_size=2) for rank in (0, 1)]
    for a, b, both in zip(*ranks, whole.train_stream(1), strict=True):
        assert torch.equal(torch.cat([a.task_ids, b.task_ids]), both.task_ids)
    stream = data.train_stream(1)
    here, there = stream.batch(0, 1), pickle.loads(pickle.dumps(stream)).batch(0, 1)
    assert torch.equal(here.task_ids, there.task_ids) and here.task_ids.any()


def test_each_task_is_measured_by_itself(tmp_path):
    data = prepared(tmp_path)
    sets = data.evaluations()
    assert list(sets) == ["red", "green", "blue"]
    counts = {}
    for name, batches in sets.items():
        found = [one for batch in batches for one in said(batch, data.task_names)]
        assert {task for task, _ in found} == {name} and all(text.startswith(name) for _, text in found)
        counts[name] = len(found)
    assert sum(counts.values()) == sum(len(said(batch, data.task_names)) for batch in data.val_batches())
    facts = data.summary()
    assert {name: facts[f"val_rows/{name}"] for name in sets} == counts
    assert {name: facts[f"rows/{name}"] for name in sets} == {"red": 40, "green": 160 - counts["green"], "blue": 10 - counts["blue"]}


def test_another_template_or_order_is_another_run(tmp_path):
    tasks = three_tasks(tmp_path)
    data = prepared(tmp_path, tasks)
    assert prepared(tmp_path, tasks).fingerprint == data.fingerprint
    turned = prepared(tmp_path, dict(reversed(tasks.items())))
    assert turned.fingerprint != data.fingerprint  # its ids are others
    longer = prepared(tmp_path, tasks, template=PromptTemplate("{instruction}, {input}: ", "{instruction}?: "))
    assert longer.fingerprint["train"] != data.fingerprint["train"]


def test_data_without_tasks_has_no_ids_and_reads_json_as_text(tmp_path):
    path = write(tmp_path / "rows.json", rows("red", 60))
    options = {"tokenizer": BYTES, "seq_len": 32, "batch_size": 2, "val_fraction": 0.2, "val_path": None, "encoding_errors": "strict"}
    text = TextData(path, column="text", document_mask=True, eval_lengths=[], num_workers=0, window_mix=None, **options)
    text.prepare(tmp_path / "cache")
    assert text.task_names == () and text.summary()["documents"] == 2  # the head of the one document, and its tail
    assert next(iter(text.train_stream(0))).task_ids is None and next(iter(text.val_batches())).task_ids is None
    assert text.train_stream(0)._weights == [float(text._train_rows()[0].count)]
    chat = ChatData(write(tmp_path / "chat.json", [{"prompt": f"p{i}", "completion": "c"} for i in range(9)]), loss_on="all", pack=True,
                    num_workers=0, **options)  # fmt: skip
    chat.prepare(tmp_path / "cache")
    assert next(iter(chat.train_stream(0))).task_ids is None


REFUSED = {
    "no tasks": ({}, {}, "data.tasks: {}; give at least one task"),
    "no name": ({"": "x.json"}, {}, "data.tasks: '' is no name of a task"),
    "a number": ({7: "x.json"}, {}, "data.tasks: 7 is no name of a task"),
    "a name with a slash": ({"a/b": "x.json"}, {}, "data.tasks: 'a/b' is no name"),
    "a typo": ({"a": {"paht": "x.json"}}, {}, "data.tasks.a.paht: unknown key; allowed are path, val_path, weight; did you mean 'path'"),
    "no path": ({"a": {"weight": 1}}, {}, "data.tasks.a.path: None; give a file"),
    "a list of nodes": ({"a": {"path": [{"path": "x"}]}}, {}, r"data.tasks.a.path: \[\{'path': 'x'\}\]; give a file"),
    "no node": ({"a": 3}, {}, "data.tasks.a: 3; give"),
    "weight": ({"a": {"path": "x.json", "weight": 0}}, {}, "data.tasks.a.weight: 0; must be a number above 0"),
    "mixing": ({"a": "x.json"}, {"mixing": "unifrom"}, "data.mixing: 'unifrom' is not one of .*did you mean 'uniform'"),
    "temperature": ({"a": "x.json"}, {"temperature": 0.0}, "data.temperature: 0.0; must be above 0"),
}


@pytest.mark.parametrize(("tasks", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_before_any_file_is_read(tasks, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        MultitaskData(tasks, **(OPTIONS | changes))
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "fields": ([{"question": "q", "reply": "a"}], "row 1 has only question, reply; an example needs instruction and output, or prompt"),
    "no text": ([{"instruction": "q", "output": 3}], "row 1: output holds int, not text"),
    "input": ([{"instruction": "q", "output": "a", "input": [1]}], "row 1: input holds list, not text"),
    "empty": ([{"instruction": "q", "output": ""}], "row 1: output is empty"),
    "no row": ([3], "row 1 is a int, not an object"),
    "no list": ({"a": 1}, "holds a dict, not a list of rows"),
    "one row": ([{"instruction": "q", "output": "a"}], r"one document cannot be split; .* data.tasks.one.val_path"),
    "long": ([{"instruction": "q" * 40, "output": f"{i}"} for i in range(9)], "data.seq_len: 32; every prompt of task one is longer"),
}


@pytest.mark.parametrize(("records", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_line(tmp_path, records, message):
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path, {"one": write(tmp_path / "bad.json", records)})
    assert "\n" not in str(caught.value)


def test_broken_json_and_missing_files(tmp_path):
    (tmp_path / "bad.json").write_text('[{"a": 1},')
    with pytest.raises(UserError, match=r"not valid JSON .*is the file complete"):
        list(read_records(tmp_path / "bad.json"))
    with pytest.raises(UserError, match=r"data.tasks.one.path: .*badd.json: no such file or folder; did you mean 'bad.json'"):
        prepared(tmp_path, {"one": str(tmp_path / "badd.json")})
    (tmp_path / "plain.txt").write_text("words")
    with pytest.raises(UserError, match="plain text holds no examples"):
        prepared(tmp_path, {"one": str(tmp_path / "plain.txt")})


def test_templates_need_their_fields():
    for key, words in (("with_input", ("{instruction}", "{instruction}")), ("without_input", ("{instruction} {input}", "{input}"))):
        with pytest.raises(UserError, match=f"data.template.{key}: has .*it needs"):
            PromptTemplate(*words)
    assert PromptTemplate("{input}{instruction}", "{instruction}").render("{input}", "{instruction}") == "{instruction}{input}"


def test_json_lists_count_rows_as_jsonl_does(tmp_path):
    same = rows("red", 5)
    for kind in ("json", "jsonl"):
        write(tmp_path / f"r.{kind}", same)
    found = [list(read_records(tmp_path / f"r.{kind}")) for kind in ("json", "jsonl")]
    assert [record for _, record in found[0]] == [record for _, record in found[1]] == same
    assert [place for place, _ in found[0]] == [f"row {i}" for i in range(1, 6)]
