"""Which documents of a corpus belong to a domain (SynthLLM, sec. 2.1): random forests on embeddings, first of made-up against random
documents, then of ratings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.decoding.sampling import GOLDEN, MASK, mix64
from components.errors import UserError
from components.synthesis.diversity import Embedder

Rater = Callable[[Sequence[int]], Sequence[float]]  # indices of documents -> ratings from 1 to 10, nan where there is none


@dataclass(frozen=True)
class DocumentFilter:
    """Finds the documents of a domain in two stages.

    Args:
        embedder: texts -> rows of features.
        trees: of a forest. depth: of a tree, None for no limit. (The paper gives neither.)
        threshold: documents that score more are kept (paper: 6.5 of 10).
        rounds: of rating and scoring anew (paper: 2).
        random_documents: rated in each round besides those that were kept.
        seed: of forests and samples.

    Raises UserError for a value that is not allowed, or when scikit-learn is missing.
    """

    embedder: Embedder
    trees: int
    depth: int | None
    threshold: float
    rounds: int
    random_documents: int
    seed: int

    def __post_init__(self) -> None:
        for key, least in (("trees", 1), ("rounds", 0), ("random_documents", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"filter.{key}: {value!r}; allowed is a whole number of at least {least}")
        if not 1 <= self.threshold < 10:
            raise UserError(
                f"filter.threshold: {self.threshold!r}; ratings go from 1 to 10, so allowed is a number from 1 up to 10, such as 6.5"
            )
        forests()

    def cold_start(self, documents: Sequence[str], positives: Sequence[str], negatives: Sequence[str]) -> NDArray[np.int64]:
        """D^0: indices of the documents that are more like `positives` (made up for the domain) than like `negatives` (random ones)."""
        if not positives or not negatives:
            raise UserError(f"filter: {len(positives)} positive and {len(negatives)} negative examples; at least one of each is needed")
        vectors = self.embedder([*positives, *negatives, *documents])
        known = len(positives) + len(negatives)
        forest = self._forest("RandomForestClassifier", vectors[:known], np.arange(known) < len(positives))
        return np.flatnonzero(forest.predict(vectors[known:])) if documents else np.empty(0, dtype=np.int64)

    def refine(self, documents: Sequence[str], kept: NDArray[np.int64], rate: Rater) -> NDArray[np.int64]:
        """D^t: each round rates the kept documents and random others, learns to score from that, and keeps what scores above the threshold
        in the whole corpus.

        kept: D^0. rate: see `Rater`; a document is rated once, whatever the rounds.
        """
        vectors = self.embedder(documents)
        ratings: dict[int, float] = {}
        for number in range(self.rounds):
            asked = np.union1d(kept, self._sample(len(documents), number))
            new = [int(place) for place in asked if int(place) not in ratings]
            ratings.update(zip(new, _checked(rate(new), len(new))))
            if not len(asked):
                raise UserError("filter: no document was kept and filter.random_documents is 0, so there is nothing to rate")
            known = np.array([ratings[int(place)] for place in asked])
            rated = np.flatnonzero(~np.isnan(known))
            if not len(rated):
                raise UserError(f"filter: none of {len(asked):,} documents has a rating that can be read; see what the model replies")
            forest = self._forest("RandomForestRegressor", vectors[asked[rated]], known[rated])
            kept = np.flatnonzero(forest.predict(vectors) > self.threshold)
        return kept

    def _sample(self, documents: int, number: int) -> NDArray[np.int64]:
        """Indices of the random documents of a round."""
        key = np.uint64((self.seed * GOLDEN + number + 1) & MASK)
        order = np.argsort(mix64(mix64(np.arange(documents, dtype=np.uint64) * np.uint64(GOLDEN)) + key), kind="stable")
        return np.sort(order[: self.random_documents])

    def _forest(self, name: str, features: Any, targets: NDArray[Any]) -> Any:
        forest = getattr(forests(), name)(n_estimators=self.trees, max_depth=self.depth, random_state=self.seed % 2**32)
        return forest.fit(features, targets)


def forests() -> Any:
    """scikit-learn's module of forests. Raises UserError when it is not installed."""
    try:
        from sklearn import ensemble
    except ImportError as error:
        raise UserError("filter: scikit-learn is not installed; pip install 'patchbay[synthesis]', or leave the filter out") from error
    return ensemble


def _checked(ratings: Sequence[float], count: int) -> list[float]:
    """Ratings as floats, nan among them; UserError when there are too few or one is not from 1 to 10."""
    if len(ratings) != count:
        raise UserError(f"filter: {len(ratings):,} ratings for {count:,} documents; the rater must give one each")
    for rating in ratings:
        if not (1 <= rating <= 10 or math.isnan(rating)):
            raise UserError(f"filter: a rating of {rating!r}; allowed is a number from 1 to 10")
    return [float(rating) for rating in ratings]
