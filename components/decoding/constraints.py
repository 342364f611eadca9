"""Answers held to a regular expression or to a choice of texts: which tokens may come next, as masks over the vocabulary."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from components.contracts import Constraint, UserError
from components.data.tokenizers import Tokenizer
from components.decoding.automata import DEAD, START, Automaton, of_regex, of_texts

MASK_BYTES = 32 * 2**20  # of masks that a machine keeps; those asked for longest ago are made anew
MOST_MACHINES = 32  # that an engine keeps
BEGIN = -1  # nothing was said yet: some tokenizers leave out a space there


def constraint(regex: str | None, choice: Sequence[str] | None) -> Constraint | None:
    """The constraint that two keys of an option say; None where both are None."""
    return None if regex is None and choice is None else Constraint(None if choice is None else tuple(choice), regex)


@lru_cache(maxsize=64)
def automaton(constraint: Constraint) -> Automaton:
    """The automaton of a constraint. Raises UserError where it is none: both or neither set, no texts, a pattern that is not supported."""
    texts, pattern = constraint.choice, constraint.regex
    if (texts is None) == (pattern is None):
        raise UserError("decode.choice and decode.regex: an answer is held to one of them, not to both or to none")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise UserError(f"decode.regex: {pattern!r}; null (off) or a regular expression is allowed, in quotes")
        return of_regex(pattern)
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"decode.choice: {texts if isinstance(texts, str) else list(texts or ())!r}; null or a list of texts is allowed")
    return of_texts(texts)


class Vocabulary:
    """The bytes of all tokens as a tree of their beginnings, so that an automaton reads each beginning once.

    The tree is kept in the order of breadth: the children of a node lie side by side.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        ids = sorted((i for i, piece in enumerate(pieces) if piece), key=lambda i: pieces[i])
        lengths = np.array([len(pieces[i]) for i in ids], dtype=np.int64)
        begins = np.cumsum(lengths) - lengths  # of each token in `text`
        text = np.frombuffer(b"".join(pieces[i] for i in ids), dtype=np.uint8)
        node = np.zeros(len(ids), dtype=np.int64)  # of each token's beginning of the length read so far; 0 is the root
        byte, parent, size = [np.zeros(1, dtype=np.uint8)], [np.zeros(1, dtype=np.int64)], 1
        for depth in range(int(lengths.max(initial=0))):
            at = np.flatnonzero(lengths > depth)  # tokens with a common beginning are neighbours
            read, above = text[begins[at] + depth], node[at]
            fresh = np.ones(len(at), dtype=bool)
            fresh[1:] = (read[1:] != read[:-1]) | (above[1:] != above[:-1])
            node[at] = size - 1 + np.cumsum(fresh)
            byte.append(read[fresh])
            parent.append(above[fresh])
            size += int(fresh.sum())
        self._byte = np.concatenate(byte)
        self._children = np.bincount(np.concatenate(parent)[1:], minlength=size)
        self._first = 1 + np.cumsum(self._children) - self._children
        self._node = np.full(len(pieces), size, dtype=np.int64)  # tokens without bytes: a node that is never reached
        self._node[ids] = node
        self.pieces = pieces

    def after(self, transitions: np.ndarray, state: int) -> np.ndarray:
        """The state (V,) int32 of an automaton in `state` after each token, DEAD where it cannot come."""
        states = np.zeros(len(self._byte) + 1, dtype=np.int32)
        states[0] = state
        at = np.array([0])
        while len(at):
            counts = self._children[at]
            # the ids of all children: a running number, moved to the first child of each
            children = np.arange(counts.sum()) + np.repeat(self._first[at] - np.cumsum(counts) + counts, counts)
            reached = transitions[np.repeat(states[at], counts), self._byte[children]]
            states[children] = reached
            at = children[reached != DEAD]
        return states[self._node]


class Machine:
    """One constraint over one vocabulary; rows that share it keep only their states, the first of which is BEGIN.

    A token may come when what was said can still be completed with tokens; `stops` only where the answer is complete, and where nothing
    else may come they are all that is left.
    """

    def __init__(
        self, own: Automaton, tables: tuple[Vocabulary, Vocabulary], stops: Sequence[int], width: int, device: torch.device
    ) -> None:
        self._automaton, (self._first, self._later) = own, tables
        self._stops, self._width, self._device = list(stops), width, device
        self._masks: OrderedDict[int, Tensor] = OrderedDict()
        self._usable = self._completable()

    def blocked(self, state: int) -> Tensor:
        """(V,) bool: the tokens that may not come next."""
        mask = self._masks.get(state)
        if mask is None:
            mask = self._masks[state] = self._make(state)
            if len(self._masks) > max(1, MASK_BYTES // self._width):
                self._masks.popitem(last=False)
        else:
            self._masks.move_to_end(state)
        return mask

    def advance(self, state: int, token: int) -> int:
        """The state after `token`, DEAD where it may not come."""
        table, begin = (self._first, START) if state == BEGIN else (self._later, state)
        piece = table.pieces[token] if token < len(table.pieces) else b""
        return self._automaton.walk(begin, piece) if piece else DEAD

    def complete(self, state: int) -> bool:
        """Whether the answer may end here."""
        return bool(self._automaton.accepting[START if state == BEGIN else state])

    def _make(self, state: int) -> Tensor:
        blocked = torch.ones(self._width, dtype=torch.bool)
        allowed = self._usable[self._after(state)]
        blocked[: len(allowed)] = torch.from_numpy(~allowed)
        blocked[self._stops] = not self.complete(state)
        return blocked.to(self._device)

    def _after(self, state: int) -> np.ndarray:
        """The state (V,) after each token; a stop id ends an answer, whatever text it has."""
        table, begin = (self._first, START) if state == BEGIN else (self._later, state)
        found = table.after(self._automaton.transitions, begin)
        found[[stop for stop in self._stops if stop < len(found)]] = DEAD
        return found

    def _completable(self) -> np.ndarray:
        """(S,) bool: the states that tokens can lead to the end. All but DEAD, where every byte that is needed is a token of its own."""
        usable = np.arange(len(self._automaton.transitions)) != DEAD
        spelled = np.zeros(256, dtype=bool)
        spelled[[piece[0] for i, piece in enumerate(self._later.pieces) if len(piece) == 1 and i not in self._stops]] = True
        needed = (self._automaton.transitions != DEAD).any(axis=0)
        if not (needed & ~spelled).any():
            return usable
        targets = [np.unique(self._after(state)) for state in range(len(usable))]
        usable, found = self._automaton.accepting.copy(), True
        while found:
            more = np.array([state != DEAD and bool(usable[reached].any()) for state, reached in enumerate(targets)]) | usable
            usable, found = more, bool((more != usable).any())
        return usable


class Constraints:
    """The machines of an engine, made once for each constraint.

    Args:
        tokenizer: whose tokens are masked.
        vocab_size: V of the masks, the rows of the model's head.

    Example:
        >>> from components.data.tokenizers import bytes_tokenizer
        >>> machine = Constraints(bytes_tokenizer(), 261).machine(Constraint(choice=("no", "nope")), stops=(256,))
        >>> state = machine.advance(machine.advance(BEGIN, ord("n")), ord("o"))
        >>> (~machine.blocked(state)).nonzero().flatten().tolist()  # "p", or the end
        [112, 256]
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._tokenizer, self._width, self._device = tokenizer, vocab_size, torch.device(device)
        self._tables: tuple[Vocabulary, Vocabulary] | None = None
        self._machines: OrderedDict[tuple[Constraint, tuple[int, ...]], Machine] = OrderedDict()
        self._making, self._changing = threading.Lock(), threading.Lock()

    def machine(self, constraint: Constraint, stops: Iterable[int]) -> Machine:
        """The machine of a constraint for rows that end at `stops`. Threads may ask at once; one is made at a time.

        Raises UserError for a constraint that is none, or that the tokenizer has no tokens for.
        """
        key = (constraint, tuple(sorted(set(stops))))
        if (known := self._known(key)) is not None:
            return known
        with self._making:
            if (known := self._known(key)) is not None:
                return known
            made = Machine(automaton(constraint), self._vocabularies(), key[1], self._width, self._device)
            if bool(made.blocked(BEGIN).all()):
                name, value = ("choice", list(constraint.choice)) if constraint.choice is not None else ("regex", constraint.regex)
                raise UserError(f"decode.{name}: {value!r}; the tokenizer has no tokens to say it")
            with self._changing:
                self._machines[key] = made
                if len(self._machines) > MOST_MACHINES:
                    self._machines.popitem(last=False)
            return made

    def _known(self, key: tuple[Constraint, tuple[int, ...]]) -> Machine | None:
        with self._changing:
            if key in self._machines:
                self._machines.move_to_end(key)
            return self._machines.get(key)

    def _vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        if self._tables is None:
            first, later = self._tokenizer.token_bytes(first=True), self._tokenizer.token_bytes()
            table = Vocabulary(later)
            self._tables = (table if first == later else Vocabulary(first), table)
        return self._tables


def blocked_rows(blocked: Tensor, machines: Sequence[tuple[Machine, int] | None]) -> Tensor:
    """What each row may not say. blocked: (V,) bool, of all rows; machines: those of the B rows with their states, None for a free row.

    Returns (B, V) bool, or `blocked` itself where no row is held to anything.
    """
    if not any(machines):
        return blocked
    return torch.stack([blocked if own is None else blocked | own[0].blocked(own[1]) for own in machines])
