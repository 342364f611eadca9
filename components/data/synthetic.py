"""`data=synthetic`: probes made in the process, each a question with one right answer that only the context can give."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from components.contracts import IGNORE, Batch, Tokenizer, UserError
from components.data.base import CorpusData
from components.data.documents import Corpus, Document, Piece, digest
from components.data.errors import at_least, choice, fraction, lengths
from components.data.pairs import SHORTEST, answered, pairs
from components.data.window_mix import WindowMix

Probe = tuple[str, str]  # (prompt, answer)
Maker = Callable[[np.random.Generator, int], Probe]  # (generator, characters at most) -> probe
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "islet", "jade", "kelp", "lotus", "maple", "nova")
WORDS = ("a", "river", "the", "stone", "slow", "bright", "under", "moves", "old", "wind", "holds", "quiet", "path", "and", "over", "field")
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
RUN = 8  # characters of a prompt that count in the loss, or do not, together
MOST_TRIES = 100  # draws per wanted probe before the space of probes counts as exhausted


def passkey(rng: np.random.Generator, length: int) -> Probe:
    """Hide a five-digit number in filler (Mohtashami and Jaggi 2023, sec. 4.2), at any depth."""
    key = str(rng.integers(10000, 100000))
    fact, question, answer = (
        f"The pass key is {key}. Remember it. {key} is the pass key. ",
        "What is the pass key? The pass key is",
        f" {key}.",
    )
    filler = length - len(fact) - len(question) - len(answer)
    depth = int(rng.integers(filler + 1))
    text = (GRASS * (filler // len(GRASS) + 1))[:filler]
    return text[:depth] + fact + text[depth:] + question, answer


def needle(rng: np.random.Generator, length: int) -> Probe:
    """Hide numbers of several names among random words and ask for one (multi-key needle in a haystack)."""
    asked, *others = (NAMES[i] for i in rng.permutation(len(NAMES))[:3])
    number = {name: str(rng.integers(1000, 10000)) for name in (asked, *others)}
    facts = [f"The number of {name} is {number[name]}. " for name in (asked, *others)]
    question, answer = f"The number of {asked} is", f" {number[asked]}."
    room = length - len(question) - len(answer)
    drawn = [f"{WORDS[i]} " for i in rng.integers(len(WORDS), size=room // 2)]  # at least enough: a word takes two characters or more
    fits = np.searchsorted(np.cumsum([len(word) for word in drawn]), room - sum(map(len, facts)), side="right")
    parts = drawn[: int(fits)]
    for fact in facts:
        parts.insert(int(rng.integers(len(parts) + 1)), fact)
    return "".join(parts) + question, answer


def recall(rng: np.random.Generator, length: int) -> Probe:
    """Hide one of 16 letters behind a mark in a text that runs through 8 others, at any depth: a passkey of one character."""
    filler, value = length - 4, "ABCDEFGHIJKLMNOP"[int(rng.integers(16))]
    depth, phase = int(rng.integers(filler + 1)), int(rng.integers(8))
    text = ("abcdefgh" * (filler // 8 + 2))[phase : phase + filler]
    return f"{text[:depth]}#{value}{text[depth:]}?", value


def copy(rng: np.random.Generator, length: int) -> Probe:
    """Repeat a random word of 1 to (length - 2) / 2 letters."""
    word = "".join(rng.choice(LETTERS, size=int(rng.integers(1, (length - 2) // 2 + 1))))
    return f"{word}|", f"{word}."


def arithmetic(rng: np.random.Generator, length: int) -> Probe:
    """Add, subtract or multiply two whole numbers below 1000."""
    a, b = int(rng.integers(1000)), int(rng.integers(1000))
    sign, value = (("+", a + b), ("-", a - b), ("*", a * b))[int(rng.integers(3))]
    return f"{a}{sign}{b}=", f"{value}."


KINDS: dict[str, tuple[Maker, int]] = {
    "needle": (needle, 128),
    "passkey": (passkey, 128),
    "recall": (recall, 16),
    "pairs": (pairs, SHORTEST),
    "copy": (copy, 8),
    "arithmetic": (arithmetic, 16),
}


ANSWERED: dict[str, Callable[[str], list[int]]] = {"pairs": answered}  # answers that a prompt of the kind holds already, by place


class SyntheticCorpus:
    """Probes of one kind; the held-out ones are drawn first and never appear in training."""

    def __init__(
        self, kind: str, length: int, seed: int, train_documents: int, val_documents: int, loss_on: str,
        shortest: int | None = None, prompt_share: float = 1.0, weight: float | None = None, stream: int = 0,
    ) -> None:  # fmt: skip
        self.weight = weight
        self._prompt_share = prompt_share if loss_on == "all" else 0.0
        self.name = f"synthetic {kind}, {'' if shortest is None else f'{shortest} to '}{length} characters"
        self.kind, self.seed = kind, seed
        self._stream = [seed, stream] if stream else seed  # of random numbers: other probes of the same seed
        self._make, self.length, self._shortest = KINDS[kind][0], length, shortest
        self._wanted = (val_documents, train_documents)

    @cached_property
    def probes(self) -> tuple[list[Probe], list[Probe]]:
        """(held out, train), each without repetition across the two. Raises UserError when there are not so many different ones."""
        rng = np.random.Generator(np.random.PCG64(self._stream))
        held_out: dict[Probe, None] = {}
        train: list[Probe] = []
        for _ in range(MOST_TRIES * sum(self._wanted)):
            probe = self._make(rng, self.length if self._shortest is None else int(rng.integers(self._shortest, self.length + 1)))
            if len(held_out) < self._wanted[0]:
                held_out[probe] = None
            elif probe not in held_out:
                train.append(probe)
            if len(train) == self._wanted[1]:
                return list(held_out), train
        raise UserError(f"data.val_documents: {self._wanted[0]}; there are not so many different probes of this kind and length; lower it")

    def fingerprint(self) -> str:
        return digest(
            self.name, self._stream, *self._wanted, self._prompt_share, np.__version__
        )  # numpy may change its streams between versions

    def train(self) -> Iterator[Document]:
        return self._documents("train", self.probes[1])

    def held_out(self) -> Iterator[Document]:
        return self._documents("val", self.probes[0])

    def size(self, split: str) -> int:
        return sum(len(prompt) + len(answer) for prompt, answer in self.probes[split == "train"])

    def _documents(self, split: str, probes: list[Probe]) -> Iterator[Document]:
        rng = np.random.Generator(np.random.PCG64([self.seed, split == "train"]))
        for i, (prompt, answer) in enumerate(probes):
            yield Document(f"{split}#{i}", (*self._counted(prompt, rng), Piece(answer)))

    def _counted(self, prompt: str, rng: np.random.Generator) -> Iterator[Piece]:
        """The prompt in pieces that count in the loss and pieces that do not."""
        counts = np.repeat(rng.random(-(-len(prompt) // RUN)) < self._prompt_share, RUN)[: len(prompt)]
        counts[self._answered(prompt)] = True
        return pieces(prompt, counts)

    def prompt_alone(self, prompt: str, answer: str) -> list[Piece]:
        """A probe in which all counts but answers."""
        counts = np.ones(len(prompt), bool)
        counts[self._answered(prompt)] = False
        return [*pieces(prompt, counts), Piece(answer, loss=False)]

    def _answered(self, prompt: str) -> list[int]:
        return ANSWERED[self.kind](prompt) if self.kind in ANSWERED else []


def pieces(text: str, counts: np.ndarray) -> Iterator[Piece]:
    """Cut a text where counting in the loss begins or ends. counts: (characters,) bool."""
    ends = [*(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(text)]
    for start, end in itertools.pairwise([0, *ends]):
        yield Piece(text[start:end], loss=bool(counts[start]))


def draw(make: Maker, length: int, count: int, seed: int) -> list[Probe]:
    """`count` probes of a length, each on its own."""
    rng = np.random.Generator(np.random.PCG64([seed, length]))
    return [make(rng, length) for _ in range(count)]


class ProbeBatches:
    """Texts as batches, each a row of its own in which the pieces that count are labels; shorter rows are filled up at the end."""

    def __init__(self, texts: Sequence[Sequence[Piece]], tokenizer: Tokenizer, rows: int) -> None:
        self._texts, self._tokenizer, self._rows = texts, tokenizer, rows

    def __len__(self) -> int:
        return -(-len(self._texts) // self._rows)

    def __iter__(self) -> Iterator[Batch]:
        start = self._tokenizer.eot_id
        for first in range(0, len(self._texts), self._rows):
            rows = [
                [(self._tokenizer.encode(piece.text), piece.loss) for piece in text] for text in self._texts[first : first + self._rows]
            ]
            width = max(sum(len(ids) for ids, _ in row) for row in rows)
            inputs = torch.full((len(rows), width), start)
            labels = torch.full((len(rows), width), IGNORE)
            for i, row in enumerate(rows):
                tokens = torch.tensor([token for ids, _ in row for token in ids])
                counts = torch.tensor([loss for ids, loss in row for _ in ids])
                inputs[i, 1 : len(tokens)] = tokens[:-1]
                labels[i, : len(tokens)] = torch.where(counts, tokens, IGNORE)
            yield Batch(inputs, labels)


class SyntheticData(CorpusData):
    """Probes of `kind` (needle, passkey, recall, pairs, copy, arithmetic), whole ones in a row; see CorpusData for the other arguments.

    length: characters of a probe at most, null for what a row holds with one token a byte; shortest: draw every probe's length evenly from
    here to `length`, null for `length` always; seed: of the probes, not of the run; loss_on: completion (the answers alone) or all;
    prompt_share: of the prompts' characters that count in the loss with `all`, drawn in runs of 8;
    eval_lengths: characters of further probes, `eval_documents` of each. window_mix: rows of one long probe and rows of several short ones,
    each under its RoPE regime, in the shares that it says; the held-out probes are long.
    Raises UserError for an unknown kind, and a length outside kind's least and seq_len - 1.
    """

    whole_documents = True

    def __init__(
        self, kind: str, length: int | None, shortest: int | None, train_documents: int, val_documents: int, seed: int, loss_on: str,
        prompt_share: float, tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, eval_lengths: Sequence[int],
        eval_documents: int, window_mix: Mapping[str, Any] | None, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        self.eval_lengths = lengths("data.eval_lengths", eval_lengths)
        self._eval_documents = at_least("data.eval_documents", eval_documents, 1)
        smallest = KINDS[choice("data.kind", kind, KINDS)][1]
        size = self.seq_len - 1 if length is None else at_least("data.length", length, 1)
        if not smallest <= size < self.seq_len:
            raise UserError(
                f"data.length: {size}; {kind} needs from {smallest} characters to one less than data.seq_len={seq_len} (a token each, one "
                "begins the document)"
            )
        if shortest is not None and not smallest <= at_least("data.shortest", shortest, 1) <= size:
            raise UserError(f"data.shortest: {shortest}; {kind} needs from {smallest} characters to data.length={size}")
        if too_short := [length for length in self.eval_lengths if length < smallest]:
            raise UserError(f"data.eval_lengths: {too_short[0]}; {kind} needs at least {smallest} characters")
        self._loss_on = choice("data.loss_on", loss_on, ("completion", "all"))
        self._prompt_share = 1.0 if prompt_share == 1 else fraction("data.prompt_share", prompt_share)
        if self._prompt_share < 1 and self._loss_on == "completion":
            raise UserError(
                f"data.prompt_share: {prompt_share}; with data.loss_on=completion no prompt counts; leave it 1, or use loss_on=all"
            )
        counts = at_least("data.train_documents", train_documents, 1), at_least("data.val_documents", val_documents, 1)
        self._corpus = SyntheticCorpus(kind, size, at_least("data.seed", seed, 0), *counts, loss_on, shortest, self._prompt_share)
        self._short: SyntheticCorpus | None = None
        if (mix := WindowMix.of(window_mix)) is not None:
            self._mix(mix, smallest, train_documents)
        self.source = self._corpus.name

    def _mix(self, mix: WindowMix, smallest: int, train_documents: int) -> None:
        """Add short probes, as many rows of them as there are of long ones."""
        if not smallest < mix.short_len <= self.seq_len:
            raise UserError(
                f"data.window_mix.short_len: {mix.short_len}; {self._corpus.kind} needs from {smallest + 1} tokens to "
                f"data.seq_len={self.seq_len}"
            )
        of = self._corpus
        if of.length < mix.short_len:
            raise UserError(
                f"data.length: {of.length}; a long row holds one probe of more than data.window_mix.short_len={mix.short_len} tokens"
            )
        count = train_documents * (self.seq_len // mix.short_len)
        self._short = SyntheticCorpus(
            of.kind, mix.short_len - 1, of.seed, count, 0, self._loss_on, prompt_share=self._prompt_share, weight=1 - mix.long_share,
            stream=1,  # a run with short probes alone holds out the first ones of stream 0
        )  # fmt: skip
        self._corpus.weight = mix.long_share
        self.window_mix = replace(mix, long_source=1)

    def _corpora(self) -> Sequence[Corpus]:
        return [self._corpus] if self._short is None else [self._short, self._corpus]

    def evaluations(self) -> dict[str, Iterable[Batch]]:
        """Return new probes of each of `eval_lengths`, by name; where prompts are trained on too, also their text without its answers."""
        make, tokens = KINDS[self._corpus.kind][0], self.seq_len * self.batch_size
        found: dict[str, Iterable[Batch]] = {}
        for length in self.eval_lengths:
            probes, rows = draw(make, length, self._eval_documents, self._corpus.seed), max(1, tokens // length)
            found[f"length_{length}"] = ProbeBatches([(Piece(p, loss=False), Piece(a)) for p, a in probes], self.tokenizer, rows)
            if self._loss_on == "all":
                found[f"prompt_{length}"] = ProbeBatches([self._corpus.prompt_alone(*probe) for probe in probes], self.tokenizer, rows)
        return found

    def questions(self, length: int, count: int, seed: int) -> list[tuple[list[int], int]]:
        """Return new probes of at most `length` tokens, their answer's included: (ids of the whole text, tokens of the answer).

        Raises UserError for a length without room for one.
        """
        make, smallest = KINDS[self._corpus.kind]
        if length <= smallest:
            raise UserError(f"task.length: {length}; a probe of data.kind={self._corpus.kind} takes at least {smallest + 1} tokens")
        found = []
        for prompt, answer in draw(make, length - 1, count, seed):
            said = self.tokenizer.encode(answer)
            found.append(([self.tokenizer.eot_id, *self.tokenizer.encode(prompt), *said], len(said)))
        return found

    def examples(self) -> list[Probe]:
        """Return the held-out (prompt, answer) pairs, to ask a model by generation."""
        return list(self._corpus.probes[0])
