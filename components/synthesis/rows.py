"""Rows of a synthesised data set: from parsed questions to the final files, each with where it comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.store import request_id
from components.synthesis.calls import Call
from components.synthesis.concepts import normal_name
from components.synthesis.decontamination import Benchmarks
from components.synthesis.duplicates import NearDuplicates, exact_duplicates
from components.synthesis.questions import Reply, parse_questions

if TYPE_CHECKING:
    import pyarrow

LEVELS = {"level1": 1, "level2": 2, "level2_drawn": 2, "level3": 3}
ROW_GROUP = 16384


@dataclass(frozen=True)
class Said:
    """A reply of a model. seed: of the call; tokens: of its prompt and of what was written."""

    text: str
    finish_reason: str
    seed: int
    tokens: tuple[int, int]


@dataclass
class Draft:
    """A question on its way to a row. call, said: what it was asked by; concepts: those that it combines, as far as that is known.

    given: whether the model named the concepts itself, and then how many of them were offered.
    """

    level: int
    question: str
    concepts: tuple[str, ...]
    origin: str | None
    school_level: str | None
    call: Call
    said: Said

    @property
    def id(self) -> str:
        """32 hex digits of the level, the question and its documents."""
        return request_id(level=self.level, question=self.question, documents=list(self.call.documents))


def drafts_of(call: Call, said: Said, refusal: str) -> tuple[Reply, list[Draft]]:
    """What a reply holds. A reply that was cut off at its last token loses its last block, whether or not that looks complete."""
    reply = parse_questions(said.text, refusal)
    drafts = []
    for place, question in enumerate(reply.questions):
        concepts = question.concepts or (call.combinations[place] if place < len(call.combinations) else ())
        drafts.append(Draft(LEVELS[call.kind], question.text, concepts, question.origin, question.school_level, call, said))
    return reply, drafts


@dataclass
class Dropped:
    """What was left out and why. lines: {id or call, reason, of, text}, for dropped.jsonl; counts: by reason."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, text: str, **about: Any) -> None:
        self.counts[reason] += 1
        self.lines.append({"reason": reason, **about, "text": text})


def without_repeats(drafts: Sequence[Draft], near: NearDuplicates, dropped: Dropped) -> list[Draft]:
    """The drafts that repeat no earlier one, exactly or nearly. near: a fresh one."""
    texts = [draft.question for draft in drafts]
    exact = exact_duplicates(texts)
    unlike = [place for place in range(len(drafts)) if exact[place] < 0]
    repeats = near.add([texts[place] for place in unlike])
    for place, first in enumerate(exact.tolist()):
        if first >= 0:
            dropped.add("repeats exactly", texts[place], level=drafts[place].level, of=drafts[first].id)
    for number, place in enumerate(unlike):
        if repeats[number] >= 0:
            dropped.add("repeats nearly", texts[place], level=drafts[place].level, of=drafts[unlike[int(repeats[number])]].id)
    return [drafts[place] for number, place in enumerate(unlike) if repeats[number] < 0]


def uncontaminated(drafts: Sequence[Draft], texts: Sequence[str], benchmarks: Benchmarks, stage: str, dropped: Dropped) -> list[int]:
    """Places of the drafts whose texts repeat no benchmark. stage: question, or answer for the whole row."""
    verdicts = benchmarks.check(texts)
    for draft, text, hit in zip(drafts, texts, verdicts.hits):
        if hit is not None:
            dropped.add(f"{stage} in benchmark", text, level=draft.level, of=f"{hit.benchmark}/{hit.filter}")
    return [place for place, hit in enumerate(verdicts.hits) if hit is None]


def row_of(draft: Draft, answer: Mapping[str, Any], models: Mapping[str, str], prompt_id: str, sampling: str) -> dict[str, Any]:
    """The final row. answer: text, finish_reason, tokens (prompt, completion), call (its name) and checked (how it was verified)."""
    call, said = draft.call, draft.said
    written, read = said.tokens[1] + answer["tokens"][1], said.tokens[0] + answer["tokens"][0]
    return {
        "id": draft.id, "level": draft.level, "question": draft.question, "answer": answer["text"],
        "messages": [{"role": "user", "content": draft.question}, {"role": "assistant", "content": answer["text"]}],
        "topics": list(call.topics), "concepts": list(draft.concepts), "doc_ids": list(call.documents), "origin": draft.origin,
        "school_level": draft.school_level, "models": dict(models), "prompt_id": prompt_id, "sampling": sampling, "seed": said.seed,
        "tokens": {"prompt": read, "completion": written}, "finish_reason": answer["finish_reason"], "parents": [call.name, answer["call"]],
        "walk": None if call.walk is None else json.dumps(call.walk), "checked": answer["checked"],
    }  # fmt: skip


def schema() -> pyarrow.Schema:
    """Columns of the final files."""
    import pyarrow as pa

    text, number, names = pa.string(), pa.int64(), pa.list_(pa.string())
    return pa.schema([
        ("id", text), ("level", number), ("question", text), ("answer", text),
        ("messages", pa.list_(pa.struct([("role", text), ("content", text)]))), ("topics", names), ("concepts", names), ("doc_ids", names),
        ("origin", text), ("school_level", text), ("models", pa.struct([("question", text), ("answer", text)])), ("prompt_id", text),
        ("sampling", text), ("seed", number), ("tokens", pa.struct([("prompt", number), ("completion", number)])), ("finish_reason", text),
        ("parents", names), ("walk", text), ("checked", text),
    ])  # fmt: skip


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write a parquet file, and return how many rows it has. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns, count = schema(), 0
    group: list[Mapping[str, Any]] = []
    with parquet.ParquetWriter(path, columns, compression="zstd", version="2.6") as writer:
        for row in rows:
            group.append(row)
            count += 1
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, columns))
                group = []
        if group or not count:
            writer.write_table(pa.Table.from_pylist(group, columns))
    return count


def combined_pairs(drafts: Sequence[Draft], aliases: Mapping[str, str]) -> list[list[str]]:
    """Normal names of the concepts of each draft, for coverage."""
    return [[normal_name(name, aliases) for name in draft.concepts] for draft in drafts]
