"""Deterministic automata over the bytes of UTF-8, of a set of texts or of a regular expression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from components.contracts import UserError
from components.decoding.regex import Node, parse

DEAD, START = 0, 1
MAX_STATES = 20_000  # of an automaton: 1 KiB each
MAX_PARTS = 100_000  # of what it is made from; `.` has 21
MAX_STEPS = 20_000_000  # of its construction: parts looked at for each state and each range of bytes; two or three seconds


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton; from every state but DEAD an accepting one can be reached, so that what was said can be completed.

    transitions: (S, 256) int32, the state after each byte; accepting: (S,) bool.
    """

    transitions: np.ndarray
    accepting: np.ndarray

    def walk(self, state: int, data: bytes) -> int:
        """The state after `data`."""
        for byte in data:
            state = int(self.transitions[state, byte])
        return state

    def accepts(self, text: str) -> bool:
        """Whether the text is in the language, from end to end."""
        return bool(self.accepting[self.walk(START, text.encode())])


def of_texts(texts: Iterable[str]) -> Automaton:
    """The automaton of a finite set of texts."""
    rows: list[dict[int, int]] = [{}, {}]
    accepting = [False, False]
    for text in texts:
        state = START
        for byte in text.encode():
            if byte not in rows[state]:
                rows[state][byte] = len(rows)
                rows.append({})
                accepting.append(False)
                if len(rows) > MAX_STATES:
                    raise UserError(f"decode.choice: the texts have more than {MAX_STATES} beginnings; give fewer or shorter ones")
            state = rows[state][byte]
        accepting[state] = True
    transitions = np.zeros((len(rows), 256), dtype=np.int32)
    for state, row in enumerate(rows):
        for byte, target in row.items():
            transitions[state, byte] = target
    return Automaton(transitions, np.array(accepting))


def of_regex(pattern: str) -> Automaton:
    """The automaton of a regular expression, see `components.decoding.regex`.

    Raises UserError where the pattern is not one, uses what is not supported, matches nothing, or needs too many states or steps.
    """

    def too_large(what: str = f"{MAX_STATES} states") -> UserError:
        return UserError(f"decode.regex: {pattern!r} needs more than {what}; make its repetitions shorter")

    parts = _Parts(too_large)
    start, end = parts.build(parse(pattern))
    transitions, accepting = _subsets(parts, start, end, too_large)
    automaton = _alive(transitions, accepting)
    if automaton is None:
        raise UserError(f"decode.regex: {pattern!r} matches no text at all")
    return automaton


class _Parts:
    """Thompson's construction: a non-deterministic automaton with one start and one end for every part of the pattern."""

    def __init__(self, too_large: Callable[[], UserError]) -> None:
        self.free: list[list[int]] = []  # targets that are reached without a byte
        self.edges: list[list[tuple[int, int, int]]] = []  # first byte, last byte, target
        self._too_large = too_large

    def build(self, node: Node) -> tuple[int, int]:
        """Add the automaton of `node`. Returns its start and its end."""
        if node.kind == "characters":
            start, end = self._state(), self._state()
            for low, high in node.ranges:
                for sequence in utf8_ranges(low, high):
                    self._sequence(start, end, sequence)
            return start, end
        if node.kind == "repeat":
            return self._repeat(node)
        built = [self.build(part) for part in node.parts] if node.kind == "either" else []
        start = self._state()
        if node.kind == "either":
            end = self._state()
            for begin, finish in built:
                self.free[start].append(begin)
                self.free[finish].append(end)
            return start, end
        end = start
        for part in node.parts:  # one after the other
            begin, finish = self.build(part)
            self.free[end].append(begin)
            end = finish
        return start, end

    def _repeat(self, node: Node) -> tuple[int, int]:
        start = end = self._state()
        exits = []
        for count in range(node.least if node.most is None else node.most):
            if count >= node.least:
                exits.append(end)
            begin, finish = self.build(node.parts[0])
            self.free[end].append(begin)
            end = finish
        if node.most is None:
            loop = self._state()
            begin, finish = self.build(node.parts[0])
            self.free[end].append(loop)
            self.free[loop].append(begin)
            self.free[finish].append(loop)
            end = loop
        last = self._state()
        for state in [*exits, end]:
            self.free[state].append(last)
        return start, last

    def _sequence(self, start: int, end: int, sequence: Sequence[tuple[int, int]]) -> None:
        for index, (low, high) in enumerate(sequence):
            target = end if index == len(sequence) - 1 else self._state()
            self.edges[start].append((low, high, target))
            start = target

    def _state(self) -> int:
        if len(self.free) >= MAX_PARTS:
            raise self._too_large()
        self.free.append([])
        self.edges.append([])
        return len(self.free) - 1


def _subsets(parts: _Parts, start: int, end: int, too_large: Callable[..., UserError]) -> tuple[np.ndarray, np.ndarray]:
    """The subset construction. Returns transitions (S, 256) and accepting (S,)."""
    closures: dict[frozenset[int], frozenset[int]] = {}
    steps = 0

    def count(more: int) -> None:
        nonlocal steps
        steps += more
        if steps > MAX_STEPS:
            raise too_large(f"{MAX_STEPS} steps to be prepared")

    def closure(states: frozenset[int]) -> frozenset[int]:
        if states not in closures:
            found, todo = set(states), list(states)
            while todo:
                fresh = [target for target in parts.free[todo.pop()] if target not in found]
                found.update(fresh)
                todo += fresh
            count(10 * len(found))  # as slow as ten of the others
            # only states that read a byte, and the end, tell one set from another
            closures[states] = frozenset(state for state in found if parts.edges[state] or state == end)
        return closures[states]

    first = closure(frozenset([start]))
    numbers = {first: START}
    sets = [first]
    rows = [np.zeros(256, dtype=np.int32)]
    for current in sets:
        row = np.zeros(256, dtype=np.int32)
        edges = [edge for state in current for edge in parts.edges[state]]
        bounds = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
        count(len(edges) * len(bounds))
        for low, after in pairwise(bounds):
            targets = frozenset(target for begin, finish, target in edges if begin <= low <= finish)
            if not targets:
                continue
            reached = closure(targets)
            if reached not in numbers:
                if len(numbers) >= MAX_STATES:
                    raise too_large()
                numbers[reached] = len(numbers) + 1
                sets.append(reached)
            row[low:after] = numbers[reached]
        rows.append(row)
    return np.stack(rows), np.array([False, *(end in states for states in sets)])


def _alive(transitions: np.ndarray, accepting: np.ndarray) -> Automaton | None:
    """Leave out the states from which no accepting one can be reached; None where the start is one of them."""
    sources = np.repeat(np.arange(len(transitions)), 256)
    targets = transitions.ravel()
    order = np.argsort(targets, kind="stable")
    ends = np.searchsorted(targets[order], np.arange(len(transitions) + 1))
    alive, todo = accepting.copy(), list(np.flatnonzero(accepting))
    while todo:
        state = todo.pop()
        for source in np.unique(sources[order[ends[state] : ends[state + 1]]]):
            if source != DEAD and not alive[source]:
                alive[source] = True
                todo.append(source)
    if not alive[START]:
        return None
    numbers = np.where(alive, np.cumsum(alive), DEAD).astype(np.int32)  # START is alive, and so stays the first
    kept = np.concatenate([[DEAD], np.flatnonzero(alive)])
    return Automaton(numbers[transitions[kept]], accepting[kept])


def utf8_ranges(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Split the code points low..high, none of them a surrogate, into products of byte ranges of their UTF-8.

    >>> list(utf8_ranges(0x7E, 0x81))
    [((126, 127),), ((194, 194), (128, 129))]
    """
    for limit in (0x7F, 0x7FF, 0xFFFF):  # the last code points of one, two and three bytes
        if low <= limit < high:
            yield from utf8_ranges(low, limit)
            yield from utf8_ranges(limit + 1, high)
            return
    first, last = chr(low).encode(), chr(high).encode()
    for tail in range(1, len(first)):  # until all bytes after those that differ run over their whole range
        span = (1 << (6 * tail)) - 1
        if low & ~span != high & ~span:
            if low & span:
                yield from utf8_ranges(low, low | span)
                yield from utf8_ranges((low | span) + 1, high)
                return
            if high & span != span:
                yield from utf8_ranges(low, (high & ~span) - 1)
                yield from utf8_ranges(high & ~span, high)
                return
    yield tuple(zip(first, last, strict=True))
