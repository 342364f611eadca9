"""Option task=synthesize: documents into questions and answers, in stages that ask a model, with the origin of every row."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.contracts import SamplingParams, UserError
from components.data.errors import at_least, choice
from components.decoding.rounds import Sampler
from components.store.files import lock, trouble
from components.synthesis.calls import Asker, Call, Combining, Document, Mixing
from components.synthesis.concepts import Concepts, Extraction, alias_map, parse_concepts
from components.synthesis.decontamination import Benchmarks, read_benchmark
from components.synthesis.diversity import Embedder
from components.synthesis.documents import read_documents
from components.synthesis.duplicates import NearDuplicates
from components.synthesis.filter import DocumentFilter
from components.synthesis.graph_files import save_graph, write_graphml
from components.synthesis.prompts import Prompts
from components.synthesis.questions import Reply
from components.synthesis.rows import Draft, drafts_of, row_of, uncontaminated, without_repeats
from framework.generate import Context
from framework.jobs import say
from framework.stage_jobs import Calls, Speaker, Stages
from framework.synthesis_report import Made, write_final

STAGES, GRAPH, FINAL = "stages", "graph", "final"
_RATING = re.compile(r"(?<![\d.])(10|[1-9])(?![\d.]*\d)")


class Synthesize:
    """Stages 0 to 3 of arXiv 2503.19551: screening, concepts, questions of three levels, answers; then the data set.

    Every stage that asks a model is a crash-safe job of its own (framework/stage_jobs.py). What lies between them, graph, walks,
    duplicates and decontamination, is a function of their replies and the seed, so that the final files are the same bytes however often
    the command was stopped. Nothing is dropped in silence: dropped.jsonl has every question and reply that did not become a row, and why.

    Args: see conf/task/synthesize.yaml.
    Raises: UserError for no documents or folder, and values that are not allowed.
    """

    def __init__(
        self, documents: Any, columns: list[str], document_chars: int, most_documents: int | None, output: str | None, reader: str,
        levels: list[int], questions: int, attempts: int, aliases: dict[str, str], prompts: Prompts, extraction: Sampler,
        screening: dict[str, Any], combining: Combining, mixing: Mixing, duplicates: Callable[[], NearDuplicates],
        decontamination: dict[str, Any], answer: dict[str, Any], embedder: Embedder, concurrency: int, max_attempts: int,
        repair: bool, grace_s: float, progress_s: float, fsync_rows: int, fsync_seconds: float, shard_bytes: int,
    ) -> None:  # fmt: skip
        if not documents or output is None:
            raise UserError(
                "task: synthesize needs task.documents=FILE|DIR|GLOB|hub:NAME and output=DIR, which the same command finds again"
            )
        for key, value in (
            ("document_chars", document_chars), ("most_documents", most_documents), ("questions", questions), ("attempts", attempts),
            ("concurrency", concurrency), ("max_attempts", max_attempts),
        ):  # fmt: skip
            if value is not None:
                at_least(f"task.{key}", value, 1)
        if not levels or any(level not in (1, 2, 3) for level in levels):
            raise UserError(f"task.levels: {levels}; a list of 1, 2 and 3 is allowed")
        self.reader = reader
        self.documents, self.columns, self.document_chars, self.most_documents = documents, columns, document_chars, most_documents
        self.output, self.levels, self.questions, self.attempts = Path(output), sorted(set(levels)), questions, attempts
        self.aliases, self.prompts, self.extraction, self.screening = alias_map(aliases), prompts, extraction, screening
        self.combining, self.mixing, self.duplicates, self.embedder = combining, mixing, duplicates, embedder
        self.benchmarks = benchmarks_of(**decontamination)
        self.answering = Answering(**answer)
        self.job: dict[str, Any] = {
            "concurrency": concurrency, "max_attempts": max_attempts, "grace_s": grace_s, "progress_s": progress_s,
        }  # fmt: skip
        self.keeping: dict[str, Any] = {
            "repair": repair, "fsync_rows": fsync_rows, "fsync_seconds": fsync_seconds, "shard_bytes": shard_bytes,
        }  # fmt: skip

    def run(self, context: Context) -> dict[str, float]:
        """Run all stages and write the data set; returns counts."""
        documents, counts = read_documents("task.documents", self.documents, self.columns, self.document_chars, self.most_documents)
        told = ", ".join(f"{value:,} {name}" for name, value in counts.items() if value)
        say(f"{len(documents):,} documents" + (f" ({told})" if told else ""))
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            held = lock(self.output)
        except OSError as error:
            raise trouble(self.output, error) from error
        try:
            made = Synthesis(self, context, documents).run()
            return write_final(self.output / FINAL, made, self.embedder)
        finally:
            os.close(held)


@dataclass
class Answering:
    """How questions are answered. methods: decodings by what `verify` may say; the rest as in the YAML."""

    verify: str
    methods: dict[str, Any]
    ckpt: str | None
    least_votes: float
    keep_cut_off: bool

    def __post_init__(self) -> None:
        choice("task.answer.verify", self.verify, self.methods)
        if not 0 <= self.least_votes <= 1:
            raise UserError(f"task.answer.least_votes: {self.least_votes}; a share from 0 to 1 is allowed")

    @property
    def method(self) -> Any:
        return self.methods[self.verify]


def benchmarks_of(benchmarks: dict[str, Any], words: int) -> Benchmarks:
    """The texts that must not be trained on. Raises UserError for a file that cannot be read."""
    for name, about in benchmarks.items():
        if not isinstance(about, dict) or set(about) != {"path", "column"}:
            raise UserError(f"task.decontamination.benchmarks.{name}: {about!r}; give {{path: FILE, column: NAME}}")
    return Benchmarks({name: read_benchmark(name, Path(one["path"]), one["column"]) for name, one in benchmarks.items()}, words)


@dataclass
class Synthesis:
    """One run of the stages. made: what the final files and the report are written from."""

    task: Synthesize
    context: Context
    documents: list[Document]
    made: Made = field(init=False)

    def __post_init__(self) -> None:
        task = self.task
        self.speaker = Speaker(self.context)
        self.stages = Stages(task.output / STAGES, task.job, task.keeping)
        self.asker = Asker(task.prompts, self.speaker.fits)
        self.greedy = task.extraction.params(self.context.params.max_new_tokens, self.context.params.seed)
        self.seed = self.context.params.seed
        self.made = Made(task.reader, task.aliases, self.asker, self.stages, len(self.documents))
        limit, most = self.speaker.setting.limit, self.context.params.max_new_tokens
        if limit is not None and most >= limit:
            raise UserError(f"max_new_tokens: {most} leaves no room for a prompt in a context of {limit} tokens; lower it")

    def run(self) -> Made:
        """All stages, in their order."""
        if self.task.screening["positives"] is not None:
            self.documents = self.screened()
        self.made.documents = self.documents
        needs = {2, 3} & set(self.task.levels)
        self.made.concepts = self.extracted() if needs else {}
        drafts: list[Draft] = []
        for level in self.task.levels:
            drafts += self.level_three() if level == 3 else self.on_documents(level)
        self.made.written = len(drafts)
        drafts = without_repeats(drafts, self.task.duplicates(), self.made.dropped)
        clean = uncontaminated(drafts, [one.question for one in drafts], self.task.benchmarks, "question", self.made.dropped)
        self.made.drafts = [drafts[place] for place in clean]
        self.made.rows = self.answered(self.made.drafts)
        return self.made

    def screened(self) -> list[Document]:
        """Stage 0: the documents of the domain."""
        how, texts = self.task.screening, [document.text for document in self.documents]
        screen: DocumentFilter = how["filter"](embedder=self.task.embedder)
        if how["positives"] == "made":
            positives = self.composed(how["made"], how["subjects"], how["styles"])
        else:
            found, _ = read_documents("task.screening.positives", how["positives"], how["columns"], self.task.document_chars, None)
            positives = [document.text for document in found]
        order = np.random.default_rng(self.seed).permutation(len(texts))[: len(positives)]
        kept = screen.cold_start(texts, positives, [texts[int(place)] for place in order])
        rounds = iter(range(1, screen.rounds + 1))

        def rate(asked: Iterable[int]) -> list[float]:
            chosen = [self.documents[place] for place in asked]
            rated: dict[str, float] = {}
            stage = f"rate{next(rounds)}"
            for call, said in self.stages.ask(stage, lambda: self.asker.on_each("rate", chosen), self.speaker, self.greedy):
                found = None if said is None else _RATING.search(said.text)
                rated[call.documents[0]] = float("nan") if found is None else float(found[1])
                self.made.statuses[stage]["unreadable" if found is None else "parsed"] += 1
            return [rated.get(document.id, float("nan")) for document in chosen]

        kept = screen.refine(texts, kept, rate)
        say(f"screening: {len(kept):,} of {len(texts):,} documents are of the domain")
        if not len(kept):
            raise UserError("task.screening: no document is of the domain; lower task.screening.filter.threshold, or give other positives")
        return [self.documents[int(place)] for place in kept]

    def composed(self, count: int, subjects: list[str], styles: list[str]) -> list[str]:
        """Documents of the domain that the model writes, subject after subject in all styles."""
        pairs = [(subject, style) for subject in subjects for style in styles]
        if not pairs or count < 1:
            raise UserError("task.screening: positives=made needs subjects, styles and made of at least 1")

        def calls() -> Iterator[Call]:
            for place in range(count):
                subject, style = pairs[place % len(pairs)]
                yield Call("compose", self.task.prompts.fill("compose", subject=subject, style=style), (), place // len(pairs))

        said = self.stages.ask("compose", calls, self.speaker, self.context.params)
        return [reply.text for _, reply in said if reply is not None and reply.text.strip()]

    def extracted(self) -> dict[str, Concepts]:
        """Stage 1: K(d) of the documents, by their ids; without those that have none."""
        found: dict[str, Concepts] = {}
        for call, said in self.stages.ask("extract", lambda: self.asker.on_each("extract", self.documents), self.speaker, self.greedy):
            if said is None:
                continue
            extraction: Extraction = parse_concepts(said.text, self.task.prompts.refusal)
            self.note("extract", call, said.text, extraction.status)
            if any(extraction.concepts.values()):
                found[call.documents[0]] = extraction.concepts
        say(f"extract: {len(found):,} of {len(self.documents):,} documents have concepts")
        return found

    def on_documents(self, level: int) -> list[Draft]:
        """Stage 2, levels 1 and 2: calls on each document until it has the questions that are wanted, or no attempts are left."""
        task, found = self.task, dict[str, int]()
        drafts: list[Draft] = []
        for attempt in range(task.attempts):
            short = [document for document in self.documents if found.get(document.id, 0) < task.questions]

            def calls(short: list[Document] = short, attempt: int = attempt) -> Iterator[Call]:
                if level == 1:
                    return self.asker.on_each("level1", short, attempt, task.questions)
                return self.asker.on_own_concepts(short, self.made.concepts, task.combining, attempt, task.questions, self.seed)

            for draft in self.written(f"level{level}" + (f"-{attempt + 1}" if attempt else ""), calls):
                own = draft.call.documents[0]
                found[own] = found.get(own, 0) + 1
                if found[own] <= task.questions:
                    drafts.append(draft)
                else:
                    self.made.dropped.add("more than wanted", draft.question, level=level, call=draft.call.name)
        return drafts

    def level_three(self) -> list[Draft]:
        """Stage 2, level 3: sets along walks of the global graph, with the documents nearest to each."""
        concepts, task = self.made.concepts, self.task
        known = [document for document in self.documents if document.id in concepts]
        parts = list(task.mixing.graphs([concepts[document.id] for document in known], task.aliases))
        if not parts:
            say("level3: no document has concepts, so that there is no graph to walk on")
            return []
        for _, _, graph in parts:
            folder = save_graph(graph, task.output / GRAPH)
            write_graphml(graph, folder / "graph.graphml")
        self.made.graphs = [graph for _, _, graph in parts]
        sets = list(task.mixing.calls(self.asker, known, parts, self.seed))
        return self.written("level3", lambda: sets)

    def written(self, stage: str, calls: Calls) -> list[Draft]:
        """The questions of a stage."""
        drafts: list[Draft] = []
        for call, said in self.stages.ask(stage, calls, self.speaker, self.context.params):
            if said is None:
                continue
            reply, found = drafts_of(call, said, self.task.prompts.refusal)
            self.note(stage, call, said.text, reply.status, reply)
            drafts += found
        say(f"{stage}: {len(drafts):,} questions")
        return drafts

    def note(self, stage: str, call: Call, text: str, status: str, reply: Reply | None = None) -> None:
        """Count what became of a reply; one that is not whole is kept in dropped.jsonl."""
        self.made.statuses[stage][status] += 1
        if reply is not None and reply.malformed:
            self.made.statuses[stage]["blocks without a question"] += reply.malformed
        if status != "parsed":
            self.made.dropped.add(f"reply {status}", text, stage=stage, call=call.name)

    def answered(self, drafts: list[Draft]) -> list[dict[str, Any]]:
        """Stage 3: rows with answers, without those that are cut off, not agreed on, or in a benchmark."""
        how, task = self.task.answering, self.task
        speaker = self.speaker if how.ckpt is None else Speaker(self.context.another(how.ckpt))
        prompt_id, models = task.prompts.address("answer"), {"question": self.speaker.name, "answer": speaker.name}
        answers = list(self.answers(drafts, speaker))
        rows, kept = [], list[Draft]()
        for draft, answer in zip(drafts, answers, strict=True):
            why = self.unusable(answer)
            if answer is None or why is not None:
                self.made.dropped.add(why or "no answer", draft.question, level=draft.level, id=draft.id)
                continue
            asked = task.prompts.address(draft.call.kind)
            rows.append(row_of(draft, answer, models, f"{asked},{prompt_id}", self.sampling))
            kept.append(draft)
        texts = [f"{row['question']}\n{row['answer']}" for row in rows]
        clean = uncontaminated(kept, texts, task.benchmarks, "answer", self.made.dropped)
        return [rows[place] for place in clean]

    @property
    def sampling(self) -> str:
        """How questions were drawn, and how answers were made, as JSON; seeds stand in their own column."""
        drawn = {key: value for key, value in dataclasses.asdict(self.context.params).items() if key != "seed"}
        return json.dumps({"question": drawn, "answer": self.task.answering.verify}, sort_keys=True)

    def unusable(self, answer: dict[str, Any] | None) -> str | None:
        """Why an answer does not become a row, None where it does."""
        how = self.task.answering
        if answer is None:
            return "no answer"
        if not answer["text"].strip():
            return "answer empty"
        if answer["finish_reason"] == "length" and not how.keep_cut_off:
            return "answer cut off"
        share = answer["agreed"]
        return None if share is None or share >= how.least_votes else "answers do not agree"

    def answers(self, drafts: list[Draft], speaker: Speaker) -> Iterator[dict[str, Any] | None]:
        """{text, finish_reason, tokens, call, agreed, checked} for each draft."""
        method, calls = self.task.answering.method, self.answer_calls(drafts)
        if not hasattr(method, "answer"):
            params: SamplingParams = method.params(self.context.params.max_new_tokens, self.seed)
            for call, said in self.stages.ask("answer", lambda: calls, speaker, params):
                yield None if said is None else {
                    "text": said.text, "finish_reason": said.finish_reason, "tokens": said.tokens, "call": call.name, "agreed": None,
                    "checked": None,
                }  # fmt: skip
            return
        how = {"verify": self.task.answering.verify, "method": described(method)}
        for call, row in self.stages.answer("answer", lambda: calls, speaker, method, how):
            if row is None:
                yield None
                continue
            notes, usage = row["notes"], row["usage"]
            votes = notes.get("votes")
            yield {
                "text": row["text"], "finish_reason": row["finish_reason"], "call": call.name,
                "tokens": (int(usage.get("prompt_tokens", 0)), int(usage["completion_tokens"])),
                "agreed": None if votes is None else votes / method.n,
                "checked": json.dumps({"verify": how["verify"], "n": method.n, **({} if votes is None else {"votes": votes})}),
            }  # fmt: skip

    def answer_calls(self, drafts: list[Draft]) -> list[Call]:
        return [Call("answer", self.task.prompts.fill("answer", question=draft.question), (draft.id,)) for draft in drafts]


def described(value: Any) -> Any:
    """The settings of a decoding as JSON, for the name of its stage."""
    if isinstance(value, dict):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return {"class": type(value).__name__, **described(vars(value))}
