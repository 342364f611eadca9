"""The regular expressions that an answer can be held to: a subset of Python's `re`, read as with `re.ASCII` and matched from end to end.

Literals, `.`, classes, `\\d \\w \\s` and their opposites, escapes, groups, `|`, `* + ? {m} {m,} {m,n}`. A lazy quantifier means the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NoReturn

from components.contracts import UserError

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included

MOST_REPEATS = 100_000
DEEPEST = 100  # groups within groups
LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)  # no characters: UTF-8 cannot hold them
DIGITS: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
SETS = {"d": DIGITS, "w": WORD, "s": SPACE}
SIGNS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
HEX = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True)
class Node:
    """A part of a pattern. characters: one of `ranges`; sequence, either: of `parts`; repeat: `parts[0]` least to most times."""

    kind: Literal["characters", "sequence", "either", "repeat"]
    parts: tuple[Node, ...] = ()
    ranges: Ranges = ()
    least: int = 0
    most: int | None = None


def parse(pattern: str) -> Node:
    """Read a pattern. Raises UserError naming the place where it is wrong or uses what is not supported."""
    return _Parser(pattern).whole()


def invert(ranges: Ranges) -> Ranges:
    """All characters that are not in `ranges`."""
    found, after = [], 0
    for low, high in sorted([*ranges, SURROGATES]):
        if low > after:
            found.append((after, low - 1))
        after = max(after, high + 1)
    return (*found, (after, LAST)) if after <= LAST else tuple(found)


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0

    def whole(self) -> Node:
        node = self._either()
        if self._next:
            self._refuse("there is no group to close")
        return node

    @property
    def _next(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _take(self, wanted: str) -> bool:
        found = self.pattern.startswith(wanted, self.at)
        self.at += len(wanted) * found
        return found

    def _refuse(self, why: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        raise UserError(f"decode.regex: {self.pattern!r}, character {at + 1} ({self.pattern[at : at + 1] or 'the end'}): {why}")

    def _either(self) -> Node:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else Node("either", tuple(branches))

    def _sequence(self) -> Node:
        parts = []
        while self._next not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return Node("sequence", tuple(parts))

    def _quantified(self, node: Node) -> Node:
        begin = self.at
        bounds = self._bounds()
        if bounds is None:
            return node
        if self._next == "+":
            self._refuse("possessive quantifiers are not supported")
        self._take("?")
        again = self.at
        if self._bounds() is not None:
            self._refuse("there is nothing to repeat", again)
        least, most = bounds
        if most is not None and most < least:
            self._refuse(f"at least {least} but at most {most} times", begin)
        if max(least, most or 0) > MOST_REPEATS:
            self._refuse(f"at most {MOST_REPEATS} repetitions are supported", begin)
        return Node("repeat", (node,), least=least, most=most)

    def _bounds(self) -> tuple[int, int | None] | None:
        """The quantifier that comes next; braces that are none are literals, as in Python."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        end = self.pattern.find("}", self.at)
        if self._next != "{" or end < 0:
            return None
        least, comma, most = self.pattern[self.at + 1 : end].partition(",")
        if not (comma or least) or not all(not n or (n.isascii() and n.isdigit()) for n in (least, most)):
            return None
        self.at = end + 1
        if not comma:
            return int(least), int(least)
        return int(least or 0), int(most) if most else None

    def _atom(self) -> Node:
        begin, char = self.at, self._next
        if char in "*+?":
            self._refuse("there is nothing to repeat")
        if char in "^$":
            self._refuse("anchors are not supported; the answer is matched from end to end anyway")
        self.at += 1
        if char == "(":
            return self._group(begin)
        if char == "[":
            return Node("characters", ranges=self._class(begin))
        if char == ".":
            return Node("characters", ranges=invert(((0x0A, 0x0A),)))
        if char == "\\":
            return Node("characters", ranges=self._escape(begin))
        return Node("characters", ranges=self._single(char, begin))

    def _group(self, begin: int) -> Node:
        if self._next == "?" and not self._take("?:"):
            self._refuse("of the groups that begin with (? only (?:...) is supported")
        self.depth += 1
        if self.depth > DEEPEST:
            self._refuse(f"at most {DEEPEST} groups within groups are supported", begin)
        node = self._either()
        if not self._take(")"):
            self._refuse("this group is not closed", begin)
        self.depth -= 1
        return node

    def _class(self, begin: int) -> Ranges:
        inverted = self._take("^")
        found: list[tuple[int, int]] = []
        first = True
        while first or self._next != "]":
            at = self.at
            low = self._member(begin)
            first = False
            if self._next == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._member(begin)
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                    self._refuse("a range needs two characters in rising order", at)
                low = ((low[0][0], high[0][0]),)
                if low[0][0] <= SURROGATES[1] and low[0][1] >= SURROGATES[0]:
                    low = tuple(r for r in ((low[0][0], SURROGATES[0] - 1), (SURROGATES[1] + 1, low[0][1])) if r[0] <= r[1])
            found += low
        self.at += 1
        return invert(tuple(found)) if inverted else tuple(found)

    def _member(self, begin: int) -> Ranges:
        at, char = self.at, self._next
        if not char:
            self._refuse("this class is not closed", begin)
        self.at += 1
        return self._escape(at, inside=True) if char == "\\" else self._single(char, at)

    def _escape(self, begin: int, inside: bool = False) -> Ranges:
        char = self._next
        self.at += 1
        if not char:
            self._refuse("there is nothing after the backslash", begin)
        if char.lower() in SETS:
            ranges = SETS[char.lower()]
            return ranges if char.islower() else invert(ranges)
        if char in HEX:
            digits = self.pattern[self.at : self.at + HEX[char]]
            try:
                code = int(digits, 16) if digits.isalnum() and len(digits) == HEX[char] else -1
            except ValueError:
                code = -1
            if not 0 <= code <= LAST:
                self._refuse(f"\\{char} needs {HEX[char]} hexadecimal digits of a character", begin)
            self.at += HEX[char]
            return self._single(chr(code), begin)
        if char in SIGNS and not (char == "0" and self._next.isdigit()):
            return self._single(SIGNS[char], begin)
        if inside and char == "b":
            return self._single("\b", begin)
        if char.isascii() and char.isalnum():
            what = "back-references and octal numbers are" if char.isdigit() else f"\\{char} is"
            self._refuse(f"{what} not supported", begin)
        return self._single(char, begin)

    def _single(self, char: str, at: int) -> Ranges:
        code = ord(char)
        if SURROGATES[0] <= code <= SURROGATES[1]:
            self._refuse("a surrogate is no character", at)
        return ((code, code),)
