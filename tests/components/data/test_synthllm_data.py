"""`data=synthllm`: the files of a synthesis, which rows are trained on and held out, and what is refused."""

import hashlib
import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.contracts import IGNORE, UserError
from components.data.synthllm import COLUMNS, SynthLLMData
from components.data.tokenizers import SPECIALS
from framework.build import compose
from framework.train import train

BYTES = {"kind": "bytes", "vocab_size": 300, "path": None}
MARKS = "ends in <|end|><|assistant|> é 中 🙂 <|endoftext|>"  # text of a user, whatever it looks like
TEXT, TEXTS, INT = pa.string(), pa.list_(pa.string()), pa.int64()
SCHEMA = pa.schema(
    [
        ("id", TEXT), ("level", INT), ("question", TEXT), ("answer", TEXT),
        ("messages", pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))), ("topics", TEXTS), ("concepts", TEXTS), ("doc_ids", TEXTS),
        ("origin", TEXT), ("school_level", TEXT), ("models", pa.struct([("question", TEXT), ("answer", TEXT)])), ("prompt_id", TEXT),
        ("sampling", TEXT), ("seed", INT), ("tokens", pa.struct([("prompt", INT), ("completion", INT)])), ("finish_reason", TEXT),
        ("parents", TEXTS),
    ]
)  # fmt: skip


def row(i: int, **changes):
    """A row as the synthesis writes it: level 1, 2, 3, 1 ..., the answers the longer the higher the level."""
    level = i % 3 + 1
    question = f"What is {i} plus {level}?"
    answer = f"It is {i + level}." + " Check it again." * (2 * level - 2) + (MARKS if i % 10 == 0 else "")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "id": hashlib.sha256(question.encode()).hexdigest()[:32], "level": level, "question": question, "answer": answer,
        "messages": messages, "topics": ["Arithmetic"], "concepts": ["Sums", "Checks"], "doc_ids": [f"doc{i}"],
        "origin": "new" if level == 1 else None, "school_level": None, "models": {"question": "q", "answer": "a"}, "prompt_id": "p",
        "sampling": "{}", "seed": i, "tokens": {"prompt": 9, "completion": 5}, "finish_reason": "stop", "parents": [],
    } | changes  # fmt: skip


def write_final(folder, rows, files=1):
    final = folder / "final"
    final.mkdir(parents=True)
    for n in range(files):
        pq.write_table(pa.Table.from_pylist(rows[n::files], schema=SCHEMA), final / f"data-{n:05d}.parquet")
    (final / "README.md").write_text("A data card.\n")
    for name in ("report.json", "manifest.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """150 rows in two files, 50 of each level."""
    return write_final(tmp_path_factory.mktemp("made"), [row(i) for i in range(150)], files=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def made(path, **changes):
    options = {"levels": [1, 2, 3], "samples": None, "tokens": None, "seed": 0, "tokenizer": BYTES, "seq_len": 256, "batch_size": 2}
    options |= {"val_fraction": 0.1, "val_path": None, "loss_on": "completion", "pack": True, "encoding_errors": "strict"}
    return SynthLLMData(path=str(path) if not isinstance(path, list) else path, num_workers=0, **(options | changes))


def prepared(path, cache, **changes):
    data = made(path, **changes)
    data.prepare(cache)
    return data


def documents(data, split):
    """Every document of a split as text with its marks."""
    texts = set()
    for file in data._files[split]:
        starts = file.documents.tolist()
        found = [data.tokenizer.decode(file.tokens[a:b].tolist(), keep_specials=True) for a, b in pairwise(starts)]
        assert len(set(found)) == len(found) and not texts & set(found)
        texts |= set(found)
    return texts


def conversation(one):
    return f"<|endoftext|><|user|>{one['question']}<|end|><|assistant|>{one['answer']}<|end|>"


def test_the_columns_are_those_of_the_file():
    assert tuple(SCHEMA.names) == COLUMNS == tuple(row(0))


def test_every_row_is_trained_on_or_held_out(folder, cache):
    data = prepared(folder, cache)
    learnt, held_out = documents(data, "train"), documents(data, "val")
    assert not learnt & held_out and learnt | held_out == {conversation(row(i)) for i in range(150)}
    facts = data.summary()
    assert facts["rows"] == len(learnt) == sum(facts[f"rows_level_{level}"] for level in (1, 2, 3))
    assert sum(facts[f"held_out_level_{level}"] for level in (1, 2, 3)) == len(held_out) and 5 < len(held_out) < 30
    assert facts["left_out"] == facts["repeated"] == 0 and facts["source"] == str(folder)
    text = data.tokenizer
    assert facts["tokens"] == sum(
        len(text.encode(row(i)["question"] + row(i)["answer"])) + 5 for i in range(150) if conversation(row(i)) in learnt
    )


def test_only_answers_count_and_marks_in_them_are_text(folder, cache):
    data = prepared(folder, cache, pack=False)
    answers = {row(i)["answer"] for i in range(150)}
    seen = set()
    for batch in data.train_stream(0):
        for labels in batch.labels:
            text = data.tokenizer.decode(labels[labels != IGNORE].tolist(), keep_specials=True)
            assert text.endswith("<|end|><|endoftext|>") or len(text) > 200  # or cut at the end of the row
            seen.add(text.removesuffix("<|end|><|endoftext|>"))
    assert seen <= answers and any(MARKS in text for text in seen)
    everything = prepared(folder, cache, loss_on="all")
    assert everything.summary()["train_tokens"] == everything.summary()["tokens"] > data.summary()["train_tokens"]
    assert everything.chat_template and made("unread").chat_template  # an export asks a run whose data are gone


@pytest.mark.parametrize("form", ["DIR", "final", "file", "jsonl", "list", "glob"])
def test_every_way_to_name_the_rows_gives_the_same(folder, cache, tmp_path, form):
    files = sorted((folder / "final").glob("*.parquet"))
    rows = [one for file in files for one in pq.read_table(file).to_pylist()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "one.parquet")
    path = {
        "DIR": folder, "final": folder / "final", "file": tmp_path / "one.parquet", "jsonl": tmp_path / "rows.jsonl",
        "list": list(map(str, files)), "glob": folder / "final" / "*.parquet",
    }[form]  # fmt: skip
    data, wanted = prepared(path, cache, samples=40), prepared(folder, cache, samples=40)
    assert documents(data, "train") == documents(wanted, "train") and documents(data, "val") == documents(wanted, "val")
    assert data.fingerprint == wanted.fingerprint


def test_the_datasets_library_reads_the_folder_too(folder, cache, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("parquet", data_dir=str(folder / "final"), cache_dir=str(tmp_path / "hub"))["train"]
    assert loaded.column_names == list(COLUMNS) and loaded[0]["messages"][0] == {"role": "user", "content": "What is 0 plus 1?"}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: loaded)  # as if it had been put on the hub
    data, wanted = prepared("hub:someone/made", cache), prepared(folder, cache)
    assert documents(data, "train") == documents(wanted, "train") and documents(data, "val") == documents(wanted, "val")


def test_smaller_sets_lie_in_larger_ones_and_the_same_is_held_out(folder, cache):
    whole = prepared(folder, cache)
    sets = [documents(prepared(folder, cache, samples=n), "train") for n in (10, 20, 100)]
    assert sets[0] < sets[1] < sets[2] < documents(whole, "train") and list(map(len, sets)) == [10, 20, 100]
    other = prepared(folder, cache, samples=20, seed=1)
    assert len(documents(other, "train")) == 20 and documents(other, "train") != sets[1]
    one = prepared(folder, cache, samples=10, levels=2)
    for data in (prepared(folder, cache, samples=10), other, one):
        assert documents(data, "val") == documents(whole, "val")
        assert data.summary()["left_out"] == whole.summary()["rows"] - data.summary()["rows"]
    levels = {len(text.split("Check")) // 2 + 1 for text in documents(one, "train")}
    assert levels == {2} and one.summary()["rows_level_2"] == 10 and one.summary()["rows_level_1"] == 0


def test_more_rows_move_none_between_the_sides(tmp_path, cache):
    small, large = write_final(tmp_path / "a", [row(i) for i in range(90)]), write_final(tmp_path / "b", [row(i) for i in range(40, 180)])
    before, after = prepared(small, cache), prepared([str(small), str(large)], cache)
    assert documents(before, "val") < documents(after, "val") and documents(before, "train") < documents(after, "train")
    assert after.summary()["repeated"] == 50


def test_tokens_are_the_shortest_prefix_that_has_them(folder, cache):
    data = prepared(folder, cache, levels=3, tokens=1500)
    rows, tokens = data.summary()["rows"], data.summary()["tokens"]
    assert tokens >= 1500
    assert prepared(folder, cache, levels=3, samples=rows).fingerprint == data.fingerprint  # a prefix of the same order
    assert prepared(folder, cache, levels=3, samples=rows - 1).summary()["tokens"] < 1500
    assert prepared(folder, cache, levels=3, tokens=tokens).summary()["rows"] == rows
    assert prepared(folder, cache, levels=3, tokens=tokens + 1).summary()["rows"] == rows + 1
    assert prepared(folder, cache, levels=1, tokens=1500).summary()["rows"] > 1.5 * rows  # their answers are shorter


def test_a_tokenizer_is_that_of_all_rows(folder, cache):
    """Otherwise subsets would count tokens differently, and no two of them could be compared."""
    bpe = {"kind": "bpe", "vocab_size": 280, "path": None}
    few, one, whole = (prepared(folder, cache, tokenizer=bpe, **c) for c in ({"samples": 5}, {"levels": 3, "tokens": 500}, {}))
    assert few.tokenizer.fingerprint == one.tokenizer.fingerprint == whole.tokenizer.fingerprint
    assert whole.tokenizer.vocab_size > 256 + len(SPECIALS)
    budgets = [prepared(folder, cache, tokens=2000, tokenizer=kind) for kind in (BYTES, bpe)]
    assert budgets[0].summary()["rows"] < budgets[1].summary()["rows"] and budgets[0].baselines() != budgets[1].baselines()


def test_what_is_held_out_is_measured_by_level(folder, cache):
    data = prepared(folder, cache, levels=1, samples=20)
    labels = {name: sum(batch.loss_tokens for batch in batches) for name, batches in data.evaluations().items()}
    assert list(labels) == ["level_1", "level_2", "level_3"] and labels["level_1"] < labels["level_2"] < labels["level_3"]
    assert sum(labels.values()) == data.summary()["val_tokens"] == sum(batch.loss_tokens for batch in data.val_batches())


def test_rows_held_out_of_their_own(tmp_path, cache):
    path, own = write_final(tmp_path / "a", [row(i) for i in range(60)]), write_final(tmp_path / "b", [row(i) for i in range(54, 75)])
    data = prepared(path, cache, val_path=str(own))
    assert documents(data, "val") == {conversation(row(i)) for i in range(54, 75)}
    assert documents(data, "train") == {conversation(row(i)) for i in range(54)}


def test_a_later_start_reads_no_row(folder, cache, monkeypatch, capsys):
    first = prepared(folder, cache, samples=30)
    assert "30 rows to train on (" in capsys.readouterr().err
    monkeypatch.setattr("components.data.synthllm.identity", None)
    again = prepared(folder, cache, samples=30)
    assert again.summary() == first.summary() and again.fingerprint == first.fingerprint
    assert list(again.evaluations()) == list(first.evaluations())
    assert f"{first.summary()['left_out']} not chosen, 0 repeated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 9, "tokens": 9}, "data.samples: 9 and data.tokens: 9 exclude each other"),
        ({"samples": 0}, "data.samples: 0; must be a whole number of at least 1"),
        ({"tokens": 0}, "data.tokens: 0; must"),
        ({"levels": [1, 4]}, "data.levels: 4 is not one of 1, 2, 3; did you mean 3?"),
        ({"levels": 0}, "data.levels: 0 is not one of 1, 2, 3; did you mean 1?"),
        ({"levels": "hard"}, "data.levels: 'hard' is not one of 1, 2, 3"),
        ({"levels": []}, "data.levels: []; give one or more"),
        ({"levels": [2, 2]}, "data.levels: [2, 2]; give one or more different"),
        ({"seed": -1}, "data.seed: -1"),
        ({"samples": 151}, "data.samples: 151; {folder} has "),
        ({"samples": 51, "levels": [2]}, " of level 2, "),
        ({"tokens": 10**6}, "data.tokens: 1000000; {folder} has "),
    ],
)
def test_values_out_of_range_are_one_line(folder, cache, changes, message):
    with pytest.raises(UserError) as refused:
        prepared(folder, cache, **changes)
    assert message.format(folder=folder) in str(refused.value) and "\n" not in str(refused.value)


def test_folders_that_cannot_be_used_are_one_line(tmp_path, cache):
    cases = []
    (tmp_path / "begun" / "parts").mkdir(parents=True)
    cases.append(
        (tmp_path / "begun", f"has no final/, so it is not finished; `python generate.py task=synthesize output={tmp_path / 'begun'}`")
    )
    (tmp_path / "bare" / "final").mkdir(parents=True)
    cases += [(tmp_path / "bare", "final: holds no .parquet file"), (tmp_path / "bare" / "final", "final: holds no .parquet file")]
    cases.append((write_final(tmp_path / "none", []), "holds no row"))
    cases.append((write_final(tmp_path / "single", [row(0)]), "one row cannot be split"))
    cases.append((write_final(tmp_path / "first", [row(i) for i in range(0, 60, 3)]), None))
    cases.append((tmp_path / "nowhere", "no such file or folder"))
    for name, rows, said in (
        (
            "columns",
            [{"question": "q", "answer": "a", "level": 1}],
            "line 1 has no id, messages, only question, answer, level; rows of task=",
        ),
        ("level", [row(0), row(1, level=4)], "line 2: level is 4; it must be one of 1, 2, 3"),
        ("id", [row(0, id=7)], "line 1: id is 7; it must be text"),
        ("turns", [row(0, messages=[{"role": "usr", "content": "x"}])], "role of message 0: 'usr'"),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        cases.append((tmp_path / f"{name}.jsonl", said))
    (tmp_path / "prose.txt").write_text("Once upon a time.")
    cases.append((tmp_path / "prose.txt", "plain text holds no rows"))
    for path, said in cases:
        if said is None:
            assert prepared(path, cache).summary()["rows_level_1"] > 10
            continue
        with pytest.raises(UserError) as refused:
            prepared(path, cache)
        assert said in str(refused.value) and "\n" not in str(refused.value) and str(path) in str(refused.value), str(refused.value)
    with pytest.raises(UserError, match=r"data.levels: \[3\]; .* of level 1, 0 of level 2, 0 of level 3 to train on"):
        prepared(tmp_path / "first", cache, levels=3)


def test_a_model_is_trained_on_it(folder, tmp_path):
    words = [
        "model/size=test", "task=sft", "data=synthllm", f"data.path={folder}", "data.levels=[1,3]", "data.samples=60",
        "data.tokenizer.kind=bytes", "data.seq_len=128", "data.batch_size=4", "data.val_fraction=0.1", "trainer.max_steps=2",
        "validate.every_steps=100", "samples.every_steps=0", "logger=none", f"paths.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    train(compose("train", words), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(0 < metrics[f"eval/level_{level}/loss"] < 10 for level in (1, 2, 3)) and 0 < metrics["val/loss"] < 10
