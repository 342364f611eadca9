"""The documents nearest to a concept set, by Jaccard similarity (SynthLLM, sec. 2.2): exact, over all documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from components.errors import UserError

_BLOCK_PAIRS = 1 << 22  # (set, document) pairs held at once: about 100 MB


@dataclass(frozen=True)
class Nearest:
    """For each of W sets its documents, nearest first, (W, count) int64, and their similarities, (W, count) float64."""

    documents: NDArray[np.int64]
    similarities: NDArray[np.float64]


def nearest_documents(sets: sparse.csr_matrix, documents: sparse.csr_matrix, count: int) -> Nearest:
    """The `count` (paper: two) documents with the greatest |a & b| / |a | b|; among equals the lower index.

    Intersections are counted through the postings of the sets' members, S D^T in blocks of rows; documents without a common member follow
    by their index, with similarity 0.

    Args:
        sets: (W, names), documents: (documents, names), both int32 CSR of ones.
        count: 1 to the number of documents, else UserError.
    """
    if not 1 <= count <= documents.shape[0]:
        raise UserError(f"retrieval.documents: {count}; allowed are 1 to {documents.shape[0]:,}, the number of documents")
    postings = documents.T.tocsr()
    lengths, own = np.diff(documents.indptr).astype(np.int64), np.diff(sets.indptr).astype(np.int64)
    work = np.concatenate([[0], np.cumsum(sets @ np.diff(postings.indptr).astype(np.int64))])  # postings read up to each set
    found = np.empty((sets.shape[0], count), dtype=np.int64)
    scores = np.empty((sets.shape[0], count), dtype=np.float64)
    first = 0
    while first < sets.shape[0]:
        last = max(int(np.searchsorted(work, work[first] + _BLOCK_PAIRS, side="right")) - 1, first + 1)
        common = sets[first:last] @ postings
        found[first:last], scores[first:last] = _best(common, own[first:last], lengths, count)
        first = last
    return Nearest(found, scores)


def _best(
    common: sparse.csr_matrix, own: NDArray[np.int64], lengths: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:  # fmt: skip
    """Best documents of a block from sizes of intersections, (block, documents) CSR with columns in any order."""
    rows, pointers, documents = common.shape[0], common.indptr, common.indices
    filled = np.flatnonzero(np.diff(pointers))
    per_row = np.diff(pointers)[filled]
    # equal fractions of small integers are equal in float64 as well, so that ties are found exactly
    similarity = common.data / (np.repeat(own[filled], per_row) + lengths[documents] - common.data)
    found, scores = np.full((rows, count), -1, dtype=np.int64), np.zeros((rows, count))
    for place in range(count):
        if not len(filled):
            break
        best = np.maximum.reduceat(similarity, pointers[filled])
        ties = np.flatnonzero(similarity == np.repeat(best, per_row))
        row = np.searchsorted(pointers, ties, side="right") - 1
        lowest = np.full(rows, np.iinfo(np.int64).max)
        np.minimum.at(lowest, row, documents[ties])
        chosen = ties[documents[ties] == lowest[row]]
        row = np.searchsorted(pointers, chosen, side="right") - 1
        left = similarity[chosen] > 0
        found[row[left], place], scores[row[left], place] = documents[chosen[left]], similarity[chosen[left]]
        similarity[chosen] = 0
    for short in np.flatnonzero((found < 0).any(axis=1)):  # fewer documents than `count` share a member
        have = found[short][found[short] >= 0]
        others = np.setdiff1d(np.arange(min(len(lengths), 2 * count)), have)
        found[short, len(have) :] = others[: count - len(have)]
    return found, scores
