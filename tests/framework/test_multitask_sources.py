"""`data=multitask` from the hub's library, and from files in the shape of the commonsense sets of LLM-Adapters."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from components.contracts import IGNORE, UserError
from components.data.readers import read_records
from components.evals.extraction import label_of
from framework.build import build_data, compose
from framework.train import train

DATA = os.environ.get("PATCHBAY_DATA")  # a folder with commonsense/NAME.train.json and NAME.test.json as LLM-Adapters publishes them
ROWS = {("boolq", "train"): 24, ("boolq", "test"): 6, ("ARC-Easy", "train"): 30, ("ARC-Easy", "test"): 7}
PUBLISHED = {"boolq": (9427, 3270), "openbookqa": (4957, 500), "ARC-Easy": (2251, 2376), "ARC-Challenge": (1119, 1172)}
LABELS = {"boolq": ("true", "false"), "ARC-Easy": tuple(f"answer{i}" for i in range(1, 5))}


def example(name: str, split: str, i: int) -> dict[str, str]:
    """A row with the keys, the phrases and the line breaks of the published ones, about nothing."""
    label = LABELS[name][i % len(LABELS[name])]
    if name == "boolq":
        asked = f"Please answer the following question with true or false, question: is {i} a number of {split}?"
    else:
        choices = " ".join(f"Answer{k}: {i + k} {split} things." for k in range(1, 5))
        asked = f"Please choose the correct answer to the question: How many are {i} and some?\n\n{choices}"
    text = f"{asked}\n\nAnswer format: {'/'.join(LABELS[name])}"
    return {"instruction": text, "input": "", "output": f"the correct answer is {label}", "answer": label}


def examples(name: str, split: str) -> list[dict[str, str]]:
    return [example(name, split, i) for i in range(ROWS[name, split])]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commonsense")
    for name, split in ROWS:
        (folder / f"{name}.{split}.json").write_text(json.dumps(examples(name, split), indent=4))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """What `datasets` leaves after it has loaded someone/commonsense with its two configurations, written by the library itself."""
    datasets = pytest.importorskip("datasets")

    class Commonsense(datasets.GeneratorBasedBuilder):
        VERSION = datasets.Version("0.0.0")

        def _info(self):
            return datasets.DatasetInfo()

        def _split_generators(self, manager):
            return [datasets.SplitGenerator(split, {"split": split}) for split in ("train", "test")]

        def _generate_examples(self, split):
            yield from enumerate(examples(self.config.name, split))

    folder = tmp_path_factory.mktemp("hub")
    for name in LABELS:
        builder = Commonsense(
            cache_dir=str(folder), dataset_name="commonsense", repo_id="someone/commonsense", config_name=name, hash="0" * 16
        )
        builder.download_and_prepare()
    return folder


@pytest.fixture
def hub(cache, monkeypatch) -> str:
    """The hub is not asked: the library finds the data set in its cache, as it does without a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    return "hub:someone/commonsense"


def words(tmp_path: Path, tasks: dict[str, tuple[str, str]], *more: str) -> list[str]:
    """tasks: {name: (path, val_path)}."""
    named = ", ".join(f'{name}: {{path: "{path}", val_path: "{val}"}}' for name, (path, val) in tasks.items())
    return [
        "data=multitask", f"data.tasks={{{named}}}", "data.tokenizer.kind=bytes", "data.seq_len=640", "data.batch_size=1",
        f"paths.cache_dir={tmp_path / 'cache'}", *more,
    ]  # fmt: skip


def from_files(folder: Path) -> dict[str, tuple[str, str]]:
    return {name: (f"{folder}/{name}.train.json", f"{folder}/{name}.test.json") for name in LABELS}


def from_hub(hub: str) -> dict[str, tuple[str, str]]:
    return {name: (f"{hub}:{name}", f"{hub}:{name}:test") for name in LABELS}


def prepared(tmp_path: Path, tasks: dict[str, tuple[str, str]]):
    data = build_data(compose("train", words(tmp_path, tasks)))
    data.prepare(tmp_path / "cache")
    return data


def documents(data, batches) -> Counter:
    """(task, text, what of it is learnt) of every document."""
    found: Counter = Counter()
    end, decode = data.tokenizer.eot_id, data.tokenizer.decode
    for batch in batches:
        for ids, tasks, labels in zip(batch.input_ids.tolist(), batch.task_ids.tolist(), batch.labels.tolist(), strict=True):
            starts = [i for i, token in enumerate(ids) if token == end]
            for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
                learnt = [token for token in labels[a:b] if token != IGNORE]
                if learnt:
                    assert learnt.pop() == end
                    found[data.task_names[tasks[a]], decode(ids[a + 1 : b]), decode(learnt)] += 1
    return found


def first_epoch(data) -> Counter:
    found: Counter = Counter()
    total = sum(count for (_, split), count in ROWS.items() if split == "train")
    for batch in data.train_stream(0):
        found += documents(data, [batch])
        if found.total() >= total:
            return found
    return found


def as_asked(name: str, split: str) -> Counter:
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    rows = examples(name, split)
    return Counter((name, f"{head}{row['instruction']}\n\n### Response:\n{row['output']}", row["output"]) for row in rows)


def test_files_in_the_shape_of_the_commonsense_ones(tmp_path, files):
    data = prepared(tmp_path, from_files(files))
    assert first_epoch(data) == as_asked("boolq", "train") + as_asked("ARC-Easy", "train")
    assert documents(data, data.val_batches()) == as_asked("boolq", "test") + as_asked("ARC-Easy", "test")
    for name, questions in data.held_out_questions().items():
        asked = list(questions)
        assert [question.answer for question in asked] == [row["answer"] for row in examples(name, "test")]
        assert all(label_of(f"the correct answer is {question.answer}") == question.answer for question in asked)
        trained = as_asked(name, "test")
        assert all((name, f"{q.prompt}the correct answer is {q.answer}", f"the correct answer is {q.answer}") in trained for q in asked)


def test_a_data_set_of_the_hub_is_what_its_rows_are_in_files(tmp_path, files, hub):
    """Through `datasets.load_dataset`, by name, configuration and split."""
    own, theirs = prepared(tmp_path / "a", from_files(files)), prepared(tmp_path / "b", from_hub(hub))
    assert first_epoch(theirs) == first_epoch(own)
    assert documents(theirs, theirs.val_batches()) == documents(own, own.val_batches())
    ours, others = own.held_out_questions(), theirs.held_out_questions()
    assert {name: list(some) for name, some in others.items()} == {name: list(some) for name, some in ours.items()}


def test_a_folder_that_the_library_reads(tmp_path, cache):
    """A data set need not come from the hub: load_dataset takes a folder with a file a split, too. Without val_path a part is held out."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples("boolq", split)))
    data = build_data(compose("train", words(tmp_path, {"a": (f"hub:{folder}::train", f"hub:{folder}::test")}, "data.val_fraction=0.25")))
    data.prepare(tmp_path / "cache")
    assert data.summary()["rows/a"] == 24 and data.summary()["val_rows/a"] == 6


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "Please pick one|multiple|Config name is missing"),
        (":boolq:validation", "validation"),
        (":copa", "copa"),
        ("_of_nobody", "nobody"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(tmp_path, hub, name, reason):
    data = build_data(compose("train", words(tmp_path, {"a": (f"{hub}{name}", f"{hub}:boolq:test")})))
    with pytest.raises(UserError, match=rf"data.tasks.a.path: {hub}{name}: not to be had from the hub or its cache .*({reason})") as error:
        data.prepare(tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_training_on_the_hub(tmp_path, hub, capsys):
    sizes = ("model/size=test", "model=phi4mini", "adapter=mtl_lora", "adapter.r=2", "trainer.max_steps=2", "logger=none")
    more = ("samples.every_steps=0", "validate.every_steps=100", "checkpoint.every_steps=2")
    run = tmp_path / "run"
    train(compose("train", words(tmp_path, from_hub(hub), *sizes, *more)), run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("adapter: ")]
    assert "lora_B_w 48" in line and "down" in line  # two layers of four modules, two tasks, three B
    found = json.loads((run / "metrics.json").read_text())
    assert found["eval/boolq/loss"] > 0 and found["eval/ARC-Easy/loss"] > 0


@pytest.mark.skipif(DATA is None, reason="PATCHBAY_DATA names no folder with commonsense/NAME.train.json and NAME.test.json")
def test_the_published_files(tmp_path):
    """All rows of the four sets, as many as are published, have the shape above and a label that an evaluation reads."""
    folder = Path(str(DATA)) / "commonsense"
    for name, counts in PUBLISHED.items():
        for split, count in zip(("train", "test"), counts, strict=True):
            rows = [record for _, record in read_records(folder / f"{name}.{split}.json")]
            assert len(rows) == count and all(set(row) == set(example("boolq", "train", 0)) for row in rows)
            assert all(
                row["output"] == f"the correct answer is {row['answer']}" and label_of(row["output"]) == row["answer"] for row in rows
            )
            assert all(row["input"] == "" and row["instruction"].rpartition("\n\n")[2].startswith("Answer format: ") for row in rows)
    tasks = {name: (f"{folder}/{name}.train.json", f"{folder}/{name}.test.json") for name in PUBLISHED}
    data = build_data(compose("train", words(tmp_path, tasks)))
    assert {name: len(list(some)) for name, some in data.held_out_questions().items()} == {name: n for name, (_, n) in PUBLISHED.items()}
