"""`data=transforms`: short strings of digits and what a task makes of them; for comparing adapters that share or separate tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from components.contracts import UserError
from components.data.documents import Corpus, Document, Piece, digest, hash_unit
from components.data.errors import at_least, choice, fraction
from components.data.tasks import TaskData

LENGTH = 5  # digits of a string
SPLITS = ("train", "val")
Digits = tuple[int, ...]
# Permutations of the digits without a fixed point; written down, since a generator's stream may change between versions.
_FIRST, _SECOND, _THIRD = (3, 7, 0, 9, 1, 8, 2, 5, 6, 4), (6, 4, 8, 1, 5, 0, 9, 3, 7, 2), (8, 0, 5, 6, 3, 9, 7, 4, 2, 1)


def substituted(x: Digits, table: Digits) -> Digits:
    return tuple(table[d] for d in x)


def cumulative(x: Digits) -> Digits:
    return tuple(sum(x[: i + 1]) % 10 for i in range(len(x)))


def neighbours(x: Digits) -> Digits:
    """Each digit with the next one, the last with the first."""
    return tuple((a + b) % 10 for a, b in zip(x, x[1:] + x[:1], strict=True))


TRANSFORMS: dict[str, tuple[str, Callable[[Digits], Digits]]] = {  # the mark that names the task in a row, and what it does
    "copy": ("A", lambda x: x),
    "reverse": ("B", lambda x: x[::-1]),
    "increment": ("C", lambda x: tuple((d + 1) % 10 for d in x)),
    "rotate": ("D", lambda x: x[1:] + x[:1]),
    "sort": ("E", lambda x: tuple(sorted(x))),
    "sort_descending": ("F", lambda x: tuple(sorted(x, reverse=True))),
    "substitute": ("G", lambda x: substituted(x, _FIRST)),
    "substitute_other": ("H", lambda x: substituted(x, _SECOND)),
    "cumulative_sum": ("I", cumulative),
    "complement": ("J", lambda x: tuple(9 - d for d in x)),
    "substitute_reverse": ("K", lambda x: substituted(x[::-1], _THIRD)),
    "neighbour_sum": ("L", neighbours),
}
NAMES = tuple(TRANSFORMS)
SETS = {"base": NAMES[:4], "new": NAMES[4:]}  # to train a model on, and to adapt it to


class TransformCorpus:
    """Strings of digits with what one task makes of them. Held out are those with a hash below `share`, the same ones for every task."""

    weight: float | None = None

    def __init__(self, name: str, seed: int, count: int, held_out_count: int, share: float, task_token: bool) -> None:
        self.name = name
        self._key = (name, seed, count, held_out_count, share, task_token)
        self._seed, self._share = seed, share
        mark, self._transform = TRANSFORMS[name]
        self._mark = mark if task_token else ""
        self._wanted = {"train": count, "val": held_out_count}

    @cached_property
    def strings(self) -> dict[str, list[str]]:
        """{train, val}: different strings in random order. Raises UserError when there are not so many."""
        order = np.random.Generator(np.random.PCG64([self._seed, NAMES.index(self.name)])).permutation(10**LENGTH)
        found: dict[str, list[str]] = {split: [] for split in SPLITS}
        for number in order.tolist():
            text = f"{number:0{LENGTH}d}"
            split = "val" if hash_unit(text) < self._share else "train"
            if len(found[split]) < self._wanted[split]:
                found[split].append(text)
            elif all(len(found[split]) == self._wanted[split] for split in SPLITS):
                return found
        for split, texts in found.items():
            if len(texts) < (wanted := self._wanted[split]):
                raise UserError(f"data.{split}_examples: {wanted}; that part has {len(texts)} strings of {LENGTH} digits; lower it")
        return found

    def fingerprint(self) -> str:
        return digest("transforms", *self._key, np.__version__)  # numpy may change its streams between versions

    def train(self) -> Iterator[Document]:
        return self._documents("train")

    def held_out(self) -> Iterator[Document]:
        return self._documents("val")

    def size(self, split: str) -> int:
        return self._wanted[split] * (2 * LENGTH + 2)

    def _documents(self, split: str) -> Iterator[Document]:
        for text in self.strings[split]:
            answer = "".join(map(str, self._transform(tuple(map(int, text)))))
            # the newline is no label, and so neither is the end of the document: only digits count, and accuracy is that of digits
            yield Document(text, (Piece(f"{self._mark}{text}=", loss=False), Piece(answer), Piece("\n", loss=False)))


class TransformsData(TaskData):
    """Five random digits and what a task makes of them, `E31415=11345`; the digits of the answer are the labels.

    tasks: base (copy, reverse, increment, rotate), new (sort, sort_descending, two substitutions of digits, cumulative_sum mod 10,
    complement to 9, a substitution of the reverse, sum mod 10 with the next digit), or a list of names, whose order gives the ids.
    task_token: begin each row with a letter for its task; False leaves it out, so that only an adapter with tasks can tell them apart.
    train_examples, val_examples: of each task. val_share: of all strings, those never trained on, chosen by a hash. seed: of the strings,
    not of the run. pack: several examples in a row, or each in a row of its own. See CorpusData for the other arguments.
    Raises UserError for unknown names, a name twice, and values out of range.
    """

    def __init__(
        self, tasks: str | list[str], task_token: bool, train_examples: int, val_examples: int, val_share: float, seed: int, pack: bool,
        tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        self.packed = pack
        self.task_names = self.names_of(tasks)
        counts = at_least("data.train_examples", train_examples, 1), at_least("data.val_examples", val_examples, 1)
        share, seed = fraction("data.val_share", val_share), at_least("data.seed", seed, 0)
        self._tasks = [TransformCorpus(name, seed, *counts, share, task_token) for name in self.task_names]
        self.source = f"{len(self._tasks)} transforms of {LENGTH} digits{'' if task_token else ', not told apart'}"

    @staticmethod
    def names_of(tasks: str | Sequence[str]) -> tuple[str, ...]:
        """Names of the tasks that the key `data.tasks` means. Raises UserError for unknown ones, a name twice and none at all."""
        if isinstance(tasks, str):
            return SETS[choice("data.tasks", tasks, SETS)]
        names = tuple(choice("data.tasks", name, NAMES) for name in tasks)
        if not names or len(set(names)) < len(names):
            raise UserError(f"data.tasks: {list(tasks)}; must be {' or '.join(SETS)}, or a list of different ones of {', '.join(NAMES)}")
        return names

    def _corpora(self) -> Sequence[Corpus]:
        return self._tasks

    @property
    def val_bytes(self) -> int:
        """0: bits per byte of random digits say nothing; see eval/NAME/accuracy."""
        return 0

    @staticmethod
    def _make_baselines(folder: Any, corpora: Any, fingerprint: str) -> dict[str, float]:
        return {}
