"""The questions of eval=ruler_lite in words, and the fillers that they are hidden in (RULER, Hsieh et al. 2024, arXiv 2404.06654, sec. 3).

Worded more shortly than RULER's, and with fewer words to find, so that they fit into the short texts of small models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Filler = Callable[[np.random.Generator], Iterator[str]]  # sentences or words without end
Maker = Callable[[np.random.Generator, float], "Question"]  # (generator, depth) -> question

ADJECTIVES = (
    "amber", "brisk", "calm", "dusty", "eager", "faint", "grand", "hollow", "idle", "jolly", "keen", "lucid", "mellow", "noble", "oval",
    "pale", "quiet", "rapid", "silent", "tidy",
)  # fmt: skip
NOUNS = (
    "anchor", "basket", "candle", "drawer", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle", "ladder", "mirror",
    "needle", "orchard", "pillow", "quarry", "ribbon", "saddle", "tunnel",
)  # fmt: skip
REPEATED = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ")
SUBJECTS = ("The river", "An old man", "The teacher", "A stray dog", "The market", "My neighbour", "The captain", "A cold wind")
VERBS = ("crosses", "remembers", "watches", "leaves", "follows", "finds", "forgets", "paints")
OBJECTS = ("the bridge", "a narrow street", "the harbour", "an empty house", "the last train", "a wooden box", "the hill", "her letter")
TIMES = ("at night", "in spring", "every day", "once more", "before noon", "without a word")
RELATIONS = {  # a fact, the question after it, the beginning of its answer, and the answers there are
    "lives": (
        "{} lives in {}. ",
        "Where does {} live?",
        "{} lives in",
        ("Oslo", "Lima", "Cairo", "Quito", "Turin", "Kyoto", "Perth", "Minsk"),
    ),
    "works": (
        "{} works as a {}. ",
        "What does {} work as?",
        "{} works as a",
        ("baker", "pilot", "nurse", "tailor", "miner", "judge", "potter"),
    ),
    "plays": (
        "{} plays the {}. ",
        "What does {} play?",
        "{} plays the",
        ("flute", "harp", "drum", "cello", "horn", "viola", "organ", "banjo"),
    ),
}
KEYS, VALUES, HOPS, COMMON, REPEATS = 4, 4, 4, 4, 6
LEAST, MOST = 10**6, 10**7  # of the hidden numbers: seven digits


@dataclass(frozen=True)
class Question:
    """A question before it lies in a text.

    facts: (depth, sentence), to be laid into the filler in rising order of depth. lead: the beginning of the answer, which the model goes
    on with. expected: texts that a full answer holds. answer: the right answer whose likelihood is measured; None where many orders are
    right. avoid: texts that no unit of a filler may hold. filler: None for the haystack that the user chose.
    """

    instruction: str
    facts: tuple[tuple[float, str], ...]
    question: str
    lead: str
    expected: tuple[str, ...]
    answer: str | None
    avoid: tuple[str, ...] = ()
    filler: Filler | None = None


def niah_single(rng: np.random.Generator, depth: float) -> Question:
    """A needle: one number of one key."""
    return _needles(rng, [depth], keys=1, values=1)


def niah_multikey(rng: np.random.Generator, depth: float) -> Question:
    """Numbers of several keys, of which one is asked: that at `depth`, while the others lie anywhere."""
    return _needles(rng, [depth, *rng.random(KEYS - 1)], keys=KEYS, values=1)


def niah_multivalue(rng: np.random.Generator, depth: float) -> Question:
    """Several numbers of one key, all asked. They lie anywhere, so that `depth` says nothing."""
    return _needles(rng, sorted(rng.random(VALUES)), keys=1, values=VALUES)


def _needles(rng: np.random.Generator, depths: Sequence[float], keys: int, values: int) -> Question:
    """The first key is the asked one; each fact is a key with a number."""
    chosen = rng.permutation(len(ADJECTIVES) * len(NOUNS))[:keys]
    names = [f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i // len(ADJECTIVES)]}" for i in chosen]
    numbers = distinct(lambda: str(rng.integers(LEAST, MOST)), keys * values)
    facts = tuple((float(d), needle(names[i % keys], number)) for i, (d, number) in enumerate(zip(depths, numbers, strict=True)))
    expected = tuple(numbers[::keys])[:values]
    several = "s" if keys * values > 1 else ""
    hidden = "Some special magic numbers are" if several else "A special magic number is"
    asked, lead = ("are", "numbers") if values > 1 else ("is", "number")
    return Question(
        f"{hidden} hidden in the following text. Remember {'them' if several else 'it'}.\n",
        facts,
        f"\nWhat {asked} the special magic {lead} for {names[0]}?",
        f" The special magic {lead} for {names[0]} {asked}:",
        expected,
        " " + ", ".join(expected),
        avoid=(*names, *numbers),
    )


def needle(key: str, number: str) -> str:
    return f"One of the special magic numbers for {key} is: {number}. "


def variable_tracking(rng: np.random.Generator, depth: float) -> Question:
    """A chain of assignments in the order of the text; all variables that hold its number are asked. `depth` says nothing."""
    names = distinct(lambda: "".join(chr(65 + i) for i in rng.integers(26, size=5)), HOPS + 1)
    number = str(rng.integers(10_000, 100_000))
    links = [f"VAR {names[0]} = {number}. ", *(f"VAR {name} = VAR {before}. " for before, name in itertools.pairwise(names))]
    return Question(
        "Track the chain of variable assignments hidden in the following text.\n",
        tuple(zip(sorted(map(float, rng.random(HOPS + 1))), links, strict=True)),
        f"\nWhich variables hold the value {number}?",
        f" The {HOPS + 1} variables that hold the value {number} are:",
        tuple(names),
        " " + ", ".join(names),
    )


def common_words(rng: np.random.Generator, depth: float) -> Question:
    """A list of made-up words, most of them there once; those that come several times are asked. `depth` says nothing."""
    words = distinct(lambda: syllables(rng, 3), COMMON)
    facts = tuple((float(place), f"{word} ") for word in words for place in rng.random(REPEATS))
    return Question(
        "Some words of the following list come more often than the others. Remember them.\n",
        facts,
        f"\nWhich {COMMON} words come most often in the list?",
        f" The {COMMON} most common words are:",
        tuple(words),
        None,
        avoid=tuple(words),
        filler=rare_words,
    )


def qa(rng: np.random.Generator, depth: float) -> Question:
    """A fact about a person among facts about others, and about the same person in another respect."""
    name, kinds = syllables(rng, 2).capitalize(), list(RELATIONS)
    asked, other = (kinds[i] for i in rng.permutation(len(kinds))[:2])
    answer = RELATIONS[asked][3][rng.integers(len(RELATIONS[asked][3]))]
    return Question(
        "Answer the question from the following facts.\n",
        ((depth, RELATIONS[asked][0].format(name, answer)), (float(rng.random()), _fact(rng, name, other))),
        "\n" + RELATIONS[asked][1].format(name),
        " " + RELATIONS[asked][2].format(name),
        (answer,),
        f" {answer}",
        avoid=(f"{name} ",),
        filler=other_facts,
    )


def _fact(rng: np.random.Generator, name: str, kind: str) -> str:
    sentence, _, _, answers = RELATIONS[kind]
    return sentence.format(name, answers[rng.integers(len(answers))])


TASKS: dict[str, tuple[Maker, bool]] = {  # whether the answer lies in one place, whose depth can be chosen
    "niah_single": (niah_single, True),
    "niah_multikey": (niah_multikey, True),
    "niah_multivalue": (niah_multivalue, False),
    "variable_tracking": (variable_tracking, False),
    "common_words": (common_words, False),
    "qa": (qa, True),
}


def repeated_sentences(rng: np.random.Generator) -> Iterator[str]:
    """RULER's simplest filler."""
    return itertools.cycle(REPEATED)


def made_up_sentences(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield " ".join(str(words[rng.integers(len(words))]) for words in (SUBJECTS, VERBS, OBJECTS, TIMES)) + ". "


def other_needles(rng: np.random.Generator) -> Iterator[str]:
    """RULER's hardest filler: needles that are not asked for."""
    while True:
        key = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
        yield needle(key, str(rng.integers(LEAST, MOST)))


def rare_words(rng: np.random.Generator) -> Iterator[str]:
    """Words of four or five syllables: of 24 million and more hardly one comes twice, however long the text."""
    while True:
        yield f"{syllables(rng, int(rng.integers(4, 6)))} "


def other_facts(rng: np.random.Generator) -> Iterator[str]:
    kinds = list(RELATIONS)
    while True:
        yield _fact(rng, syllables(rng, 2).capitalize(), kinds[rng.integers(len(kinds))])


HAYSTACKS: dict[str, Filler | None] = {  # None: text of the run
    "text": None,
    "repeat": repeated_sentences,
    "sentences": made_up_sentences,
    "needles": other_needles,
}


def syllables(rng: np.random.Generator, count: int) -> str:
    """A word that no language has, two letters a syllable."""
    return "".join("bdfgklmnprstvz"[rng.integers(14)] + "aeiou"[rng.integers(5)] for _ in range(count))


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """`count` different draws, in the order in which they came."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
