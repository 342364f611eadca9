"""Associative recall in a text that can also be predicted: what a rule for longer rows is measured by when models are small.

Running letters alone hardly tell whether far tokens are reached; a question about a fact says nothing else.
"""

from __future__ import annotations

import itertools

import numpy as np

PAIRS = 6  # facts of a text, and questions at its end
SHORTEST = 64  # characters
_LETTERS = "abcdefghijklmnop"
_NEXT = [[(i + 1) % 16, (3 * i + 2) % 16, (5 * i + 7) % 16, (7 * i + 12) % 16] for i in range(16)]  # any fixed chain would do
_SHARES = (0.55, 0.25, 0.15, 0.05)
_KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def chain(rng: np.random.Generator, length: int) -> str:
    """A text of `length` letters, each followed by one of four others: about 1.1 nats a letter."""
    state = int(rng.integers(16))
    letters = []
    for branch in np.searchsorted(np.cumsum(_SHARES)[:-1], rng.random(length), side="right").tolist():
        letters.append(_LETTERS[state])
        state = _NEXT[state][branch]
    return "".join(letters)


def pairs(rng: np.random.Generator, length: int) -> tuple[str, str]:
    """Hide six facts `#K4` (a key and a digit) anywhere, and a question `?K4` about each after it; the last question is at the end.

    The other questions lie in the second half: near ones teach less, and if all came last, a model would tell the end of a row by its
    place, which rescaled positions move.

    Returns: (prompt, answer); the prompt holds the other questions with their answers, and ends in the last one.
    """
    keys = [_KEYS[i] for i in rng.permutation(len(_KEYS))[:PAIRS]]
    value = {key: str(rng.integers(10)) for key in keys}
    text = chain(rng, length - 6 * PAIRS)
    places: list[tuple[int, str]] = []
    for key in keys:
        told = int(rng.integers(len(text) + 1))
        asked = int(rng.integers(max(told, len(text) // 2), len(text) + 1))
        places += [(told, f"#{key}{value[key]}"), *([(asked, f"?{key}{value[key]}")] if key != keys[-1] else [])]
    places.sort(key=lambda place: place[0])  # stable: a fact stays before its question
    ends = [0, *(at for at, _ in places), len(text)]
    said = "".join(text[start:end] + what for (start, end), (_, what) in zip(itertools.pairwise(ends), [*places, (0, "")], strict=True))
    return said + f"?{keys[-1]}", value[keys[-1]]


def answered(prompt: str) -> list[int]:
    """Places of the digits that answer the questions before the last.

    >>> answered("#A4xy#B7?B7?A")
    [10]
    """
    return [i for i, c in enumerate(prompt) if c.isdigit() and prompt[i - 2] == "?"]
