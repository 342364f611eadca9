"""What a model is asked in each stage: calls with their prompts, cut to the room that there is, and named by what is in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from components.decoding.rounds import seed_of
from components.errors import UserError
from components.store import request_id
from components.synthesis.concepts import Concepts, normal_name
from components.synthesis.corpus import Corpus, index_documents, slices
from components.synthesis.graph import ConceptGraph, build_graph
from components.synthesis.prompts import Prompts, combinations_listed, joined, listed, outline
from components.synthesis.retrieval import nearest_documents
from components.synthesis.walks import WalkRule, sample_epochs

Fits = Callable[[str], bool]  # is there room for a prompt, and for its reply?
TRIES = 64  # draws of a combination that is not used yet, before a document counts as exhausted


@dataclass(frozen=True)
class Document:
    """A reference document. id: hash of its text. place: file and line."""

    id: str
    text: str
    place: str


@dataclass(frozen=True)
class Call:
    """One call. kind: of its prompt. documents: their ids. attempt: which call on the same it is, from 0.

    offered: concepts that it may combine; combinations: those that each question is to combine; topics: of the set; walk: where the set
    comes from; shortened: documents were cut to fit.
    """

    kind: str
    prompt: str
    documents: tuple[str, ...]
    attempt: int = 0
    offered: tuple[str, ...] = ()
    combinations: tuple[tuple[str, ...], ...] = ()
    topics: tuple[str, ...] = ()
    walk: Mapping[str, Any] | None = None
    shortened: bool = False

    @cached_property
    def name(self) -> str:
        """32 hex digits that depend on what is asked alone."""
        return request_id(prompt=self.prompt, documents=list(self.documents), attempt=self.attempt, walk=self.walk)


@dataclass
class Asker:
    """Makes the calls of all stages.

    prompts: their words. fits: see `Fits`. no_room: calls that were left out, by kind, since nothing of a document fits beside the words.
    """

    prompts: Prompts
    fits: Fits
    no_room: dict[str, int] = field(default_factory=dict)

    def call(self, kind: str, documents: Sequence[Document], attempt: int = 0, n: int = 1, concepts: str = "", **about: Any) -> Call | None:
        """The call on documents, whose ends are cut where they do not fit; None where nothing does."""
        texts = [document.text for document in documents]

        def prompt(most: int) -> str:
            return self.prompts.fill(kind, n=str(n), concepts=concepts, document=joined([text[:most] for text in texts]))

        longest = max(map(len, texts))
        most = longest
        if not self.fits(prompt(longest)):
            low, high = 0, longest  # the largest that fits, where more characters never need less room
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.fits(prompt(middle)) else (low, middle)
            most = low
        if most == 0:
            self.no_room[kind] = self.no_room.get(kind, 0) + 1
            return None
        ids = tuple(document.id for document in documents)
        return Call(kind, prompt(most), ids, attempt, shortened=most < longest, **about)

    def on_each(self, kind: str, documents: Sequence[Document], attempt: int = 0, n: int = 1) -> Iterator[Call]:
        """One call on every document: `rate`, `extract` or `level1`."""
        for document in documents:
            if call := self.call(kind, [document], attempt, n):
                yield call

    def on_own_concepts(
        self, documents: Sequence[Document], concepts: Mapping[str, Concepts], rule: Combining, attempt: int, n: int, seed: int
    ) -> Iterator[Call]:  # fmt: skip
        """Level 2: on the concepts of a document, chosen by the model or drawn here; documents with fewer than two are left out."""
        for document in documents:
            own = concepts.get(document.id, {})
            offered = distinct_names(own)
            about: dict[str, Any] = {"offered": offered, "topics": tuple(own)}
            if len(offered) < min(rule.sizes):
                continue
            if rule.sampler == "prompt":
                call = self.call("level2", [document], attempt, n, outline(own), **about)
            else:
                drawn = rule.draw(offered, n, seed, document.id, attempt)
                if not drawn:
                    continue
                call = self.call("level2_drawn", [document], attempt, len(drawn), combinations_listed(drawn), combinations=drawn, **about)
            if call:
                yield call


@dataclass(frozen=True)
class Combining:
    """R(K) of level 2: which concepts of a document a question combines.

    sampler: prompt, the model chooses, as in the paper; code, they are drawn here from the run's seed, so that a combination is never
    asked for twice and coverage can be replayed. sizes: how many concepts, one of which is drawn evenly.

    Raises UserError for another word, and sizes below 1.
    """

    sampler: str
    sizes: Sequence[int]

    def __post_init__(self) -> None:
        if self.sampler not in ("prompt", "code"):
            raise UserError(f"task.combining.sampler: {self.sampler!r}; prompt (the model chooses) or code (drawn here) is allowed")
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in self.sizes)
        if not self.sizes or not whole:
            raise UserError(f"task.combining.sizes: {list(self.sizes)}; allowed is a list of whole numbers of at least 1, such as [2, 3]")

    def draw(self, offered: Sequence[str], n: int, seed: int, document: str, attempt: int) -> tuple[tuple[str, ...], ...]:
        """The combinations of one attempt: up to n that no attempt before it had, fewer where the document is exhausted."""
        sizes = [size for size in self.sizes if size <= len(offered)]
        generator = np.random.default_rng(seed_of(seed, document, "combination"))
        found: dict[frozenset[int], tuple[str, ...]] = {}
        tries = 0
        while len(found) < n * (attempt + 1) and tries < TRIES * n * (attempt + 1):
            tries += 1
            chosen = generator.choice(len(offered), int(generator.choice(sizes)), replace=False)
            found.setdefault(frozenset(chosen.tolist()), tuple(offered[place] for place in chosen))
        return tuple(found.values())[n * attempt :]


@dataclass(frozen=True)
class Mixing:
    """Level 3: sets of concepts by walks on the global graph, and the documents that they are asked with.

    walk: how a set is drawn. epochs: passes over all topics (paper: 5). questions: of a set (paper: 3). most_sets: of all, the first; None:
    all. shards: graphs, each of a run of the documents (the paper's have about 32,000 topics). epsilon: of a weight. members: what a
    set is in retrieval, all or concepts. documents: of a set (paper: 2).

    Raises UserError for values that are not allowed.
    """

    walk: WalkRule
    epochs: int
    questions: int
    most_sets: int | None
    shards: int
    epsilon: float
    members: str
    documents: int

    def __post_init__(self) -> None:
        for key in ("epochs", "questions", "most_sets", "shards", "documents"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"task.mixing.{key}: {value!r}; allowed is a whole number of at least 1")

    def graphs(self, concepts: Sequence[Concepts], aliases: Mapping[str, str]) -> Iterator[tuple[slice, Corpus, ConceptGraph]]:
        """Each shard's documents, their concepts as rows, and its graph; a shard without a topic is left out."""
        for part in slices(len(concepts), min(self.shards, max(len(concepts), 1))):
            corpus = index_documents(concepts[part], aliases)
            if len(corpus.topics):
                yield part, corpus, build_graph(corpus, self.epsilon)

    def calls(
        self, asker: Asker, documents: Sequence[Document], parts: Sequence[tuple[slice, Corpus, ConceptGraph]], seed: int
    ) -> Iterator[Call]:  # fmt: skip
        """A call for every set, with the documents nearest to it."""
        made = itertools.chain.from_iterable(
            self._sets(number, documents[part], corpus, graph, seed) for number, (part, corpus, graph) in enumerate(parts)
        )
        for near, about in itertools.islice(made, self.most_sets):
            call = asker.call("level3", near, 0, self.questions, listed([*about["topics"], *about["offered"]]), **about)
            if call:
                yield call

    def _sets(
        self, shard: int, documents: Sequence[Document], corpus: Corpus, graph: ConceptGraph, seed: int
    ) -> Iterator[tuple[list[Document], dict[str, Any]]]:  # fmt: skip
        walks = sample_epochs(graph, self.walk, seed, range(self.epochs))
        nearest = nearest_documents(walks.sets(graph, self.members), corpus.sets(self.members), min(self.documents, len(corpus)))
        for row in range(len(walks)):
            came_from = walks.provenance(row)
            topics = tuple(dict.fromkeys(graph.topics.surfaces[place] for place in came_from["topics"]))
            offered = tuple(dict.fromkeys(graph.concepts.surfaces[place] for place in came_from["concepts"]))
            walk = {"graph": graph.address[:16], "shard": shard, **{key: came_from[key] for key in ("seed", "epoch", "topic")}}
            yield [documents[int(place)] for place in nearest.documents[row]], {"topics": topics, "offered": offered, "walk": walk}


def distinct_names(concepts: Concepts) -> tuple[str, ...]:
    """All key concepts of a document, each spelling once by its normal form, in their order."""
    found: dict[str, str] = {}
    for names in concepts.values():
        for name in names:
            found.setdefault(normal_name(name, {}), name)
    return tuple(found.values())
