"""Replies made by rule, from which a small model learns the forms of a synthesis: what they say is no better than the rules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from components.decoding.rounds import seed_of
from components.errors import UserError
from components.synthesis.calls import Asker, Combining, Document, distinct_names
from components.synthesis.concepts import Concepts, Extraction, render_concepts
from components.synthesis.prompts import listed
from components.synthesis.questions import Question, render_questions

Lesson = tuple[str, str]  # (prompt, reply)
Table = Mapping[str, Mapping[str, Sequence[str]]]  # topic -> concept -> words that tell of it
LEVEL, SUBJECT = "Primary School", "Mathematics"
_NUMBER = re.compile(r"(?<![\w.,])\d{1,3}(?!\w|[.,]\d)")
_END = re.compile(r"(?<=[.?!])\s+")


class Tagger:
    """K(d) by a table of words. Raises UserError for an empty table, and a concept without words."""

    def __init__(self, table: Table) -> None:
        if not table:
            raise UserError("data.concepts: empty; give {topic: {concept: [word, ...]}}")
        self._patterns: dict[str, dict[str, re.Pattern[str]]] = {}
        for topic, concepts in table.items():
            for concept, words in concepts.items():
                if not words or not all(isinstance(word, str) for word in words):
                    raise UserError(f"data.concepts.{topic}.{concept}: {words!r}; give the words that tell of it, as text")
                either = "|".join(re.escape(word) for word in words)
                self._patterns.setdefault(topic, {})[concept] = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)

    def __call__(self, text: str) -> Concepts:
        """Topics with the concepts whose words are in a text; without topics that have none."""
        found = {topic: [name for name, one in own.items() if one.search(text)] for topic, own in self._patterns.items()}
        return {topic: names for topic, names in found.items() if names}


class Lessons:
    """Prompts of all stages on problems with solutions, and the replies that rules give.

    A new question is one that is there, with other numbers; a mixed one has a sentence of another problem before it.

    asker: makes the prompts, word for word those of a synthesis. tagger: K(d). combining: of level 2. seed: of numbers and choices.
    """

    def __init__(self, asker: Asker, tagger: Tagger, combining: Combining, seed: int) -> None:
        self.asker, self.tagger, self.combining, self.seed = asker, tagger, combining, seed

    def of(self, document: Document, problem: Lesson, near: Document, near_problem: Lesson) -> Iterator[Lesson]:
        """All lessons on a document, which shows `problem`, (question, solution); near: another one, for questions on two."""
        rng = np.random.default_rng(seed_of(self.seed, document.id, "lesson"))
        concepts, refusal = self.tagger(document.text), self.asker.prompts.refusal
        question, solution = problem
        yield from self._one("extract", document, render_concepts(Extraction("parsed", LEVEL, SUBJECT, concepts)) if concepts else refusal)
        yield from self._one("rate", document, str(min(10, 3 + 2 * len(distinct_names(concepts)))))
        yield self.asker.prompts.fill("answer", question=question), solution
        both = [Question(question, LEVEL, "original", ()), Question(renumbered(question, rng), LEVEL, "new", ())]
        yield from self._one("level1", document, render_questions(both), n=2)
        yield from self._level2(document, question, concepts, rng)
        yield from self._level3([document, near], [question, near_problem[0]], rng)

    def _one(self, kind: str, document: Document, reply: str, n: int = 1) -> Iterator[Lesson]:
        for call in self.asker.on_each(kind, [document], n=n):
            yield call.prompt, reply

    def _level2(self, document: Document, question: str, concepts: Concepts, rng: np.random.Generator) -> Iterator[Lesson]:
        for call in self.asker.on_own_concepts([document], {document.id: concepts}, self.combining, 0, 2, self.seed):
            offered = list(call.offered)
            chosen = call.combinations or [tuple(offered[i] for i in rng.permutation(len(offered))[:2]) for _ in range(2)]
            yield call.prompt, render_questions(Question(renumbered(question, rng), LEVEL, None, names) for names in chosen)

    def _level3(self, documents: Sequence[Document], questions: Sequence[str], rng: np.random.Generator) -> Iterator[Lesson]:
        own = [self.tagger(document.text) for document in documents]
        offered = [distinct_names(concepts) for concepts in own]
        if not all(offered):
            return
        names = tuple(dict.fromkeys(name for some in offered for name in some))
        topics = tuple(dict.fromkeys(topic for concepts in own for topic in concepts))
        call = self.asker.call("level3", documents, n=1, concepts=listed([*topics, *names]))
        if call:
            chosen = tuple(dict.fromkeys(some[int(rng.integers(len(some)))] for some in offered))
            text = f"{_END.split(questions[1])[0]} {renumbered(questions[0], rng)}"
            yield call.prompt, render_questions([Question(text, LEVEL, None, chosen)])


def renumbered(text: str, rng: np.random.Generator) -> str:
    """The same with other whole numbers of at most three digits, each of as many digits; equal ones stay equal.

    >>> len(renumbered("He has 12 apples and 12 pears.", np.random.default_rng(0)))
    30
    """
    new: dict[str, str] = {}

    def drawn(found: re.Match[str]) -> str:
        old = found[0]
        if old not in new:
            new[old] = str(int(rng.integers(10 ** (len(old) - 1) + (len(old) == 1), 10 ** len(old))))
        return new[old]

    return _NUMBER.sub(drawn, text)
