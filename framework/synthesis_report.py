"""What a synthesis leaves behind: the data set, its card, and a report on how it came about and how diverse it is."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.contracts import UserError
from components.store.files import as_json, sync_folder, trouble
from components.synthesis.calls import Asker, Document
from components.synthesis.concepts import Concepts, normal_name
from components.synthesis.diversity import (
    Embedder,
    compression_ratio,
    distinct_n,
    graph_view,
    histogram,
    pair_coverage,
    within_document_cosines,
)
from components.synthesis.graph import ConceptGraph, summary
from components.synthesis.questions import Question, adherence
from components.synthesis.rows import Draft, Dropped, combined_pairs, write_rows
from framework.graph_plot import distributions, network
from framework.jobs import say
from framework.stage_jobs import Stages

SHOWN_TOPICS, SHOWN_CONCEPTS, BINS = 30, 60, 30


@dataclass
class Made:
    """All that a synthesis found.

    reader: option of data that reads the rows; given: documents before screening; statuses: of replies, by stage; written: questions
    before filters.
    """

    reader: str
    aliases: Mapping[str, str]
    asker: Asker
    stages: Stages
    given: int
    documents: list[Document] = field(default_factory=list)
    concepts: dict[str, Concepts] = field(default_factory=dict)
    graphs: list[ConceptGraph] = field(default_factory=list)
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    dropped: Dropped = field(default_factory=Dropped)
    written: int = 0
    drafts: list[Draft] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def write_final(final: Path, made: Made, embedder: Embedder) -> dict[str, float]:
    """Put the data set in place as a whole: parquet, README.md (its card), report.json, dropped.jsonl, documents.jsonl, pictures.

    Returns: figures for metrics.json. Raises UserError where it cannot be written, and where there is no row.
    """
    partial = final.with_name(final.name + ".partial")
    report = report_of(made, embedder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_lines(partial / "dropped.jsonl", made.dropped.lines)
        where = [{"id": one.id, "place": one.place, "concepts": made.concepts.get(one.id, {})} for one in made.documents]
        write_lines(partial / "documents.jsonl", where)
        write_rows(made.rows, partial / "data-00000.parquet")
        pictures = draw(made, embedder, partial)
        (partial / "report.json").write_bytes(as_json(report))
        (partial / "README.md").write_text(card(made, report, pictures), encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync_folder(final.parent)
    except OSError as error:
        raise trouble(final, error) from error
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(made.dropped.counts.items())) or "nothing"
    say(f"left out, with the reason in {final / 'dropped.jsonl'}: {counts}")
    if not made.rows:
        raise UserError(
            f"task: no row came out of {len(made.documents):,} documents; see {final / 'report.json'} and dropped.jsonl beside it"
        )
    say(f"{len(made.rows):,} rows, card and report in {final}")
    say(f"Next: python train.py task=sft data={made.reader} data.path={final} ckpt=RUN_DIR")
    return {key: float(value) for key, value in flat(report) if isinstance(value, int | float)}


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())


def report_of(made: Made, embedder: Embedder) -> dict[str, Any]:
    """Counts of every stage, and of each level what its questions are like. A figure that nothing can be said of is None."""
    levels: dict[str, Any] = {}
    for level in sorted({draft.level for draft in made.drafts}):
        levels[f"level{level}"] = of_level(level, made, embedder)
    return {
        "documents": {"given": made.given, "kept": len(made.documents), "with_concepts": len(made.concepts)},
        "questions": {"written": made.written, "kept": len(made.drafts)},
        "rows": len(made.rows),
        "dropped": dict(sorted(made.dropped.counts.items())),
        "replies": {stage: dict(sorted(counts.items())) for stage, counts in sorted(made.statuses.items())},
        "failed": made.stages.failed,
        "no_room": made.asker.no_room,
        "tokens": {stage: {"prompt": read, "completion": written} for stage, (read, written) in made.stages.tokens.items()},
        "levels": levels,
        "graph": [{"address": graph.address[:16], **summary(graph)} for graph in made.graphs],
    }


def of_level(level: int, made: Made, embedder: Embedder) -> dict[str, Any]:
    """Rows of a level, and how diverse its questions are (arXiv 2503.19551, sec. 4.3; lengths are in characters)."""
    drafts = [draft for draft in made.drafts if draft.level == level]
    rows = [row for row in made.rows if row["level"] == level]
    texts = [draft.question for draft in drafts]
    cosines = within_document_cosines(by_document(drafts), embedder)
    offered = sorted({normal_name(name, made.aliases) for draft in drafts for name in draft.call.offered})
    used, possible = pair_coverage(combined_pairs(drafts, made.aliases), offered)
    listed = [draft for draft in drafts if draft.call.offered]
    within = [adherence([as_question(draft)], [*draft.call.topics, *draft.call.offered], made.aliases) for draft in listed]
    hits, named = sum(one for one, _ in within), sum(one for _, one in within)
    return {
        "questions": len(drafts),
        "rows": len(rows),
        "calls": len({draft.call.name for draft in drafts}),
        "calls_shortened": len({draft.call.name for draft in drafts if draft.call.shortened}),
        "tokens": sum(row["tokens"]["completion"] for row in rows),
        "question_length_median": median([len(text) for text in texts]),
        "answer_length_median": median([len(row["answer"]) for row in rows]),
        "cosine_within_document": None if not len(cosines) else float(cosines.mean()),
        "distinct_2": distinct_n(texts, 2) if texts else None,
        "compression_ratio": compression_ratio(texts) if texts else None,
        "pairs_of_concepts": used,
        "pairs_possible": possible,
        "adherence": hits / named if named else None,
    }


def as_question(draft: Draft) -> Question:
    return Question(draft.question, None, None, draft.concepts)


def by_document(drafts: Sequence[Draft]) -> list[list[str]]:
    """Questions of each document, or of each pair of documents that was asked with."""
    found: dict[tuple[str, ...], list[str]] = {}
    for draft in drafts:
        found.setdefault(draft.call.documents, []).append(draft.question)
    return list(found.values())


def median(values: Sequence[int]) -> float | None:
    return float(np.median(values)) if values else None


def draw(made: Made, embedder: Embedder, folder: Path) -> list[str]:
    """graph.png of the first shard, diversity.png of all levels; returns what there is."""
    made_of: list[str] = []
    if made.graphs:
        view = graph_view(made.graphs[0], SHOWN_TOPICS, SHOWN_CONCEPTS)
        title = f"the most frequent of {len(made.graphs[0].topics):,} topics and {len(made.graphs[0].concepts):,} key concepts"
        network(view.labels, view.kinds, view.sizes, view.edges, folder / "graph.png", title)
        made_of.append("graph.png")
    curves = {}
    for level in sorted({draft.level for draft in made.drafts}):
        cosines = within_document_cosines(by_document([draft for draft in made.drafts if draft.level == level]), embedder)
        if len(cosines):
            edges, heights = histogram(cosines, BINS, 0.0, 1.0)
            curves[f"level {level} ({len(cosines):,} pairs)"] = (edges.tolist(), heights.tolist())
    if curves:
        distributions(curves, "cosine of two questions of a document", folder / "diversity.png", "how alike questions are")
        made_of.append("diversity.png")
    return made_of


def card(made: Made, report: dict[str, Any], pictures: Sequence[str]) -> str:
    """README.md: what `datasets` reads, then what a person wants to know."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: data-*.parquet", "---", ""]
    lines += ["# Synthesised questions and answers", ""]
    lines += [
        f"{report['rows']:,} rows from {report['documents']['kept']:,} documents. Written by language models and not checked by people: "
        "answers may be wrong. The documents' own licence holds for what was taken from them.",
        "",
        "Each row says where it comes from: `doc_ids` (see documents.jsonl), `parents` (the calls, in the folder stages beside this one), "
        "`prompt_id`, `models`, `seed`, and at level 3 the `walk` on the graph.",
        "",
        '```python\nimport datasets\n\nrows = datasets.load_dataset(FOLDER, split="train")\n```',
        "",
    ]
    if made.rows:
        models = made.rows[0]["models"]
        lines += [f"Questions by `{models['question']}`, answers by `{models['answer']}`.", ""]
    names = list(report["levels"])
    if names:
        lines += ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for key in next(iter(report["levels"].values())):
            lines.append(f"| {key.replace('_', ' ')} | " + " | ".join(shown(report["levels"][name][key]) for name in names) + " |")
        lines.append("")
    lines += ["| replies | " + "what became of them |", "| --- | --- |"]
    lines += [
        f"| {stage} | {', '.join(f'{n:,} {status}' for status, n in counts.items())} |" for stage, counts in report["replies"].items()
    ]
    lines += ["", "| left out | questions or replies |", "| --- | ---: |"]
    lines += [f"| {reason} | {count:,} |" for reason, count in report["dropped"].items()]
    lines += ["", *(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    return "\n".join(lines).rstrip() + "\n"


def shown(value: Any) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def flat(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """Figures of nested dictionaries by their paths."""
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in flat(value, f"{path}/{key}" if path else str(key))]
    return [(path, node)]
