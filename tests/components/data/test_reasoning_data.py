"""Problems solved step by step: the solutions are right, what is held out stays so, and how problems lie in rows."""

import re

import numpy as np
import pytest
import torch

from components.contracts import IGNORE, UserError
from components.data.reasoning import ProblemCorpus, ReasoningData, problem, steps
from kernels.cross_entropy import linear_cross_entropy
from tests.components.models.conftest import build

OPTIONS = {
    "operations": 3, "train_problems": 60, "val_problems": 10, "val_share": 0.1, "seed": 0, "loss_on": "all", "pack": True,
    "tokenizer": {"kind": "bytes", "vocab_size": 300, "path": None}, "seq_len": 160, "batch_size": 4, "num_workers": 0,
}  # fmt: skip


def prepared(folder, **changes):
    data = ReasoningData(**(OPTIONS | changes))
    data.prepare(folder / "cache")
    return data


@pytest.mark.parametrize(
    ("numbers", "signs", "solution"),
    [
        ([12, 7, 3], ["+", "*"], "7*3=21 12+21=33 #33"),
        ([9, 8, 2, 5], ["-", "*", "*"], "8*2=16 16*5=80 9-80=-71 #-71"),
        ([2, 3, 50, 60], ["*", "-", "-"], "2*3=6 6-50=-44 -44-60=-104 #-104"),
        ([5, 6], ["+"], "5+6=11 #11"),
    ],
)
def test_solutions_by_hand(numbers, signs, solution):
    assert steps(numbers, signs) == solution


@pytest.mark.parametrize("operations", [1, 3, 6])
def test_every_step_and_the_final_number_are_right(operations):
    """Against Python's own arithmetic."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt, solution = problem(rng, operations)
        *written, final = solution.split(" ")
        assert len(written) == operations and final == f"#{eval(prompt[:-1])}"
        for step in written:
            left, _, right = step.rpartition("=")
            assert eval(left) == int(right)
        factors = [int(n) for pair in re.findall(r"(?:\d+\*)+\d+", prompt) for n in pair.split("*")]
        assert all(2 <= n <= 9 for n in factors)


def test_held_out_problems_stay_held_out_whatever_the_seed():
    held_out = {prompt for seed in range(3) for prompt, _ in ProblemCorpus(2, seed, 500, 100, 0.2, "all").problems["val"]}
    for seed in range(3, 6):
        train = [prompt for prompt, _ in ProblemCorpus(2, seed, 500, 100, 0.2, "all").problems["train"]]
        assert not held_out & set(train) and len(set(train)) == 500


def test_problems_are_a_function_of_the_seed():
    first, again, other = (ReasoningData(**(OPTIONS | {"seed": seed})).problems("train") for seed in (0, 0, 1))
    assert first == again != other


def test_packed_rows_give_each_problem_the_loss_it_has_alone(tmp_path):
    """Blind to the others, positions from 0: by document, to rounding."""
    model = build("phi4mini")
    losses = []
    for pack, seq_len in ((True, 160), (False, 64)):
        data, found = prepared(tmp_path, pack=pack, seq_len=seq_len), {}
        for batch in data.train_stream(0):
            with torch.no_grad():
                hidden = model(batch).hidden.flatten(0, 1)
                nll = linear_cross_entropy(hidden, model.head_weight, batch.labels.flatten(), reduction="none").view(batch.labels.shape)
            for ids, labels, segments, row in zip(batch.input_ids, batch.labels, batch.segment_ids, nll, strict=True):
                for segment in segments.unique():
                    here = (segments == segment) & (labels != IGNORE)
                    if here.any():
                        found[data.tokenizer.decode(ids[here])] = row[here].sum().item()
        losses.append(found)
    packed, alone = losses
    shared = packed.keys() & alone.keys()
    assert len(shared) >= 40
    for text in shared:
        assert packed[text] == pytest.approx(alone[text], rel=1e-5)


def test_unpacked_rows_hold_one_problem_and_its_end(tmp_path):
    data = prepared(tmp_path, pack=False, loss_on="completion", seq_len=64)
    eot, decode = data.tokenizer.eot_id, data.tokenizer.decode
    solutions = dict(data.problems("train"))
    stream = data.train_stream(0)
    assert len(stream) == 60 // 4
    for batch in stream:
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            counted = [i for i in labels if i != IGNORE]
            prompt = decode(ids[1 : ids.index(ord("=")) + 1])
            assert counted[-1] == eot and decode(counted) == solutions[prompt]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data.val_problems: 10; there are not so many different ones of 1 operation\(s\); lower it"):
        ProblemCorpus(1, 0, 10, 10, 1e-4, "all").problems  # noqa: B018
    with pytest.raises(UserError, match=r"data.operations: 10; at most 9"):
        ReasoningData(**(OPTIONS | {"operations": 10}))
    with pytest.raises(UserError, match=r"task.split: 'test' is not one of train, val"):
        ReasoningData(**OPTIONS).problems("test")
