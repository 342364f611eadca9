"""Documents as sparse rows of topics and key concepts: the form that the graph, the walks and retrieval work on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from components.errors import UserError
from components.synthesis.concepts import Concepts, normal_name


@dataclass(frozen=True)
class Vocabulary:
    """Names of one kind. names: sorted normal forms, whose places are the ids; surfaces: the commonest spelling of each, for prompts."""

    names: list[str]
    surfaces: list[str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Corpus:
    """K(d) of every document. doc_topics: (documents, topics), doc_concepts: (documents, concepts), int32 CSR of ones, ids sorted."""

    topics: Vocabulary
    concepts: Vocabulary
    doc_topics: sparse.csr_matrix
    doc_concepts: sparse.csr_matrix

    def __len__(self) -> int:
        return int(self.doc_topics.shape[0])

    def sets(self, members: str) -> sparse.csr_matrix:
        """The concept set of each document as ones over T topics, then C key concepts: (documents, T + C) int32.

        members: "all" or "concepts" (the columns of topics stay empty). A topic and a key concept of one name are two members.
        """
        topics = self.doc_topics if members_of(members) == "all" else sparse.csr_matrix(self.doc_topics.shape, dtype=np.int32)
        return sparse.hstack([topics, self.doc_concepts], format="csr", dtype=np.int32)


def members_of(members: str) -> str:
    """Return `members` when it is "all" or "concepts", else raise UserError."""
    if members not in ("all", "concepts"):
        raise UserError(f"retrieval.members: {members!r}; allowed are all (topics and key concepts) and concepts")
    return members


def ones_at(ids: NDArray[np.integer], columns: int) -> sparse.csr_matrix:
    """Ones at the ids of each row, (rows, columns) int32 CSR with sorted columns.

    ids: (rows, places), -1 for none; an id that is repeated in a row counts once.
    """
    ids = np.sort(ids, axis=1)
    new = ids >= 0
    new[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    pointers = np.concatenate([[0], np.cumsum(new.sum(axis=1))])
    return sparse.csr_matrix((np.ones(pointers[-1], dtype=np.int32), ids[new], pointers), shape=(len(ids), columns))


def incidence(rows: Sequence[Iterable[int]], columns: int) -> sparse.csr_matrix:
    """The same for rows of any lengths."""
    sorted_rows = [sorted(set(row)) for row in rows]
    pointers = np.concatenate([[0], np.cumsum([len(row) for row in sorted_rows], dtype=np.int64)])
    ids = np.fromiter((i for row in sorted_rows for i in row), dtype=np.int64, count=int(pointers[-1]))
    return sparse.csr_matrix((np.ones(len(ids), dtype=np.int32), ids, pointers), shape=(len(rows), columns))


def index_documents(documents: Sequence[Concepts], aliases: Mapping[str, str]) -> Corpus:
    """Give every distinct name of `documents` (their K(d)) an id. aliases: see `concepts.alias_map`; names that are empty are left out."""
    normal: dict[str, str] = {}  # every spelling is brought into normal form once
    for document in documents:
        for topic, names in document.items():
            for name in (topic, *names):
                if name not in normal:
                    normal[name] = normal_name(name, aliases)
    topics, doc_topics = _index([list(document) for document in documents], normal)
    concepts, doc_concepts = _index([[name for names in document.values() for name in names] for document in documents], normal)
    return Corpus(topics, concepts, doc_topics, doc_concepts)


def slices(documents: int, shards: int) -> list[slice]:
    """Cut `documents` into `shards` runs of equal length, give or take one; each gets a graph of its own, as in the paper."""
    if not 1 <= shards <= max(documents, 1):
        raise UserError(f"graph.shards: {shards}; allowed are 1 to {documents:,}, the number of documents")
    ends = [documents * place // shards for place in range(shards + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


def _index(rows: list[list[str]], normal: Mapping[str, str]) -> tuple[Vocabulary, sparse.csr_matrix]:
    """Vocabulary of the spellings in `rows`, and the rows' ids."""
    spellings: dict[str, tuple[int, str]] = {}  # normal form -> (-count, spelling) of the commonest; the first in the alphabet among equals
    for spelling, count in Counter(spelling for row in rows for spelling in row).items():
        if name := normal[spelling]:
            spellings[name] = min(spellings.get(name, (0, "")), (-count, spelling))
    names = sorted(spellings)
    ids = {name: place for place, name in enumerate(names)}
    matrix = incidence([[ids[normal[spelling]] for spelling in row if normal[spelling]] for row in rows], len(names))
    return Vocabulary(names, [spellings[name][1].strip() for name in names]), matrix
