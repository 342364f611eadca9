"""Concepts of a document: normal form, the tolerant parser, its inverse, and replies that are cut off anywhere."""

from __future__ import annotations

import random
import sys

import pytest

from components.errors import UserError
from components.synthesis.concepts import Extraction, alias_map, normal_name, parse_concepts, render_concepts

REFUSAL = "The document teaches nothing."
NAMES = [
    "Linear equations", "Quadratic formula (a, b, c: coefficients)", "Law of cosines", "n!", "C#", "Groups: cosets, orders", "1-forms",
    "L'Hôpital's rule", "2.5 % rule", "Inequalities a < b", "straße", "x^2 + y^2 = z^2", "1.10 as a decimal", "Area (e.g., 1. squares)",
]  # fmt: skip
REPLY = """<level>High School</level>
<subject>Mathematics</subject>
<topic>
1. Algebra
2. Geometry (triangles, circles: basics)
</topic>
<key_concept>
1. Algebra:
1.1. Linear equations
1.2. Powers (squares, cubes: by hand)
2. Geometry (triangles, circles: basics):
2.1. Law of cosines
</key_concept>"""


def random_extraction(source):
    concepts = {}
    for topic in source.sample(NAMES, source.randint(1, 5)):
        concepts[topic] = source.sample([f"{name} {number}" for name in NAMES for number in range(3)], source.randint(0, 14))
    if not any(concepts.values()):
        concepts[topic] = ["Something"]
    return Extraction("parsed", source.choice([None, "College"]), source.choice([None, "Computer science"]), concepts)


@pytest.mark.parametrize("seed", range(60))
def test_round_trip(seed):
    whole = random_extraction(random.Random(seed))
    parsed = parse_concepts(render_concepts(whole), REFUSAL)
    assert parsed == whole and list(parsed.concepts) == list(whole.concepts)


@pytest.mark.parametrize("seed", range(12))
def test_cut_at_every_character(seed):
    """Never raises, and never gives half an item: what there is, is a beginning of the whole."""
    whole = random_extraction(random.Random(seed))
    text = render_concepts(whole)
    for end in range(len(text)):
        cut = parse_concepts(text[:end], REFUSAL)
        assert cut.status in ("truncated", "malformed"), text[:end]  # malformed: before the first tag
        assert cut.status == "truncated" or not cut.concepts
        assert list(cut.concepts) == list(whole.concepts)[: len(cut.concepts)]
        assert all(names == whole.concepts[topic][: len(names)] for topic, names in cut.concepts.items())
    assert parse_concepts(text[: -len("</key_concept>")], REFUSAL).concepts == whole.concepts  # all lines were whole


def test_a_typical_reply():
    found = parse_concepts(REPLY, REFUSAL)
    assert found == Extraction(
        "parsed", "High School", "Mathematics",
        {"Algebra": ["Linear equations", "Powers (squares, cubes: by hand)"], "Geometry (triangles, circles: basics)": ["Law of cosines"]},
    )  # fmt: skip


def test_numbers_are_no_decimals():
    items = "\n".join(f"1.{number}. concept {number}" for number in range(1, 22))
    found = parse_concepts(f"<topic>\n1. A\n</topic>\n<key_concept>\n1. A:\n{items}\n</key_concept>", REFUSAL)
    assert found.concepts == {"A": [f"concept {number}" for number in range(1, 22)]}


@pytest.mark.parametrize(
    "change, concepts",
    [
        (lambda t: t.replace("1. Algebra:", "1. **Algebra:**"), None),
        (lambda t: t.replace("1.1. Linear", "1.1 Linear").replace("2.1. Law", "2.1) Law"), None),
        (lambda t: t.replace("<topic>", "<Topic>").replace("key_concept", "KEY_CONCEPTS"), None),
        (lambda t: t.replace("1. Algebra:", "Algebra"), None),  # no number: found by its name
        (lambda t: t.replace("1. Algebra:", "1. Elementary algebra:"), None),  # another wording: found by its number
        (lambda t: t.replace("1.1. ", "- ").replace("1.2. ", "  * "), None),
        (lambda t: t.replace("\n2. Geometry (triangles, circles: basics):", ""), None),  # no header: found by the items' numbers
        (lambda t: t.replace("</topic>\n", ""), None),
        (lambda t: "<think>a <topic> of 1. Nothing</think>\n" + t, None),
        (lambda t: t.replace("\n", "\r\n"), None),
        (lambda t: t.replace("1.2. ", "1.2. linear EQUATIONS.\n1.3. "), None),  # a repeated concept counts once
        (lambda t: t.replace("1. Algebra\n", ""), ["Geometry (triangles, circles: basics)", "Algebra"]),  # only in the second list
    ],
)
def test_what_models_do_to_the_form(change, concepts):
    plain, found = parse_concepts(REPLY, REFUSAL), parse_concepts(change(REPLY), REFUSAL)
    assert change(REPLY) != REPLY and found.status == "parsed" and found.concepts == plain.concepts
    assert list(found.concepts) == (concepts or list(plain.concepts))


@pytest.mark.parametrize(
    "text, status",
    [
        ("", "malformed"),
        ("I cannot do that.", "malformed"),
        ("  the document   teaches NOTHING. ", "refused"),
        ("<think>The document teaches nothing.</think>", "malformed"),  # only thought of
        ("<think>" + REPLY, "malformed"),  # still thinking
        ("<topic>\n1. A\n</topic>\n<key_concept>\n</key_concept>", "malformed"),
        ("<topic>\n1. A\n</topic>\n", "truncated"),
        ("<key_concept>\n1. A:\n1.1. x\n1.2. y", "truncated"),
        ("<topic>1. A", "truncated"),
    ],
)
def test_status(text, status):
    assert parse_concepts(text, REFUSAL).status == status


def test_nothing_raises_on_noise():
    source = random.Random(0)
    pieces = [
        "<topic>",
        "</topic>",
        "<key_concept>",
        "</key_concept>",
        "\n",
        "1.",
        "1.1",
        "1.1.1.",
        ":",
        "- ",
        "name",
        "**",
        "<",
        "\x00",
        "½",
        "².",
    ]
    for _ in range(3000):
        text = "".join(source.choices(pieces, k=source.randint(0, 25)))
        found = parse_concepts(text, REFUSAL)
        assert all(name and name == name.strip() for topic, names in found.concepts.items() for name in (topic, *names)), text


def test_normal_names():
    aliases = alias_map({"Pythagoras' theorem.": "Pythagorean  Theorem"})
    same = ["Pythagorean theorem", " pythagorean\tTHEOREM: ", "PYTHAGORAS' theorem", "Pythagorean Theorem.;"]
    assert {normal_name(name, aliases) for name in same} == {"pythagorean theorem"}
    assert normal_name("STRASSE", {}) == normal_name("Straße", {}) and normal_name("é", {}) == normal_name("e\u0301", {})
    assert len({normal_name(name, {}) for name in ("n!", "n", "C#", "C", "A*", "f(x)", "f")}) == 7
    assert normal_name(" .;: ", {}) == ""


def test_normal_form_is_its_own():
    source = random.Random(1)
    for _ in range(20_000):
        code = source.randrange(sys.maxunicode + 1)
        name = "".join(chr(c) for c in (code, source.randrange(0x400)) if not 0xD800 <= c < 0xE000)
        once = normal_name(name, {})
        assert normal_name(once, {}) == once, ascii(name)


def test_aliases_are_one_step():
    with pytest.raises(UserError, match="'a' stands for 'b', which is itself an alias; name 'c' directly"):
        alias_map({"A": "b", "B": "c"})
    with pytest.raises(UserError, match="at least one character"):
        alias_map({"...": "b"})
