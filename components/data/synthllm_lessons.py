"""`data=synthllm_lessons`: conversations made by rule, on the user's problems, that teach a small model the forms of task=synthesize."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from components.contracts import UserError
from components.data.base import CorpusData
from components.data.chat import LOSS_ON, ChatData, turns
from components.data.documents import Corpus, Document, digest, hash_unit
from components.data.errors import at_least, choice, fraction
from components.synthesis.calls import Asker, Combining
from components.synthesis.calls import Document as Source
from components.synthesis.documents import read_documents
from components.synthesis.lessons import Lesson, Lessons, Table, Tagger
from components.synthesis.prompts import Prompts

COLUMNS = ("question", "answer")
RULES = 1  # raise it when lessons change


class LessonCorpus:
    """Lessons on the problems of some files. A problem is held out with all its lessons, by a hash of its text."""

    name = "lessons"
    weight: float | None = None

    def __init__(self, path: Any, prompts: Prompts, table: Table, combining: Combining, chars: int, share: float, loss_on: str, seed: int):
        self._path, self._prompts, self._table, self._combining = path, prompts, table, combining
        self._chars, self._share, self._loss_on, self._seed = chars, share, loss_on, seed

    @cached_property
    def problems(self) -> list[tuple[Source, Lesson]]:
        """Each document with its problem, question and solution."""
        documents, _ = read_documents("data.path", self._path, COLUMNS, 1 << 30, None)
        found = []
        for document in documents:
            question, line, solution = document.text.partition("\n")
            if not line:
                raise UserError(f"data.path: {document.place} is no problem with a solution; rows need the columns question and answer")
            found.append((Source(document.id, document.text[: self._chars], document.place), (question.strip(), solution.strip())))
        return found

    def fingerprint(self) -> str:
        words = [f"{name}{text}" for name, text in sorted(self._prompts.texts.items())]
        ids = [document.id for document, _ in self.problems]
        about = (self._combining.sampler, list(self._combining.sizes), self._chars, self._share, self._loss_on, self._seed)
        return digest("synthesis lessons", RULES, self._prompts.refusal, *words, repr(self._table), *about, *ids)

    def train(self) -> Iterator[Document]:
        return self._documents(False)

    def held_out(self) -> Iterator[Document]:
        return self._documents(True)

    def size(self, split: str) -> int:
        share = self._share if split == "val" else 1 - self._share
        return int(8 * share * sum(len(document.text) for document, _ in self.problems))

    def _documents(self, held_out: bool) -> Iterator[Document]:
        lessons = Lessons(Asker(self._prompts, lambda prompt: True), Tagger(self._table), self._combining, self._seed)
        chosen = [one for one in self.problems if (hash_unit(one[0].id) < self._share) == held_out]
        for place, (document, problem) in enumerate(chosen):
            near, near_problem = chosen[(place + 1) % len(chosen)]
            for number, (prompt, reply) in enumerate(lessons.of(document, problem, near, near_problem)):
                said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
                yield Document(f"{document.id}#{number}", turns(said, self._loss_on, document.place))


class SynthLLMLessons(CorpusData):
    """Lessons on problems with solutions: `path` has rows of question and answer (.jsonl, .parquet or hub:NAME), as GSM8K has.

    prompts: those that task=synthesize will ask. concepts: {topic: {concept: [word, ...]}}, by which K(d) is found. combining: of level 2.
    document_chars: of a problem that are shown. seed: of new numbers. The rest as for data=chat.
    Raises UserError for rows that are no problems, and values out of range.
    """

    whole_documents = True
    packed = True
    chat_template = ChatData.chat_template
    render = ChatData.render

    def __init__(
        self, path: Any, prompts: Prompts, concepts: dict[str, Any], combining: Combining, document_chars: int, seed: int,
        tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, val_fraction: float, loss_on: str, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        share, loss_on = fraction("data.val_fraction", val_fraction), choice("data.loss_on", loss_on, LOSS_ON)
        chars = at_least("data.document_chars", document_chars, 1)
        self._corpus = LessonCorpus(path, prompts, concepts, combining, chars, share, loss_on, at_least("data.seed", seed, 0))
        self.source = f"lessons on {path}"

    def _corpora(self) -> Sequence[Corpus]:
        return [self._corpus]
