"""Digits and what a task makes of them: the answers by another way, what is held out, what counts, and what is refused."""

import pytest
import torch

from components.contracts import IGNORE, UserError
from components.data.tokenizers import bytes_tokenizer
from components.data.transforms import NAMES, SETS, TRANSFORMS, TransformsData

DECODE = bytes_tokenizer().decode
EOT = bytes_tokenizer().eot_id
OPTIONS = {
    "task_token": True, "train_examples": 40, "val_examples": 10, "val_share": 0.1, "seed": 0, "pack": True,
    "tokenizer": {"kind": "bytes", "vocab_size": 300, "path": None}, "seq_len": 112, "batch_size": 2, "num_workers": 0,
}  # fmt: skip

# Written down by hand for two strings, and for the substitutions by their rule alone, see below.
ANSWERS = {
    "copy": ("31415", "90072"), "reverse": ("51413", "27009"), "increment": ("42526", "01183"), "rotate": ("14153", "00729"),
    "sort": ("11345", "00279"), "sort_descending": ("54311", "97200"), "cumulative_sum": ("34894", "99968"),
    "complement": ("68584", "09927"), "neighbour_sum": ("45568", "90791"),
}  # fmt: skip


def prepared(folder, tasks, **changes):
    data = TransformsData(tasks, **(OPTIONS | changes))
    data.prepare(folder / "cache")
    return data


def examples(batches, names):
    """(task by its ids, text) of every example; checks that its answer's digits are the labels and nothing else is."""
    found = []
    for batch in batches:
        for ids, tasks, labels in zip(batch.input_ids.tolist(), batch.task_ids.tolist(), batch.labels.tolist(), strict=True):
            for start in [i for i, token in enumerate(ids[:-1]) if token == EOT and ids[i + 1] != EOT]:
                end = ids.index(ord("\n"), start)
                text, answer = DECODE(ids[start + 1 : end]), [token for token in labels[start : end + 1] if token != IGNORE]
                assert DECODE(answer) == text[-5:] and len(answer) == 5
                (task,) = set(tasks[start : end + 1])
                found.append((names[task], text))
            assert sum(label != IGNORE for label in labels) % 5 == 0
    return found


def applied(name, text):
    return "".join(map(str, TRANSFORMS[name][1](tuple(map(int, text)))))


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name):
    assert (applied(name, "31415"), applied(name, "90072")) == ANSWERS[name]


@pytest.mark.parametrize(("name", "turned"), [("substitute", False), ("substitute_other", False), ("substitute_reverse", True)])
def test_substitutions_are_permutations_of_the_digits(name, turned):
    table = applied(name, "01234")[:: -1 if turned else 1] + applied(name, "56789")[:: -1 if turned else 1]
    assert sorted(table) == list("0123456789") and all(table[d] != str(d) for d in range(10))
    text = "94049"
    assert applied(name, text) == "".join(table[int(c)] for c in (text[::-1] if turned else text))


def test_names_and_sets():
    assert SETS["base"] + SETS["new"] == NAMES and (len(SETS["base"]), len(SETS["new"])) == (4, 8)
    assert len({mark for mark, _ in TRANSFORMS.values()}) == len(NAMES)
    assert len({tuple(applied(name, text) for text in ("31415", "90072")) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("task_token", [True, False])
def test_rows_are_right_and_what_is_held_out_is_never_trained_on(tmp_path, task_token):
    data = prepared(tmp_path, "new", task_token=task_token)
    trained, held_out = (examples(batches, data.task_names) for batches in (data.train_stream(1), data.val_batches()))
    assert len(held_out) == 80 and {task for task, _ in trained} == set(SETS["new"])
    for task, text in [*trained, *held_out]:
        question, answer = text.removeprefix(TRANSFORMS[task][0] if task_token else "").split("=")
        assert len(question) == 5 and question.isdigit() and answer == applied(task, question)
    strings = [{text.lstrip("ABCDEFGHIJKL").split("=")[0] for _, text in part} for part in (trained, held_out)]
    assert not strings[0] & strings[1]  # of no task: what one holds out, none trains on
    batch = next(iter(data.train_stream(1)))
    assert batch.input_ids.shape == (2, 112) and int((batch.labels != IGNORE).sum()) <= 2 * 8 * 5


def test_a_list_of_tasks_in_its_order(tmp_path):
    data = prepared(tmp_path, ["sort", "copy"])
    assert data.task_names == ("sort", "copy") and list(data.evaluations()) == ["sort", "copy"]
    for name, batches in data.evaluations().items():
        assert {task for task, _ in examples(batches, data.task_names)} == {name}
    assert data.summary()["val_rows/sort"] == 10 and (data.val_bytes, data.baselines()) == (0, {})


def test_the_same_strings_whatever_the_seed_of_the_run(tmp_path):
    first = prepared(tmp_path, "base").fingerprint
    assert prepared(tmp_path / "else", "base").fingerprint == first
    assert prepared(tmp_path, "base", seed=1).fingerprint["train"] != first["train"]
    streams = [next(iter(prepared(tmp_path, "base").train_stream(seed))).input_ids for seed in (1, 1, 2)]
    assert torch.equal(*streams[:2]) and not torch.equal(*streams[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "nwe"}, "data.tasks: 'nwe' is not one of base, new; did you mean 'new'"),
        ({"tasks": ["sort", "sorted"]}, "data.tasks: 'sorted' is not one of .*; did you mean 'sort'"),
        ({"tasks": ["sort", "sort"]}, "data.tasks: .*a list of different ones"),
        ({"tasks": []}, "data.tasks: .*must be base or new, or a list"),
        ({"val_examples": 0}, "data.val_examples: 0; must be a whole number of at least 1"),
        ({"val_share": 1}, "data.val_share: 1; must be between 0 and 1"),
        ({"tasks": ["copy"], "val_examples": 20000}, "data.val_examples: 20000; that part has 1.... strings of 5 digits; lower it"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path, **({"tasks": "base"} | changes))
    assert "\n" not in str(caught.value)
