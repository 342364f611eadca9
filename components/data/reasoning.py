"""`data=reasoning`: arithmetic problems made in the process, each with a solution that is written out step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from components.contracts import UserError
from components.data.base import CorpusData
from components.data.documents import Corpus, Document, Piece, digest, hash_unit
from components.data.errors import at_least, choice, fraction

Problem = tuple[str, str]  # (prompt, solution)
MARK = "#"  # stands before the final number of a solution
MOST_OPERATIONS = 9
MOST_TRIES = 200  # draws per wanted problem before the space of problems counts as exhausted
SPLITS = ("train", "val")


def problem(rng: np.random.Generator, operations: int) -> Problem:
    """Draw an expression of `operations` signs from + - *, and solve it one operation at a time: products first, each from the left.

    Terms are 1 to 99, factors 2 to 9.

    Example:
        >>> steps([12, 7, 3], ["+", "*"])
        '7*3=21 12+21=33 #33'
    """
    signs = [("+", "-", "*")[i] for i in rng.integers(3, size=operations)]
    factor = ["*" in signs[max(0, i - 1) : i + 1] for i in range(operations + 1)]
    numbers = [int(rng.integers(2, 10)) if is_factor else int(rng.integers(1, 100)) for is_factor in factor]
    text = "".join(f"{number}{sign}" for number, sign in zip(numbers, [*signs, "="], strict=True))
    return text, steps(numbers, signs)


def steps(numbers: Sequence[int], signs: Sequence[str]) -> str:
    """The solution of numbers[0] signs[0] numbers[1] ...: every operation with its result, then the mark and the final number."""
    numbers, signs = list(numbers), list(signs)
    written = []
    while signs:
        at = signs.index("*") if "*" in signs else 0
        sign, a, b = signs.pop(at), numbers[at], numbers.pop(at + 1)
        numbers[at] = a * b if sign == "*" else a + b if sign == "+" else a - b
        written.append(f"{a}{sign}{b}={numbers[at]}")
    return " ".join([*written, f"{MARK}{numbers[0]}"])


class ProblemCorpus:
    """`count` different problems to train on and `held_out_count` held out: those whose prompt has a hash below `share`, whatever the seed.

    A problem that one corpus holds out is thus in no other one's training part, if both have the same share.
    """

    weight: float | None = None

    def __init__(self, operations: int, seed: int, count: int, held_out_count: int, share: float, loss_on: str) -> None:
        self.name = f"arithmetic of {operations} steps"
        self._key = (operations, seed, count, held_out_count, share, loss_on)
        self._operations, self._seed, self._loss_on, self._share = operations, seed, loss_on, share
        self._wanted = {"train": count, "val": held_out_count}

    @cached_property
    def problems(self) -> dict[str, list[Problem]]:
        """{train, val}. Raises UserError when there are not so many different ones."""
        rng = np.random.Generator(np.random.PCG64(self._seed))
        found: dict[str, dict[Problem, None]] = {split: {} for split in SPLITS}
        for _ in range(MOST_TRIES * sum(self._wanted.values())):
            made = problem(rng, self._operations)
            split = "val" if hash_unit(made[0]) < self._share else "train"
            if len(found[split]) < self._wanted[split]:
                found[split][made] = None
            if all(len(found[split]) == self._wanted[split] for split in SPLITS):
                return {split: list(kept) for split, kept in found.items()}
        short = min(SPLITS, key=lambda split: len(found[split]) / self._wanted[split])
        raise UserError(
            f"data.{short}_problems: {self._wanted[short]}; there are not so many different ones of {self._operations} operation(s); "
            "lower it"
        )

    def fingerprint(self) -> str:
        return digest("reasoning", *self._key, np.__version__)  # numpy may change its streams between versions

    def train(self) -> Iterator[Document]:
        return self._documents("train")

    def held_out(self) -> Iterator[Document]:
        return self._documents("val")

    def size(self, split: str) -> int:
        return sum(len(prompt) + len(solution) for prompt, solution in self.problems[split])

    def _documents(self, split: str) -> Iterator[Document]:
        for i, (prompt, solution) in enumerate(self.problems[split]):
            yield Document(f"{split}#{i}", (Piece(prompt, loss=self._loss_on == "all"), Piece(solution)))


class ReasoningData(CorpusData):
    """Problems of `operations` steps: `12+7*3=` is solved by `7*3=21 12+21=33 #33`; see CorpusData for the other arguments.

    train_problems, val_problems: how many. val_share: of all problems, those that are held out, chosen by a hash of the problem alone, so
    that they stay held out whatever the seed. seed: of the problems, not of the run. loss_on: all, or completion (the solution and the end
    of the document). pack: several problems in a row, or each in a row of its own. Raises UserError for values out of range.
    """

    whole_documents = True

    def __init__(
        self, operations: int, train_problems: int, val_problems: int, val_share: float, seed: int, loss_on: str, pack: bool,
        tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        if at_least("data.operations", operations, 1) > MOST_OPERATIONS:
            raise UserError(f"data.operations: {operations}; at most {MOST_OPERATIONS}")
        self.packed = pack
        self._corpus = ProblemCorpus(
            operations,
            at_least("data.seed", seed, 0),
            at_least("data.train_problems", train_problems, 1),
            at_least("data.val_problems", val_problems, 1),
            fraction("data.val_share", val_share),
            choice("data.loss_on", loss_on, ("completion", "all")),
        )
        self.source = self._corpus.name

    def _corpora(self) -> Sequence[Corpus]:
        return [self._corpus]

    def problems(self, split: str) -> list[Problem]:
        """(prompt, solution) of every problem of `split`, train or val: to ask a model by generation. Needs no `prepare`."""
        return list(self._corpus.problems[choice("task.split", split, SPLITS)])
