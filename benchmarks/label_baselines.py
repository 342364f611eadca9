"""What can be answered without reading a question: the commonest label of each commonsense task, and how often each occurs.

`python -m benchmarks.label_baselines texts=DIR` (half a minute), DIR as in experiment=mtl_lora_realtext. Label frequencies are those of the
training file, what they are worth is measured on the test file: the accuracy of always giving the commonest label, on all questions and
on the first so many that an evaluation asks (`eval.items`), and the loss of an answer that is known but for its label, in nats per token
of the answer and its end mark, as eval/TASK/loss of a run. The tokenizer is the experiment's, trained anew on the text of its base.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import append_row, environment, table
from components.contracts import UserError
from components.data.readers import read_records
from components.data.text import TextData
from components.evals.choice import commonest
from components.evals.extraction import label_of

TASKS = {"boolq": "boolq", "openbookqa": "openbookqa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}  # name: its files
FOUND = ("label", "accuracy", "first_accuracy", "best_accuracy", "best_first_accuracy", "answer_loss")


def baselines(train: Sequence[str], test: Sequence[str], tokens: int, first: int) -> dict[str, Any]:
    """Of one task from its labels in training and test. tokens: of all test answers, end marks included.

    label: the commonest in training, accuracy, first_accuracy: its share of the test labels and of the first so many. best_accuracy,
    best_first_accuracy: the same of the label that is commonest there, which nobody knows who has not seen the test. answer_loss: nats a
    token where each label has its share of the training labels. Raises UserError for a test label that training has not.
    """
    label, _ = commonest(train)
    counts = Counter(train)
    if unseen := sorted(set(test) - set(counts)):
        raise UserError(f"texts: no training row has the label {unseen[0]!r}, which a test row has; its frequency is not known")
    nats = -sum(math.log(counts[one] / len(train)) for one in test)
    return {
        "train": len(train), "test": len(test), "label": label,
        "accuracy": test.count(label) / len(test), "first_accuracy": test[:first].count(label) / len(test[:first]),
        "best_accuracy": commonest(test)[1], "best_first_accuracy": commonest(test[:first])[1], "answer_loss": nats / tokens,
    }  # fmt: skip


def answers(file: Path) -> list[str]:
    """The whole answer of every row of a .json file. Raises UserError for a row without one that names a label."""
    found = []
    for place, row in read_records(file):
        output = row.get("output") if isinstance(row, dict) else None
        if not isinstance(output, str) or label_of(output) is None:
            raise UserError(f"{file}, {place}: output is {output!r:.60}; it must name a label, such as 'the correct answer is true'")
        found.append(output)
    return found


def tokens_of(texts: Path, answers_by_task: dict[str, list[str]]) -> dict[str, int]:
    """Tokens of each task's answers, end marks included, by the tokenizer of experiment=mtl_lora_realtext_base."""
    path = [str(texts / "wikitext2" / "test.txt"), *(str(texts / "commonsense" / f"{file}.train.json") for file in TASKS.values())]
    data = TextData(
        path, {"kind": "bpe", "vocab_size": 2048, "path": None}, seq_len=256, batch_size=8, val_fraction=0.05, val_path=None, column="text",
        encoding_errors="strict", document_mask=True, eval_lengths=[], num_workers=0, window_mix=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        data.prepare(Path(cache))
        return {task: sum(len(data.tokenizer.encode(text)) + 1 for text in some) for task, some in answers_by_task.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=lambda word: Path(word.removeprefix("texts=")), help="folder with wikitext2/ and commonsense/")
    parser.add_argument("--first", type=int, default=300, help="questions of a task that an evaluation asks: eval.items")
    options = parser.parse_args(argv)
    try:
        asked = {split: {task: answers(options.texts / "commonsense" / f"{file}.{split}.json") for task, file in TASKS.items()}
                 for split in ("train", "test")}  # fmt: skip
        tokens = tokens_of(options.texts, asked["test"])
        labels = {split: {task: [str(label_of(text)) for text in some] for task, some in tasks.items()} for split, tasks in asked.items()}
        found = {task: baselines(labels["train"][task], labels["test"][task], tokens[task], options.first) for task in TASKS}
    except UserError as error:
        parser.exit(2, f"{error}\n")
    means = {key: sum(row[key] for row in found.values()) / len(found) for key in FOUND[1:]}
    cells = [[task, *(row[key] if key == "label" else f"{row[key]:.4f}" for key in FOUND)] for task, row in found.items()]
    print(table(["task", *FOUND], [*cells, ["mean", "", *(f"{value:.4f}" for value in means.values())]]))
    row = {**environment("tokenizers"), "first": options.first, "tasks": found, "mean": means}
    print(f"row appended to {append_row('label_baselines', row)}")


if __name__ == "__main__":
    main()
