"""What is taught in a document: topics and their key concepts, parsed from the tagged text that a model writes (SynthLLM, sec. 2.2).

    <level>High School</level>
    <subject>Mathematics</subject>
    <topic>
    1. Algebra
    </topic>
    <key_concept>
    1. Algebra:
    1.1. Linear equations
    1.2. Powers (squares, cubes: by hand)
    </key_concept>

Items keep the order of the text; their numbers are never read as decimals, so that 1.10 follows 1.9.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from components.errors import UserError

Concepts = dict[str, list[str]]  # K(d): topic -> key concepts, as they were written
Status = Literal["parsed", "refused", "malformed", "truncated"]
_TRAILING = " .,;:"  # "n!" and "C#" keep their marks
_ITEM = re.compile(r"(?P<topic>\d+)(?:[.)](?P<sub>\d+)[.):]*(?=\s|$)|[.):]+(?=\s|$))\s*(?P<name>.*)")
_BULLET = re.compile(r"[-*•]\s+")


@dataclass(frozen=True)
class Extraction:
    """One parsed reply. concepts: complete items only; every topic of the list is a key, also one without concepts."""

    status: Status
    level: str | None
    subject: str | None
    concepts: Concepts


def normal_name(name: str, aliases: Mapping[str, str]) -> str:
    """Return what two spellings of a name share: case folded, spaces collapsed, no trailing punctuation, then `aliases` (see `alias_map`).

    >>> normal_name("  Pythagorean  Theorem:", {})
    'pythagorean theorem'
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    plain = " ".join(folded.split()).rstrip(_TRAILING)
    return aliases.get(plain, plain)


def alias_map(aliases: Mapping[str, str]) -> dict[str, str]:
    """Bring both sides of `aliases` (other name -> name) into normal form. Raises UserError for an empty name or a chain of aliases."""
    normal = {normal_name(other, {}): normal_name(name, {}) for other, name in aliases.items()}
    for other, name in normal.items():
        if not other or not name:
            raise UserError(f"aliases: {other!r}: {name!r}; a name has at least one character that is no punctuation")
        if name in normal:
            raise UserError(f"aliases: {other!r} stands for {name!r}, which is itself an alias; name {normal[name]!r} directly")
    return normal


def answer_part(text: str) -> str:
    """Return what follows the reasoning of a model that writes <think>...</think> first; nothing when the reasoning never ends."""
    head, closing, rest = text.rpartition("</think>")
    return rest if closing else ("" if "<think>" in head + rest else text)


def same_words(text: str) -> str:
    """Case folded, with single spaces, for comparing sentences."""
    return " ".join(text.casefold().split())


def parse_concepts(text: str, refusal: str) -> Extraction:
    """Parse the reply of a model. Never raises.

    A missing closing tag means that the reply was cut off: then the last line, which may be half an item, is dropped.

    Args:
        text: the whole reply.
        refusal: the sentence that the prompt asks for when a document teaches nothing.
    """
    body = answer_part(text)
    names, names_closed = _block(body, "topic")
    items, items_closed = _block(body, "key_concept")
    if names is None and items is None and refusal and same_words(refusal) in same_words(body):
        return Extraction("refused", None, None, {})
    concepts = _read(_lines(names or "", names_closed), _lines(items or "", items_closed))
    status: Status = "parsed" if any(concepts.values()) else "malformed"
    if (names is not None and not names_closed) or (items is not None and not items_closed) or (names is not None and items is None):
        status = "truncated"
    return Extraction(status, _short(body, "level"), _short(body, "subject"), concepts)


def render_concepts(extraction: Extraction) -> str:
    """Write what `parse_concepts` reads: the inverse for names of one line each, stripped, without our tags."""
    topics = [f"{number}. {topic}" for number, topic in enumerate(extraction.concepts, 1)]
    items = []
    for number, (topic, names) in enumerate(extraction.concepts.items(), 1):
        items += [f"{number}. {topic}:", *(f"{number}.{place}. {name}" for place, name in enumerate(names, 1))]
    head = [f"<{tag}>{value}</{tag}>" for tag, value in (("level", extraction.level), ("subject", extraction.subject)) if value]
    return "\n".join([*head, "<topic>", *topics, "</topic>", "<key_concept>", *items, "</key_concept>"])


def _block(text: str, tag: str) -> tuple[str | None, bool]:
    """(text after the last opening tag up to its closing tag, whether it ends); (None, False) without an opening tag.

    Where the closing tag is forgotten, the next opening tag ends the block.
    """
    openings = list(re.finditer(rf"<\s*{tag}s?\s*>", text, re.IGNORECASE))
    if not openings:
        return None, False
    rest = text[openings[-1].end() :]
    closing = re.search(rf"<\s*/\s*{tag}s?\s*>|<\s*(?:level|subject|topic|key_concept)s?\s*>", rest, re.IGNORECASE)
    return (rest[: closing.start()], True) if closing else (rest, False)


def _short(text: str, tag: str) -> str | None:
    """Content of a tag of one line, None when it is missing, empty or not closed."""
    body, closed = _block(text, tag)
    return (body or "").strip() or None if closed else None


def _lines(block: str, closed: bool) -> list[str]:
    """Stripped lines that are not empty, without the last one of a block that was cut off: it may lack its end."""
    whole = block if closed else block.rpartition("\n")[0]
    return [stripped for line in whole.split("\n") if (stripped := line.strip().replace("**", "").strip())]


def _read(names: list[str], items: list[str]) -> Concepts:
    """Topics of the first list, with the concepts of the second under them."""
    concepts: Concepts = {}
    known: dict[str, str] = {}  # normal form -> topic as written
    numbers: dict[str, str] = {}  # number in the first list -> topic
    for line in names:
        match = _ITEM.fullmatch(line)
        topic = _clean(match["name"] if match else _BULLET.sub("", line, count=1))
        if normal := normal_name(topic, {}):
            topic = known.setdefault(normal, topic)
            concepts.setdefault(topic, [])
            if match:
                numbers.setdefault(match["topic"], topic)
    taken: dict[str, set[str]] = {}  # topic -> normal forms of its concepts
    current: str | None = None
    for line in items:
        match, bullet = _ITEM.fullmatch(line), _BULLET.match(line)
        if match and match["sub"]:
            current, name = numbers.get(match["topic"], current), match["name"]
        elif bullet and current is not None:
            name = line[bullet.end() :]
        else:
            current = _header(match, line, known, numbers, concepts) or current
            continue
        normal = normal_name(name, {})
        if current is not None and normal and normal not in taken.setdefault(current, set()):
            taken[current].add(normal)
            concepts[current].append(_clean(name))
    return concepts


def _header(match: re.Match[str] | None, line: str, known: dict[str, str], numbers: dict[str, str], concepts: Concepts) -> str | None:
    """The topic that a line of the second list repeats; a numbered one that the first list lacks is new, another line is none."""
    name = _clean(match["name"] if match else line)
    normal = normal_name(name, {})
    topic = known.get(normal)
    if topic is None and match:
        topic = numbers.get(match["topic"])  # its name may be worded differently
        if topic is None and normal:
            topic = known[normal] = name
            concepts[topic] = []
    if topic is not None and match:
        numbers[match["topic"]] = topic  # what the second list's numbers mean is said by its own headers
    return topic


def _clean(name: str) -> str:
    """A name without the punctuation that ends its line."""
    return name.strip().rstrip(_TRAILING)
