"""Documents for tests: random K(d) over few names, so that co-occurrences repeat and similarities tie."""

from __future__ import annotations

import random

from components.synthesis.concepts import Concepts
from components.synthesis.corpus import Corpus, index_documents


def random_documents(count: int, seed: int, topics: int = 6, concepts: int = 12) -> list[Concepts]:
    """One to three topics with none to four key concepts each; a key concept may stand under several topics."""
    source = random.Random(seed)
    names = [f"concept {number}" for number in range(concepts)]
    return [
        {f"topic {number}": source.sample(names, source.randint(0, 4)) for number in source.sample(range(topics), source.randint(1, 3))}
        for _ in range(count)
    ]


def random_corpus(count: int, seed: int, topics: int = 6, concepts: int = 12) -> Corpus:
    """The same, indexed."""
    return index_documents(random_documents(count, seed, topics, concepts), {})
