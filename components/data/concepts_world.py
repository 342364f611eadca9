"""`data=concepts_world`: a world of computable concepts, for measuring what the diversity of synthetic questions is worth.

A concept does something to a digit, such as adding 7. Documents tell of the concepts of one chapter each and end with exercises. Questions
combine two concepts, `4+7*3=`; they are copied from documents (level 1), combine any two concepts of a document (level 2), or two concepts
of different topics that a walk on the graph of concepts meets (level 3), as in SynthLLM (arXiv 2503.19551). Answers come from a program and
all samples are equally long, so that levels differ in the diversity of their questions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.contracts import Batch, UserError
from components.data.base import CorpusData
from components.data.documents import Corpus, Document, Piece, digest, hash_unit
from components.data.errors import at_least, choice, fraction
from components.synthesis.corpus import index_documents
from components.synthesis.diversity import HashedTfIdf, within_document_cosines
from components.synthesis.graph import build_graph
from components.synthesis.walks import WalkRule, sample_epochs

OPERATIONS: dict[str, tuple[str, range, Callable[[int, int], int]]] = {  # topic: sign, its numbers, what it does to a digit
    "add": ("+", range(1, 10), lambda x, n: (x + n) % 10),
    "subtract": ("-", range(1, 10), lambda x, n: (x - n) % 10),
    "multiply": ("*", range(2, 10), lambda x, n: x * n % 10),
    "remainder": ("%", range(2, 10), lambda x, n: x % n),
    "smaller": ("<", range(1, 9), min),
    "larger": (">", range(1, 9), max),
}
LEVELS = (0, 1, 2, 3)
CONCEPTS_OF_TOPIC, TOPICS_OF_CHAPTER = 2, 2
EXERCISES, FACTS = 5, 3  # of a document; of each of its concepts
OF_A_WALK = 3  # questions (paper: 3)
LENGTH = 9  # tokens of a sample with a token a byte: the document's mark, 4+7*3=3, the end of the line
RULE = WalkRule(topic_steps=(1, 2), concept_steps=(3, 4), crossing="uniform", self_avoiding=False)
EPSILON = 1e-5


class Concept(NamedTuple):
    """One thing that can be done to a digit."""

    topic: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.topic} {self.number}"

    def __str__(self) -> str:
        return f"{OPERATIONS[self.topic][0]}{self.number}"

    def __call__(self, x: int) -> int:
        return OPERATIONS[self.topic][2](x, self.number)


Pair = tuple[Concept, Concept]
CONCEPTS = tuple(Concept(topic, number) for topic, (_, numbers, _) in OPERATIONS.items() for number in numbers)
BY_NAME = {concept.name: concept for concept in CONCEPTS}


class Question(NamedTuple):
    """A digit and two concepts, in the order in which they are applied. source: the document, or the walk, that it comes from."""

    digit: int
    pair: Pair
    source: int

    @property
    def text(self) -> str:
        return f"{self.digit}{self.pair[0]}{self.pair[1]}="

    @property
    def answer(self) -> str:
        first, second = self.pair
        return str(second(first(self.digit)))


class World:
    """Chapters, documents and questions, all functions of the seed.

    chapters: different sets of concepts, two of each of two topics. documents: each tells of a chapter and has EXERCISES exercises on the
    few pairs that this chapter practises. share: of all pairs of concepts, in either order, those that no document and no question
    combines; chosen by a hash. Raises UserError when every pair would be held out.
    """

    def __init__(self, chapters: int, documents: int, share: float, seed: int) -> None:
        self._seed, self._share = seed, share
        rng = self._rng(0)
        drawn = (self._chapter(rng) for _ in range(100 * chapters))
        self.chapters = [chapter for chapter in drawn if self._practised(chapter)][:chapters]
        if len(self.chapters) < chapters:
            raise UserError(f"data.held_out: {share}; so large a share of the pairs leaves too few chapters with exercises; lower it")
        self.chapter_of = rng.integers(chapters, size=documents)

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._seed, stream]))

    @staticmethod
    def _chapter(rng: np.random.Generator) -> tuple[Concept, ...]:
        topics = rng.permutation(list(OPERATIONS))[:TOPICS_OF_CHAPTER]
        concepts = [Concept(str(t), int(n)) for t in topics for n in rng.permutation(list(OPERATIONS[t][1]))[:CONCEPTS_OF_TOPIC]]
        return tuple(concepts[i] for i in rng.permutation(len(concepts)))

    def is_held_out(self, pair: Pair) -> bool:
        return hash_unit(" and ".join(sorted(concept.name for concept in pair))) < self._share

    def _practised(self, chapter: Sequence[Concept]) -> list[Pair]:
        """The pairs that a chapter's exercises are about: each concept with the next."""
        return [pair for pair in pairwise(chapter) if not self.is_held_out(pair)]

    @cached_property
    def exercises(self) -> list[Question]:
        """Those of all documents, EXERCISES each: level 1."""
        return self._questions(1, (self._practised(self.chapters[chapter]) for chapter in self.chapter_of), EXERCISES, repeat=True)

    def questions(self, level: int) -> list[Question]:
        """All questions of a level, EXERCISES times as many as there are documents, in random order: subsets of any size are prefixes."""
        if level == 1:
            found = self.exercises
        elif level == 2:
            offered = [[p for p in permutations(chapter, 2) if not self.is_held_out(p)] for chapter in self.chapters]
            found = self._questions(2, (offered[chapter] for chapter in self.chapter_of), EXERCISES)
        else:
            found = self._walked(EXERCISES * len(self.chapter_of))
        return [found[i] for i in self._rng(10 + level).permutation(len(found))]

    def _walked(self, count: int) -> list[Question]:
        """Level 3: questions of two concepts of different topics that a walk met, OF_A_WALK a walk."""
        documents = [self._contents(self.chapters[chapter]) for chapter in self.chapter_of]
        graph = build_graph(index_documents(documents, {}), EPSILON)
        epochs = -(-count // (OF_A_WALK * len(graph.topics)))
        found: list[Question] = []
        for first in range(0, 100 * epochs, epochs):
            walks = sample_epochs(graph, RULE, self._seed, range(first, first + epochs))
            met = ([BY_NAME[graph.concepts.names[i]] for i in dict.fromkeys(row[row >= 0].tolist())] for row in walks.concepts)
            offered = ([p for p in permutations(some, 2) if p[0].topic != p[1].topic and not self.is_held_out(p)] for some in met)
            found += self._questions(3 + first, offered, OF_A_WALK, source=first * len(graph.topics))
            if len(found) >= count:
                return found[:count]
        raise UserError(f"data.held_out: {self._share}; walks meet no other pairs of concepts; lower it")

    def _questions(
        self, stream: int, offered: Iterable[list[Pair]], count: int, repeat: bool = False, source: int = 0
    ) -> list[Question]:  # fmt: skip
        """`count` questions from each source; no pair twice while there are others."""
        rng, found = self._rng(100 + stream), list[Question]()
        for place, pairs in enumerate(offered, start=source):
            picked = rng.integers(len(pairs), size=count) if repeat else rng.permutation(len(pairs))[:count]
            found += [Question(int(digit), pairs[i], place) for i, digit in zip(picked, rng.integers(10, size=len(picked)))]
        return found

    @staticmethod
    def _contents(chapter: Sequence[Concept]) -> dict[str, list[str]]:
        """K(d): topics with their key concepts."""
        return {topic: [c.name for c in chapter if c.topic == topic] for topic in dict.fromkeys(c.topic for c in chapter)}

    def held_out(self, count: int) -> list[Question]:
        """Different questions that combine concepts as no other question does. Raises UserError when there are not so many."""
        pairs = [pair for pair in permutations(CONCEPTS, 2) if self.is_held_out(pair)]
        if len(pairs) * 10 < count:
            raise UserError(f"data.val_samples: {count}; there are {10 * len(pairs)} questions that combine concepts anew; lower it")
        picked = self._rng(4).permutation(10 * len(pairs))[:count]
        return [Question(int(i) % 10, pairs[int(i) // 10], int(i) // 10) for i in picked]

    def documents(self) -> Iterator[str]:
        """The text of every document: examples of its chapter's concepts, then its exercises, which have no answers."""
        rng = self._rng(5)
        for place, chapter in enumerate(self.chapter_of):
            concepts = self.chapters[chapter]
            facts = [(x, c) for c in concepts for x in rng.permutation(10)[:FACTS].tolist()]
            lines = [f"{x}{c}={c(x)}" for x, c in (facts[i] for i in rng.permutation(len(facts)))]
            exercises = self.exercises[EXERCISES * place : EXERCISES * (place + 1)]
            yield f"{', '.join(self._contents(concepts))}: {' '.join(lines)}\n{' '.join(q.text + '?' for q in exercises)}\n"


class QuestionCorpus:
    """The first `samples` questions of a level (level 0: the first documents), and held-out combinations."""

    name = "questions"
    weight: float | None = None

    def __init__(self, world: Callable[[], World], key: Sequence[Any], level: int, samples: int, held_out_count: int) -> None:
        self._world, self._key, self._level, self._samples, self._count = world, key, level, samples, held_out_count

    def fingerprint(self) -> str:
        # numpy may change its streams between versions
        return digest("concepts_world", *self._key, self._level, self._samples, self._count, np.__version__)

    def train(self) -> Iterator[Document]:
        if self._level == 0:
            texts = self._world().documents()
            return (Document(f"document#{i}", (Piece(text),)) for i, text in zip(range(self._samples), texts))
        questions = self._world().questions(self._level)
        if len(questions) < self._samples:  # a document has no more pairs than are left to it
            raise UserError(
                f"data.samples: {self._samples}; this world has {len(questions)} questions of level {self._level}; raise data.documents or "
                "lower data.held_out"
            )
        return _documents(questions[: self._samples])

    def held_out(self) -> Iterator[Document]:
        return _documents(self._world().held_out(self._count))

    def size(self, split: str) -> int:
        return self._samples * (160 if self._level == 0 else LENGTH) if split == "train" else self._count * LENGTH


def _documents(questions: Sequence[Question]) -> Iterator[Document]:
    for i, question in enumerate(questions):
        # the newline is no label, and so neither is the end of the document: accuracy is that of answers
        yield Document(f"{question.text}#{i}", (Piece(question.text, loss=False), Piece(question.answer), Piece("\n", loss=False)))


class ConceptsWorld(CorpusData):
    """Questions of one level of diversity about a world of computable concepts; held out are combinations that none of them has.

    level: 1 (exercises copied from documents), 2 (two concepts of a document), 3 (concepts along walks of the graph), or 0 (the documents
    themselves, to pretrain on). samples: the first so many of one random order, so that smaller sets lie in larger ones. documents,
    chapters: what the world has; `held_out`: share of all pairs of concepts that are only asked at the end, val_samples such questions.
    seed: of the world, not of the run. eval/cross/accuracy is the share of held-out questions answered right. See CorpusData for the other
    arguments. Raises UserError for values out of range.
    """

    whole_documents = True

    def __init__(
        self, level: int, samples: int, documents: int, chapters: int, held_out: float, val_samples: int, seed: int,
        tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        self._level = int(choice("data.level", str(level), tuple(map(str, LEVELS))))
        documents, chapters = at_least("data.documents", documents, 1), at_least("data.chapters", chapters, 1)
        key = chapters, documents, fraction("data.held_out", held_out), at_least("data.seed", seed, 0)
        self._samples, there = at_least("data.samples", samples, 1), documents if self._level == 0 else EXERCISES * documents
        if self._samples > there:
            raise UserError(f"data.samples: {samples}; {documents} documents give {there} at level {self._level}; raise data.documents")
        self._made: World | None = None
        self._world_key = key
        count = at_least("data.val_samples", val_samples, 1)
        self._corpus = QuestionCorpus(lambda: self.world, key, self._level, self._samples, count)
        self.source = f"level {self._level} of a world of {len(CONCEPTS)} concepts"

    @property
    def world(self) -> World:
        """The world; made when it is first needed."""
        if self._made is None:
            self._made = World(*self._world_key)
        return self._made

    def _corpora(self) -> Sequence[Corpus]:
        return [self._corpus]

    def evaluations(self) -> dict[str, Iterable[Batch]]:
        """Return the held-out combinations as `cross`, so that the share of right answers is measured too."""
        return {"cross": self.val_batches()}

    def diversity(self) -> dict[str, float]:
        """How different the training questions are: distinct questions and pairs, pairs that are allowed, cosine within a source."""
        questions = self.world.questions(self._level)[: self._samples]
        by_source: dict[int, list[str]] = {}
        for question in questions:
            by_source.setdefault(question.source, []).append(f"{question.digit} {question.pair[0].name} {question.pair[1].name}")
        cosines = within_document_cosines(list(by_source.values()), HashedTfIdf(4096))
        allowed = sum(not self.world.is_held_out(pair) for pair in permutations(CONCEPTS, 2))
        return {
            "distinct_questions": len({q[:2] for q in questions}), "distinct_pairs": len({q.pair for q in questions}),
            "possible_pairs": allowed, "within_source_cosine": float(cosines.mean()) if len(cosines) else float("nan"),
        }  # fmt: skip

    @property
    def val_bytes(self) -> int:
        """0: bits per byte of random digits say nothing; see eval/cross/accuracy."""
        return 0

    @staticmethod
    def _make_baselines(folder: Path, corpora: Any, fingerprint: str) -> dict[str, float]:
        return {}
